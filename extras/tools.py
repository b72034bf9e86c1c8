"""Look at slider files, and do arithmetic on them.

python tools.py info age.safetensors smile.safetensors        what they are; how alike they are
python tools.py convert age.safetensors --to peft --out age_peft.safetensors
python tools.py merge age.safetensors:1.5 smile.safetensors --out both.safetensors    (--rank 8: the nearest of that rank)
python tools.py extract tuned.safetensors --rank 16 --out tuned_lora.safetensors      what a fine-tune changed in --model
python tools.py bake age.safetensors:1.5 --out older_model                            --model with the sliders in its weights
"""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open

import lora
from formats import single_file, slider_files, weights
from formats.slider_files import Delta, concatenate, delta_weight
from sdxl import MINIATURE
from sdxl_unet import UNet
from support import cli


def bare(config: dict) -> UNet:
    """A UNet without its weights: names and shapes."""
    with torch.device("meta"):
        return UNet(config)


def unet_for(args) -> UNet:
    """--model's UNet; without --model the miniature's or SDXL's, whichever the first of the slider files fits."""
    unet = bare(weights.find_weights(args.model, args.base).configs["unet"])
    if args.model == str(MINIATURE) and args.what in ("info", "convert", "merge"):
        try:
            slider_files.read(cli.file_and_scale(args.files[0])[0], unet)
        except ValueError as error:  # what else may be wrong is said when the file is used
            if "another model" in str(error):
                return bare(single_file.SDXL["unet"])
    return unet


def of_rank(A, B, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The A (rank, in), B (out, rank) whose product is nearest to B A (Eckart & Young 1936), by the SVD of B A; through the QR
    of each, so that nothing larger than R x R is decomposed. The singular values are shared evenly. A kernel counts as in."""
    Q_B, R_B = torch.linalg.qr(B.flatten(1).double())  # (out, R), (R, R)
    Q_A, R_A = torch.linalg.qr(A.flatten(1).double().T)  # (in, R), (R, R)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    return (root[:, None] * (Vh[:rank] @ Q_A.T)).float(), (Q_B @ U[:, :rank] * root).float()


def inner(a: dict[str, Delta], b: dict[str, Delta]) -> float:
    """The inner product of two sliders' changes, sum over layers of <B_a A_a, B_b A_b> = tr(A_a^T B_a^T B_b A_b)."""
    total = 0.0
    for name in a.keys() & b.keys():
        (A1, B1), (A2, B2) = (
            (x.flatten(1) for x in concatenate([(slider[name], 1.0)])) for slider in (a, b)
        )
        total += ((B1.T @ B2) * (A1 @ A2.T)).sum().item()
    return total


def block(name: str) -> str:
    """'lora_unet_down_blocks_1_attentions_0_...' -> 'down_blocks_1'."""
    words = name.removeprefix("lora_unet_").split("_")
    return "_".join(words[:3] if words[0] in ("down", "up") else words[:2])


def info(args, unet):
    files = [slider_files.read(path, unet) for path in args.files]
    for path, file in zip(args.files, files):
        ranks = sorted({len(p.down) for p in file.parts.values()})
        factors = sorted({round(p.alpha / len(p.down), 4) for p in file.parts.values()})
        convolutions = sum(p.down.ndim == 4 for p in file.parts.values())
        print(
            f"{path}: {file.metadata.get('kind', 'LoRA')}, {file.naming} naming, {len(file.parts)} layers ({convolutions} convolutions), "
            f"rank {', '.join(map(str, ranks))}, alpha / rank {', '.join(map(str, factors))}"
        )
        norms = {}
        for name, part in file.parts.items():
            norms[block(name)] = norms.get(block(name), 0.0) + inner({name: part}, {name: part})
        print(
            "  norm of the change, per block: "
            + ", ".join(f"{b} {n**0.5:.3g}" for b, n in sorted(norms.items()))
        )
        if "settings" in file.metadata:
            settings = slider_files.parse_json_object(file.metadata["settings"], path)
            print(
                "  settings: "
                + ", ".join(
                    f"{k} {v}"
                    for k, v in settings.items()
                    if v is not None and v is not False and v != []
                )
            )
        if useful := slider_files.useful_range(file.metadata, path):
            print("  useful from scale {:+g} to {:+g}".format(*useful))
    for i, (path, file) in enumerate(zip(args.files, files)):
        for other, another in list(zip(args.files, files))[i + 1 :]:
            lengths = (inner(file.parts, file.parts) * inner(another.parts, another.parts)) ** 0.5
            print(
                f"{path} and {other}: cosine {inner(file.parts, another.parts) / lengths if lengths else 0:.3f}"
            )


def convert(args, unet):
    file = slider_files.read(args.files[0], unet)
    slider_files.write(args.out, file.parts, file.metadata, args.to, unet, cli.DTYPES[args.store])
    print(f"{args.out}: written, {args.to} naming")


def merge(args, unet):
    read_in = [
        (slider_files.read(path, unet), 1.0 if w is None else w)
        for path, w in map(cli.file_and_scale, args.files)
    ]
    parts = {}
    for name in dict.fromkeys(name for file, _ in read_in for name in file.parts):
        here = [(file.parts[name], w) for file, w in read_in if name in file.parts]
        A, B = concatenate(here)
        if args.rank and args.rank < len(A):
            A, B = of_rank(A, B, args.rank)
        down, up = here[0][0].down, here[0][0].up
        parts[name] = Delta(
            A.view(-1, *down.shape[1:]), B.view(*B.shape[:2], *up.shape[2:]), float(len(A))
        )
    slider_files.write(
        args.out, parts, {"kind": "merged sliders", "of": args.files}, dtype=cli.DTYPES[args.store]
    )
    print(f"{args.out}: written, rank {max(len(p.down) for p in parts.values())}")


def extract(args, unet):
    """For each layer the rank-r matrix nearest to W_tuned - W."""
    base, tuned = (
        weights.find_weights(model, args.base).where["unet"]
        for model in (args.model, args.files[0])
    )
    layers = {
        f"{name}.weight": m.weight.shape
        for name, m in lora.target_layers(unet, args.layers).items()
    }
    missing = [name for name in layers if name not in tuned]
    if missing:
        raise ValueError(f"{args.files[0]}: another kind of UNet: it has no {missing[0]}")
    only = lambda where, names: {name: where[name] for name in names}
    parts, left, whole = {}, 0.0, 0.0
    for some in weights.read_tensors(only(tuned, layers), "cpu", torch.float32):
        before = {
            name: t
            for part in weights.read_tensors(only(base, some), "cpu", torch.float32)
            for name, t in part.items()
        }
        for name, W in some.items():
            if W.shape != layers[name]:
                raise ValueError(
                    f"{args.files[0]}: another kind of UNet: {name} is {tuple(W.shape)}"
                )
            change = (W - before[name]).flatten(1)  # (out, in * k * k)
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            root = S[: args.rank].sqrt()
            whole, left = (
                whole + S.square().sum().item(),
                left + S[args.rank :].square().sum().item(),
            )
            A, B = root[:, None] * Vh[: args.rank], U[:, : args.rank] * root
            up = B.view(*B.shape, 1, 1) if W.ndim == 4 else B
            parts[slider_files.kohya_name(name.removesuffix(".weight"))] = Delta(
                A.view(-1, *W.shape[1:]), up, float(len(A))
            )
    slider_files.write(
        args.out, parts, {"kind": "extracted", "of": args.files[0]}, dtype=cli.DTYPES[args.store]
    )
    print(
        f"{args.out}: written; rank {args.rank} holds {1 - left / whole if whole else 1:.1%} of the squared change of {len(parts)} layers"
    )


def bake(args, unet):
    """Copy --model with the changes added to the UNet's weights, in the form and the dtype that it has."""
    source, out = Path(args.model), Path(args.out)
    if not source.exists():
        source = weights.from_hub(args.model)
    if out.exists():
        raise ValueError(f"{out}: is there already")
    known, change = slider_files.layers_by_kohya_name(unet), {}
    for path, w in map(cli.file_and_scale, args.files):
        for name, part in slider_files.read(path, unet).parts.items():
            layer = known[name][0] + ".weight"
            change.setdefault(layer, []).append((part, 1.0 if w is None else w))
    whole = out.with_name(out.name + ".tmp")  # renamed once it is whole
    if source.is_dir():
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(
            source,
            whole,
            ignore=lambda folder, names: [
                n for n in names if Path(folder).name == "unet" and n.endswith(".safetensors")
            ],
        )
    by_file = {}
    for new, (file, old, _) in weights.find_weights(args.model, args.base).where["unet"].items():
        by_file.setdefault(file, {})[old] = new
    for file, released in by_file.items():
        with safe_open(file, "pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
        for old, new in released.items():
            if new in change:
                tensors[old] = (
                    tensors[old].float()
                    + delta_weight(*concatenate(change[new])).view(tensors[old].shape)
                ).to(tensors[old].dtype)
        slider_files.save_tensors(
            whole / "unet" / file.name if source.is_dir() else out, tensors, metadata
        )
    if source.is_dir():
        whole.rename(out)
    print(f"{out}: written, {len(change)} layers changed")


def main():
    p = cli.model_parser(__doc__)
    p.add_argument("what", choices=["info", "convert", "merge", "extract", "bake"])
    p.add_argument(
        "files", nargs="+", metavar="FILE[:WEIGHT]", help="slider files (extract: a model)"
    )
    p.add_argument("--out", help="file to write (bake: what --model is, a folder or a file)")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    p.add_argument(
        "--to",
        choices=slider_files.NAMINGS,
        default="kohya",
        help="convert: naming (default: %(default)s)",
    )
    p.add_argument(
        "--rank",
        type=int,
        help="merge, extract: rank of the result (extract: 16; merge: all there is)",
    )
    p.add_argument(
        "--layers",
        choices=lora.LAYERS,
        default="all",
        help="extract: which layers (default: %(default)s)",
    )
    p.add_argument(
        "--store",
        choices=cli.DTYPES,
        default="float16",
        help="dtype in the file (default: %(default)s)",
    )
    args = p.parse_args()
    if args.merge:
        raise ValueError("--merge is for training and drawing; here, bake does it")
    if args.what != "info":
        if not args.out:
            raise ValueError("--out is needed: the file to write")
        if args.what != "bake":
            if cli.output_file(args.out, ".safetensors").exists() and not args.overwrite:
                raise ValueError(f"{args.out}: is there already: --overwrite replaces it")
    if args.what in ("convert", "extract") and len(args.files) > 1:
        raise ValueError(f"{args.what} takes one file, not {len(args.files)}")
    if args.rank is not None and args.rank < 1:
        raise ValueError(f"--rank must be at least 1, not {args.rank}")
    args.rank = args.rank or (16 if args.what == "extract" else None)
    do = {"info": info, "convert": convert, "merge": merge, "extract": extract, "bake": bake}[
        args.what
    ]
    with torch.no_grad():
        do(args, unet_for(args))


if __name__ == "__main__":
    cli.run(main)
