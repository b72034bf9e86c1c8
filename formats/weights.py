"""Find a model's weights, in whichever form SDXL comes, and load them into its modules.

Three forms: a folder as released (fp32 or `fp16` files, whole or in shards), one .safetensors file
in the original naming (single_file.py), a Hub id. `find_weights` turns each into the same thing, a
table of where every tensor is; `load_module` and `load_text_encoder` read tensor by tensor from
there. Nothing is unpickled, and nothing but a Hub id reaches the network."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from formats import first_line, schedule, single_file

PARTS = ["unet", "vae", "text_encoder", "text_encoder_2"]
SDXL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
# Some released VAEs'.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class ModelFiles:
    """A model on disk."""

    configs: dict[str, dict]  # of each of PARTS, "scheduler" and "model_index"
    # part -> released name -> (file, name there, what to do to the tensor)
    locations: dict[str, dict[str, tuple[Path, str, str]]]
    tokenizers: list[Path]  # two folders, or twice one; none where a single file has none
    folder: Path | None = None  # None for a single file
    name: str = ""  # for messages

    def tensors(self, part: str) -> dict[str, tuple[Path, str, str]]:
        """Where the tensors of a part are. ValueError if it has none."""
        if part not in self.locations:
            remedy = "--base names an SDXL folder or Hub id that lends it"
            raise ValueError(f"{self.name}: holds no {part}: {remedy}")
        return self.locations[part]

    def known_words(self) -> set[str] | None:
        """The words that the model was trained on, if it lists them (released SDXL does not)."""
        path = self.tokenizers[0] / "known_words.txt"
        return set(path.read_text().split()) if path.exists() else None


def find_weights(path_or_id, base=None, half: bool = False) -> ModelFiles:
    """A folder or file as it is; otherwise a Hub id, downloaded into huggingface_hub's cache.

    base: the SDXL folder or Hub id that a single file takes its tokenizers from, and the parts that
    it lacks. half: the weights are needed in a half precision. Raises ValueError, one line."""
    path = Path(path_or_id)
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        return from_single_file(path, base, half)
    return from_folder(from_hub(path_or_id, half=half))


# ------------------------------------------------------------------------------------------ the Hub


def from_hub(name, parts=tuple(PARTS), half: bool = False) -> Path:
    """The local copy of Hub model "owner/name", downloaded if need be: its configs and tokenizers,
    and the weights of `parts`, in one precision (needed_files). Where the Hub cannot be reached,
    what is in the cache. ValueError if it is not to be had."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise ValueError(f"{name}: no such model folder or file")
    # Only now: nothing else may reach the network.
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        try:
            files = list_repo_files(str(name))
        except RepositoryNotFoundError:
            raise
        except Exception:  # no network
            return Path(snapshot_download(str(name), local_files_only=True))
        needed = needed_files(files, parts, half)
        return Path(snapshot_download(str(name), allow_patterns=needed))
    except Exception as error:
        what = "no such folder or file, and not to be had from the Hub"
        raise ValueError(f"{name}: {what} ({first_line(error)})") from None


def needed_files(files: list[str], parts=tuple(PARTS), half: bool = False) -> list[str]:
    """Of a Hub repository's `files` those that are read: configs, tokenizers, and the weights of
    `parts`: of each part the fp16 files where there are some and `half` is needed, else the plain
    ones, else what there is."""
    small = r"model_index\.json|scheduler/scheduler_config\.json|tokenizer(_2)?/[^/]+\.(json|txt)"
    small += rf"|({'|'.join(PARTS)})/config\.json"
    needed = [file for file in files if re.fullmatch(small, file)]
    for part in parts:
        of = {}
        for variant in ("", ".fp16"):
            weights = rf"{part}/{stem_of(part)}{re.escape(variant)}(-\d+-of-\d+)?\.safetensors"
            weights += rf"|{part}/{stem_of(part)}\.safetensors\.index{re.escape(variant)}\.json"
            of[variant] = [file for file in files if re.fullmatch(weights, file)]
        first, second = (".fp16", "") if half else ("", ".fp16")
        needed += of[first] or of[second]
    return needed


def stem_of(part: str) -> str:
    """The name of a part's files of weights, without variant and ending."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


# ----------------------------------------------------------------------------------- an SDXL folder


def from_folder(root: Path) -> ModelFiles:
    if not (root / "model_index.json").exists():
        raise ValueError(f"{root}: not an SDXL folder: it has no model_index.json")
    index = read_json(root / "model_index.json")
    kind, encoder = index.get("_class_name", "model"), index.get("text_encoder", "")
    if "Refiner" in str(kind) or encoder in (None, [None, None]):
        remedy = "sliders need the base model"
        raise ValueError(f"{root}: the SDXL refiner, which has one text encoder; {remedy}")
    if "text_encoder_2" not in index:
        lacks = "without a second text encoder; only SDXL is supported"
        raise ValueError(f"{root}: holds a {kind} {lacks}")
    configs = {part: read_json(root / part / "config.json") for part in PARTS}
    refuse_pruned(root, configs["unet"])
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")
    configs |= {"model_index": index, "scheduler": scheduler}
    locations = {part: locate_tensors(root, part) for part in PARTS}
    tokenizers = [root / "tokenizer", root / "tokenizer_2"]
    return ModelFiles(configs, locations, tokenizers, root, str(root))


def refuse_pruned(root: Path, unet: dict):
    """ValueError for an SDXL from whose UNet blocks were taken, as Segmind's SSD-1B and Vega."""
    depths = unet.get("transformer_layers_per_block")
    uneven = isinstance(depths, list) and any(isinstance(depth, list) for depth in depths)
    no_attention = unet.get("mid_block_type", "") in (None, "UNetMidBlock2D")
    if uneven or no_attention or unet.get("reverse_transformer_layers_per_block"):
        only = "only whole ones are supported"
        raise ValueError(f"{root}: a pruned SDXL, as Segmind's SSD-1B and Vega are; {only}")


def locate_tensors(root: Path, part: str) -> dict[str, tuple[Path, str, str]]:
    """Where each tensor of one part of a folder is."""
    out = {}
    for file in weight_files(root / part):
        for name, shape in read_header(file).items():
            # Older VAEs' attention is made of 1x1 convolutions.
            convolution = part == "vae" and ".attentions." in name and len(shape) == 4
            if not name.endswith("position_ids"):
                out[released(part, name)] = (file, name, "squeeze" if convolution else "")
    return out


def released(part: str, name: str) -> str:
    """The name that a released folder of today gives a tensor: some older VAEs', and transformers
    5's, are others."""
    if part == "vae":
        old = r"(attentions\.0)\.(query|key|value|proj_attn)\b"
        return re.sub(old, lambda m: f"{m[1]}.{OLD_VAE_ATTENTION[m[2]]}", name)
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection.")):
        return "text_model." + name
    return name


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of one part: the whole or its shards, plain or fp16, the plain ones
    first."""
    stem = stem_of(folder.name)
    for variant in ("", ".fp16"):
        whole = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if whole.exists():
            return [whole]
        if index.exists():
            weight_map = dict(read_json(index).get("weight_map", {}))
            names = sorted({str(name) for name in weight_map.values()})
            odd = [name for name in names if Path(name).name != name]
            if odd or not names:
                which = f": {odd[0]!r}" if odd else ""
                raise ValueError(f"{index}: names no files beside it{which}")
            return [folder / name for name in names]
    pickled = next((f.name for f in folder.glob("*.bin")), None)
    if pickled:
        only = "only .safetensors files are read"
        raise ValueError(f"{folder}: has only {pickled}, a pickle; {only}")
    raise ValueError(f"{folder / stem}.safetensors: missing from the model folder")


def is_out_of_memory(error) -> bool:
    """Whether memory ran out: on a CPU and MPS only the message tells."""
    says = ("allocate memory", "out of memory", "ALLOC_FAILED")  # the last of cuBLAS and cuDNN
    return isinstance(error, MemoryError) or any(words in str(error) for words in says)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing from the model folder") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_header(file: Path) -> dict[str, tuple]:
    """{name: shape} of a .safetensors file; reads its header alone."""
    try:
        with safe_open(file, "pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {describe_file(file)} ({first_line(error)})") from None


def describe_file(file: Path) -> str:
    with open(file, "rb") as f:
        start = f.read(4)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        pickle = "a pickle (.ckpt, .pt, .bin), which can run code when it is read"
        return f"{pickle}; only .safetensors files are read"
    return "not a readable .safetensors file: cut short, or something else"


# ----------------------------------------------------------------------------------------- one file


def from_single_file(path: Path, base=None, half: bool = False) -> ModelFiles:
    """A checkpoint in one file holds no tokenizers, and of its noise schedule at most marks
    (schedule.of_single_file): those come from `base`; without it from the file's own folder, then
    from what huggingface_hub has cached before. A VAE or text encoders that it lacks are those of
    `base`."""
    shapes = read_header(path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
    kind = single_file.identify(shapes)
    if kind != "sdxl":
        raise ValueError(f"{path}: {kind}")
    missing = single_file.missing_parts(shapes)
    root = base_folder(path, base, missing if base else [], half)

    def config_of(part, *file):
        """What the base folder says of a part; without one, what SDXL 1.0's does."""
        path = root and root.joinpath(*file)
        return read_json(path) if path and path.exists() else single_file.SDXL[part]

    try:
        renamed = single_file.rename(shapes)
        bases = {part: config_of(part, part, "config.json") for part in PARTS}
        configs = single_file.configs(shapes, bases)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: an incomplete SDXL checkpoint: it lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    configs["model_index"] = config_of("model_index", "model_index.json")
    base_schedule = config_of("scheduler", "scheduler", "scheduler_config.json")
    configs["scheduler"] = base_schedule | schedule.of_single_file(shapes, metadata)
    locations = {
        part: {new: (path, old, action) for new, old, action in entries}
        for part, entries in renamed.items()
    }
    for part in missing:
        del locations[part]
        if base and root and (root / part / "config.json").exists():
            locations[part] = locate_tensors(root, part)
    if root:
        tokenizers = [root / "tokenizer", root / "tokenizer_2"]
    else:
        tokenizers = cached_tokenizers(configs["text_encoder"]["vocab_size"])
    return ModelFiles(configs, locations, tokenizers, name=str(path))


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("vocab.json", "tokenizer.json"))


def base_folder(path: Path, base, parts, half: bool) -> Path | None:
    """The folder that has both tokenizers for a single file, and the weights of `parts`; None if
    there is none and none was named."""
    has = lambda root: all(has_tokenizer(root / name) for name in ("tokenizer", "tokenizer_2"))
    if base:
        root = Path(base) if Path(base).is_dir() else from_hub(base, parts, half)
        if not has(root):
            raise ValueError(f"{base}: has no tokenizer/ and tokenizer_2/ to use with {path.name}")
        return root
    return path.parent if has(path.parent) else None


def cached_tokenizers(vocabulary: int) -> list[Path]:
    """Two folders of CLIP's tokenizer, with so many tokens, in huggingface_hub's cache: SDXL's two,
    or one of another model that has it, twice. [] if there are none; the network is not used."""
    from huggingface_hub.constants import HF_HUB_CACHE

    alone: list[Path] = []
    for root in sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*")):
        found = [root / name for name in ("tokenizer", "tokenizer_2", ".")]
        found = [folder for folder in found if tokens_of(folder) == vocabulary]
        if len(found) > 1:
            return found[:2]
        alone = alone or 2 * found
    return alone


def tokens_of(folder: Path) -> int:
    """How many tokens CLIP's tokenizer in `folder` has; 0 for another kind's, or none."""
    files = (folder / "vocab.json", folder / "merges.txt")
    return len(read_json(files[0])) if all(file.exists() for file in files) else 0


# ----------------------------------------------------------------------------------------- loading


def read_tensors(locations: dict, device, dtype, chunk: int = 2**28):
    """Yield {released name: tensor} some `chunk` bytes at a time, each tensor on `device` in
    `dtype`.

    The file is mapped, not read: a tensor that is already as it is needed stays a view of the
    mapping, and costs no memory of its own; one that is converted is copied, and its chunk's
    mapping closed before the next is opened."""
    rest = sorted(locations.items(), key=lambda item: (str(item[1][0]), item[1][1]))
    while rest:
        file, part, size = rest[0][1][0], {}, 0
        with safe_open(file, "pt") as f:
            while rest and rest[0][1][0] == file and size < chunk:
                name, (_, old, action) = rest.pop(0)
                tensor = single_file.transform(f.get_tensor(old), action)
                part[name] = tensor.to(device, dtype)
                size += tensor.nbytes
                del tensor
        yield part


ODD_CONFIG = "its config.json (of a single file without --base, SDXL's own) is missing or odd"

READ_LATER = {"unet": ("sample_size", "addition_time_embed_dim"), "vae": ("scaling_factor",)}


def load_module(kind, config: dict, locations: dict, device, dtype, part: str):
    """Build kind(config) without memory, then fill it. Raises ValueError unless names and shapes
    fit exactly."""
    try:
        for name in READ_LATER.get(part, ()):  # not while it is built
            if not config[name] > 0:
                raise ValueError(f"{name} is {config[name]}")
        with torch.device("meta"):
            module = kind(config)
    except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{part}: {ODD_CONFIG}: {error}") from None
    check_names(module.state_dict(), locations, part)
    try:
        for chunk in read_tensors(locations, device, dtype):
            module.load_state_dict(chunk, strict=False, assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{part}: the weights do not fit config.json: {reason}") from None
    return module.eval().requires_grad_(False)


def load_text_encoder(kind, config: dict, locations: dict, device, dtype, part: str):
    """The same for transformers' `kind`, by its own loading: its names for the parameters change
    with its version."""
    not_settings = ("architectures", "transformers_version", "dtype", "torch_dtype")
    settings = {k: v for k, v in config.items() if k not in not_settings}
    try:
        settings = kind.config_class(**settings)
    except Exception as error:  # its checks of a damaged config raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{part}: {ODD_CONFIG}: {reason}") from None
    tensors = {k: v for chunk in read_tensors(locations, "cpu", dtype) for k, v in chunk.items()}
    options = dict(state_dict=tensors, dtype=dtype, output_loading_info=True)
    wrong = f"{part}: the weights do not fit config.json"
    try:
        module, info = kind.from_pretrained(None, config=settings, **options)
    except Exception as error:  # a config that its checks let pass can still raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(f"{wrong}: {reason}") from None
    names = [name for name in info["missing_keys"] if not name.endswith("position_ids")]
    names += [*info["unexpected_keys"], *info["mismatched_keys"]]
    if names:
        raise ValueError(f"{wrong}: {names[0]}")
    return module.to(device).eval().requires_grad_(False)


def check_names(expected, locations: dict, part: str):
    missing, extra = expected.keys() - locations.keys(), locations.keys() - expected.keys()
    kinds = ((missing, "missing"), (extra, "too many"))
    found = [f"{len(names)} {kind}, such as {min(names)}" for names, kind in kinds if names]
    if found:
        raise ValueError(f"{part}: the weights do not fit config.json: {'; '.join(found)}")


def load_tokenizers(path_or_id, files: ModelFiles) -> list:
    """Both tokenizers, transformers'. ValueError if there are none, or they are damaged."""
    from transformers import CLIPTokenizer

    if not files.tokenizers:
        remedy = f"name an SDXL folder, or {SDXL_ID}, with --base"
        raise ValueError(f"{path_or_id}: one file holds no tokenizers: {remedy}")
    try:
        load = lambda folder: CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        both = [load(folder) for folder in files.tokenizers]
        if files.tokenizers[0] == files.tokenizers[1]:  # another model's, lent
            both[1].pad_token = "!"  # as SDXL's second one has it
        for tokenizer in both:  # without a tokenizer_config.json it knows no end
            tokenizer.model_max_length = min(tokenizer.model_max_length, 77)
        return both
    except Exception as error:  # of a damaged one the tokenizers library raises Exception itself
        where = files.tokenizers[0].parent
        raise ValueError(f"{where}: the tokenizers cannot be read: {first_line(error)}") from None
