"""Look at slider files, and do arithmetic on them.

    python -m extras.tools info age.safetensors smile.safetensors
    python -m extras.tools convert age.safetensors --to peft --out age_peft.safetensors
    python -m extras.tools merge age.safetensors:1.5 smile.safetensors --out both.safetensors
    python -m extras.tools extract tuned.safetensors --rank 16 --out tuned_lora.safetensors
    python -m extras.tools bake age.safetensors:1.5 --out older_model

info says what they are and how alike they are; merge takes --rank 8 for the nearest of that rank;
extract finds what a fine-tune changed in --model; bake writes --model with the sliders in its
weights."""

import itertools
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

import lora
from formats import schedule, single_file, slider_files, weights
from formats.slider_files import Delta, concatenate, delta_weight
from sdxl import MINIATURE
from sdxl_unet import UNet
from support import cli
from support.merge import Rounding

PREDICTION = "modelspec.prediction_type"  # in a slider file: of the model that it changes


def without_weights(config: dict) -> UNet:
    """A UNet of names and shapes alone."""
    with torch.device("meta"):
        return UNet(config)


def unet_for(args) -> UNet:
    """--model's UNet. Without --model the miniature's or SDXL's, whichever the first file fits."""
    unet = without_weights(weights.find_weights(args.model, args.base).configs["unet"])
    if args.model == str(MINIATURE) and args.what in ("info", "convert", "merge"):
        try:
            with warnings.catch_warnings():  # as for what is left out
                warnings.simplefilter("ignore")
                slider_files.read(cli.file_and_scale(args.files[0])[0], unet)
        except ValueError as error:  # what else may be wrong is said when the file is used
            if "another model" in str(error):
                return without_weights(single_file.SDXL["unet"])
    return unet


def of_rank(A, B, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The A (rank, in), B (out, rank) whose product is nearest to B A (Eckart & Young 1936): by
    the SVD of B A, through the QR of each, so that nothing larger than R x R is decomposed. The
    singular values are shared evenly. A kernel counts as in."""
    Q_B, R_B = torch.linalg.qr(B.flatten(1).double())  # (out, R), (R, R)
    Q_A, R_A = torch.linalg.qr(A.flatten(1).double().T)  # (in, R), (R, R)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    return (root[:, None] * (Vh[:rank] @ Q_A.T)).float(), (Q_B @ U[:, :rank] * root).float()


def inner_product(a: dict[str, Delta], b: dict[str, Delta]) -> float:
    """Of two sliders' changes: sum over layers of <B_a A_a, B_b A_b> = tr(A_a^T B_a^T B_b A_b)."""
    total = 0.0
    for name in a.keys() & b.keys():
        A_a, B_a = (x.flatten(1) for x in concatenate([(a[name], 1.0)]))
        A_b, B_b = (x.flatten(1) for x in concatenate([(b[name], 1.0)]))
        total += ((B_a.T @ B_b) * (A_a @ A_b.T)).sum().item()
    return total


def block(name: str) -> str:
    """'lora_unet_down_blocks_1_attentions_0_...' -> 'down_blocks_1'."""
    words = name.removeprefix("lora_unet_").split("_")
    return "_".join(words[:3] if words[0] in ("down", "up") else words[:2])


def info(args, unet):
    files = [slider_files.read(path, unet) for path in args.files]
    for path, file in zip(args.files, files):
        deltas = file.deltas.values()
        ranks = sorted({len(delta.down) for delta in deltas})
        ratios = sorted({round(delta.alpha / len(delta.down), 4) for delta in deltas})
        convolutions = sum(delta.down.ndim == 4 for delta in deltas)
        print(
            f"{path}: {file.metadata.get('kind', 'LoRA')}, {file.naming} naming, "
            f"{len(deltas)} layers ({convolutions} convolutions), "
            f"rank {', '.join(map(str, ranks))}, alpha / rank {', '.join(map(str, ratios))}"
        )
        squares: dict[str, float] = {}
        for name, delta in file.deltas.items():
            one = {name: delta}
            squares[block(name)] = squares.get(block(name), 0.0) + inner_product(one, one)
        norms = ", ".join(f"{name} {square**0.5:.3g}" for name, square in sorted(squares.items()))
        print(f"  norm of the change, per block: {norms}")
        if "settings" in file.metadata:
            settings = slider_files.parse_json_object(file.metadata["settings"], path)
            given = [f"{k} {v}" for k, v in settings.items() if v not in (None, False, [])]
            print(f"  settings: {', '.join(given)}")
        if useful := slider_files.useful_range(file.metadata, path):
            print("  useful from scale {:+g} to {:+g}".format(*useful))
    for (path_a, a), (path_b, b) in itertools.combinations(zip(args.files, files), 2):
        squares_of_both = inner_product(a.deltas, a.deltas) * inner_product(b.deltas, b.deltas)
        dot = inner_product(a.deltas, b.deltas)
        cosine = dot / squares_of_both**0.5 if squares_of_both else 0.0
        print(f"{path_a} and {path_b}: cosine {cosine:.3f}")


def convert(args, unet):
    file = slider_files.read(args.files[0], unet)
    dtype = cli.DTYPES[args.store]
    slider_files.write(args.out, file.deltas, file.metadata, args.to, unet, dtype)
    print(f"{args.out}: written, {args.to} naming")


def weighted_files(args, unet) -> list[tuple[slider_files.SliderFile, float]]:
    """What each FILE[:WEIGHT] of the command line holds, and its weight."""
    given = map(cli.file_and_scale, args.files)
    return [(slider_files.read(path, unet), 1.0 if w is None else w) for path, w in given]


def prediction_of(files) -> str | None:
    """What the model predicts that the sliders change, as they say. ValueError where they differ:
    then they are of different models."""
    words = (file.metadata[PREDICTION] for file in files if PREDICTION in file.metadata)
    said = {schedule.PREDICTIONS.get(word, word) for word in words}  # "v_prediction" is "v"
    if len(said) > 1:
        found = " and ".join(sorted(said))
        remedy = "if they are of one model all the same, --prediction says which is right"
        raise ValueError(f"the files are of models that predict {found}; {remedy}")
    return said.pop() if said else None


def merge(args, unet):
    by_layer: dict[str, list] = {}
    files = weighted_files(args, unet)
    for file, weight in files:
        for name, delta in file.deltas.items():
            by_layer.setdefault(name, []).append((delta, weight))
    merged = {}
    for name, pairs in by_layer.items():
        A, B = concatenate(pairs)
        if args.rank and args.rank < len(A):
            A, B = of_rank(A, B, args.rank)
        first, _ = pairs[0]
        A, B = A.view(-1, *first.down.shape[1:]), B.view(*B.shape[:2], *first.up.shape[2:])
        merged[name] = Delta(A, B, float(len(A)))
    about = {"kind": "merged sliders", "of": [Path(file).name for file in args.files]}
    if prediction := args.prediction or prediction_of(file for file, _ in files):
        about[PREDICTION] = prediction
    slider_files.write(args.out, merged, about, args.to, unet, cli.DTYPES[args.store])
    print(f"{args.out}: written, rank {max(len(delta.down) for delta in merged.values())}")


def extract(args, unet):
    """For each layer the rank-r matrix nearest to W_tuned - W."""
    tuned_path = args.files[0]
    found = weights.find_weights(args.model, args.base)
    prediction = schedule.check(found.configs["scheduler"], args.prediction)["prediction_type"]
    base = found.locations["unet"]
    tuned = weights.find_weights(tuned_path, args.base).locations["unet"]
    layers = lora.target_layers(unet, args.layers)
    shapes = {f"{name}.weight": layer.weight.shape for name, layer in layers.items()}
    if missing := [name for name in shapes if name not in tuned]:
        raise ValueError(f"{tuned_path}: another kind of UNet: it has no {missing[0]}")
    read = lambda locations, names: weights.read_tensors(
        {name: locations[name] for name in names}, "cpu", torch.float32
    )
    deltas, lost, total = {}, 0.0, 0.0
    for chunk in read(tuned, shapes):
        before = {name: W for part in read(base, chunk) for name, W in part.items()}
        for name, W in chunk.items():
            if W.shape != shapes[name]:
                shape = f"{name} is {tuple(W.shape)}"
                raise ValueError(f"{tuned_path}: another kind of UNet: {shape}")
            change = (W - before[name]).flatten(1)  # (out, in * k * k)
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            root, squares = S[: args.rank].sqrt(), S.square()
            total += squares.sum().item()
            lost += squares[args.rank :].sum().item()
            A, B = root[:, None] * Vh[: args.rank], U[:, : args.rank] * root
            B = B.view(*B.shape, 1, 1) if W.ndim == 4 else B
            stem = slider_files.kohya_name(name.removesuffix(".weight"))
            deltas[stem] = Delta(A.view(-1, *W.shape[1:]), B, float(len(A)))
    about = {"kind": "extracted", "of": Path(tuned_path).name, PREDICTION: prediction}
    slider_files.write(args.out, deltas, about, args.to, unet, cli.DTYPES[args.store])
    share = 1 - lost / total if total else 1
    holds = f"rank {args.rank} holds {share:.1%} of the squared change of {len(deltas)} layers"
    print(f"{args.out}: written; {holds}")


def bake(args, unet):
    """Copy --model with the changes added to the UNet's weights: in float32, all changes of a
    layer at once, rounded to the dtype that it has, or to --store."""
    source, out = Path(args.model), Path(args.out)
    if not source.exists():
        source = weights.from_hub(args.model)
    if out.exists():
        raise ValueError(f"{out}: is there already: name another place")
    known = slider_files.layers_by_kohya_name(unet)
    changes: dict[str, list] = {}
    for file, weight in weighted_files(args, unet):
        for stem, delta in file.deltas.items():
            changes.setdefault(f"{known[stem][0]}.weight", []).append((delta, weight))
    unfinished = out.with_name(out.name + ".tmp")  # renamed once it is whole
    if unfinished.exists():
        raise ValueError(f"{unfinished}: in the way, maybe of a run that was stopped: delete it")
    if source.is_dir():
        shutil.copytree(source, unfinished, ignore=ignore_unet_weights)
    names_of: dict[Path, dict[str, str]] = {}  # file -> {name there: released name}
    locations = weights.find_weights(source, args.base).locations["unet"]
    for name, (file, there, _) in locations.items():
        names_of.setdefault(file, {})[there] = name
    rounding, store = Rounding(), cli.DTYPES.get(args.store)
    for file, names in names_of.items():
        with safe_open(file, "pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
        for there, name in names.items():
            W = tensors[there]
            dtype = store or W.dtype
            if name in changes:
                change = delta_weight(*concatenate(changes[name]))
                tensors[there] = rounding.add(W, change, dtype)
                stored = str(dtype).removeprefix("torch.")
            elif W.is_floating_point():
                tensors[there] = W.to(dtype)
        target = unfinished / "unet" / file.name if source.is_dir() else out
        slider_files.save_tensors(target, tensors, metadata)
    if source.is_dir():
        unfinished.rename(out)
    print(f"{out}: written, {len(changes)} layers changed")
    if warning := rounding.warning(stored, "--store"):
        print(f"WARNING: {warning}")


def ignore_unet_weights(folder, names: list[str]) -> list[str]:
    """For copytree: they are written anew."""
    return [n for n in names if Path(folder).name == "unet" and n.endswith(".safetensors")]


def main():
    p = cli.model_parser(__doc__)
    p.add_argument("what", choices=["info", "convert", "merge", "extract", "bake"])
    files = "slider files (extract: a model)"
    p.add_argument("files", nargs="+", metavar="FILE[:WEIGHT]", help=files)
    p.add_argument("--out", help="file to write (bake: what --model is, a folder or a file)")
    overwrite = "replace --out if it is there (bake never does)"
    p.add_argument("--overwrite", action="store_true", help=overwrite)
    to = "naming (convert, merge, extract; default: %(default)s)"
    p.add_argument("--to", choices=slider_files.NAMINGS, default="kohya", help=to)
    rank = "merge, extract: rank of the result (extract: 16; merge: all there is)"
    p.add_argument("--rank", type=int, help=rank)
    layers = "extract: which layers (default: %(default)s)"
    p.add_argument("--layers", choices=lora.LAYERS, default="all", help=layers)
    store = "dtype in the file (default: float16; bake: what --model has)"
    p.add_argument("--store", choices=cli.DTYPES, help=store)
    args = p.parse_args()
    if args.merge:
        raise ValueError("--merge is for training and drawing; here, bake does it")
    if args.dtype:
        raise ValueError("--dtype is for training and drawing; here, --store names the file's")
    if args.what != "info" and not args.out:
        raise ValueError("--out is needed: the file to write")
    if args.what in ("convert", "merge", "extract"):
        args.store = args.store or "float16"
        if cli.output_file(args.out, ".safetensors").exists() and not args.overwrite:
            raise ValueError(f"{args.out}: is there already: --overwrite replaces it")
    if args.what in ("convert", "extract") and len(args.files) > 1:
        raise ValueError(f"{args.what} takes one file, not {len(args.files)}")
    if args.rank is not None and args.rank < 1:
        raise ValueError(f"--rank must be at least 1, not {args.rank}")
    args.rank = args.rank or (16 if args.what == "extract" else None)
    do = {"info": info, "convert": convert, "merge": merge, "extract": extract, "bake": bake}
    if args.strict:
        warnings.simplefilter("error", slider_files.LeftOut)
    with torch.no_grad():
        do[args.what](args, unet_for(args))


if __name__ == "__main__":
    cli.run(main)
