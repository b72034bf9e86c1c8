"""LoRA files of every common naming, in and out: names and tensors only; lora.py makes sliders of
them.

A LoRA file holds, for each layer it changes, A ("down", (r, in)), B ("up", (out, r)) and perhaps
alpha; without it, alpha is r. What differs is how a layer is called. For the to_q of a
self-attention:

    kohya   lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
    ldm     lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight
    peft    unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight

We write the first; the second is kohya's own trainer's for SDXL, the third diffusers'.
docs/files.md says which program reads which.
"""

import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from formats import first_line, hashes, single_file, weights, write_atomically

NAMINGS = ("kohya", "ldm", "peft")
ENDINGS = {  # of a tensor's name; peft's may hold the name of an adapter
    r"\.(lora_down|lora\.down|lora_linear_layer\.down|lora_A(\..+)?)\.weight": "down",
    r"\.(lora_up|lora\.up|lora_linear_layer\.up|lora_B(\..+)?)\.weight": "up",
    r"\.lora_mid\.weight": "mid",
    r"\.alpha": "alpha",
}
OTHER_KINDS = {  # what their tensors' names contain
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_t2": "LoHa",
    "oft_": "OFT",
    "on_input": "IA3",
    "ia3_": "IA3",
    "glora": "GLoRA",
    r"\.diff$": "whole weights",
}
# What other trainers keep beside a LoRA, in the same file: OneTrainer's and A1111's embeddings,
# peft's of the token table; what LyCORIS and ComfyUI add to norms and biases.
EMBEDDING = re.compile(
    r"bundle_emb\.|(clip_[lg]|emb_params)$|.*(\.string_to_param\.|\.lora_embedding_[AB]|"
    r"text_model[._]embeddings[._])"
)
NORM_OR_BIAS = re.compile(r".*\.(w_norm|b_norm|diff_b)$")
ADAPTER = "lora_adapter_metadata"  # diffusers' name for peft's settings
# Ways of peft's to start a LoRA that change the base weights: A and B alone mean nothing then.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What the names of this UNet's kind of layers begin with, whatever the naming.
UNET_NAME = re.compile(
    r"lora_unet_|unet\.((down|up)_blocks|mid_block|(input|output)_blocks|middle_block|conv_|"
    r"time_embed|add_embedding|label_emb|out\.)"
)
# What programs put before the names of layers: peft, DDP, torch.compile, diffusers, ComfyUI.
WRAPPERS = re.compile(r"^((base_model|model|module|_orig_mod|unet|diffusion_model)\.)+")
TEXT_ENCODER = re.compile(  # the first one or the second
    r"((lora_te1?_|te1?\.|text_encoder\.|clip_l\.)|lora_te2_|te2\.|text_encoder_2\.|clip_g\.)"
    r"(transformer\.)?(text_model[._])?"
)
LARGEST = 4 * 2**30  # bytes: no LoRA is larger, and a pickle of that size is not read


class LeftOut(UserWarning, ValueError):
    """A file holds more than is applied: a warning, or with --strict an error."""


Layer = nn.Linear | nn.Conv2d  # what a slider can change


@dataclass
class Delta:
    """The change of one layer, (alpha / r) B A: A (r, in) or (r, in, k, k), B (out, r) or
    (out, r, 1, 1)."""

    down: torch.Tensor  # A
    up: torch.Tensor  # B
    alpha: float


def concatenate(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """[(Delta, weight)] of one layer -> A (R, in) or (R, in, k, k), B (out, R) or (out, R, 1, 1) of
    their weighted sum, R = r_1 + r_2 + ... Exact: the A's stacked, and the B's side by side, each
    times its weight * alpha / r."""
    A = [delta.down for delta, _ in pairs]
    B = [weight * (delta.alpha / len(delta.down)) * delta.up for delta, weight in pairs]
    return torch.cat(A), torch.cat(B, 1)


def delta_weight(A, B) -> torch.Tensor:
    """B A in the shape of the layer's weight, float32: (out, in) or (out, in, k, k)."""
    return (B.flatten(1).float() @ A.flatten(1).float()).view(len(B), *A.shape[1:])


@dataclass
class SliderFile:
    deltas: dict[str, Delta]  # by the layer's name in kohya's naming
    naming: str
    metadata: dict[str, str]


# ---------------------------------------------------------------------------------------- names


def kohya_name(layer: str) -> str:
    """'down_blocks.1.attentions.0...to_q' -> 'lora_unet_down_blocks_1_attentions_0_..._to_q',
    kohya's naming."""
    return "lora_unet_" + layer.replace(".", "_")


def layers_by_kohya_name(unet: nn.Module) -> dict[str, tuple[str, Layer]]:
    """{kohya name: (name in the UNet, layer)} of every layer that a slider could change."""
    return {kohya_name(name): (name, m) for name, m in unet.named_modules() if isinstance(m, Layer)}


def text_layers(text_encoders) -> dict[str, tuple[str, Layer]]:
    """{"lora_te1_encoder_layers_0_...": (its name, layer)} of the layers of both text encoders.

    kohya's names without the text_model in them: transformers 5 has none in the first encoder, and
    one in the second."""
    names = {
        (i, name.removeprefix("text_model.")): module
        for i, encoder in enumerate(text_encoders, 1)
        for name, module in encoder.named_modules()
        if isinstance(module, Layer)
    }
    return {
        f"lora_te{i}_{name.replace('.', '_')}": (f"text_model.{name}", module)
        for (i, name), module in names.items()
    }


def layer_names(unet) -> dict[str, dict[str, str]]:
    """{naming: {kohya name: name in that naming}} of the same layers; "dotted", the original names
    as they are, is only read."""
    layers = {stem: name for stem, (name, _) in layers_by_kohya_name(unet).items()}
    per_level = unet.config["layers_per_block"] + 1
    original = single_file.original_names(list(layers.values()), per_level)
    return {
        "kohya": {stem: stem for stem in layers},
        "ldm": {stem: kohya_name(original[name]) for stem, name in layers.items()},
        "peft": {stem: f"unet.{name}" for stem, name in layers.items()},
        "dotted": {stem: f"unet.{original[name]}" for stem, name in layers.items()},
    }


def split_name(name: str) -> tuple[str, str] | None:
    """'...to_q.lora_down.weight' -> ('...to_q', 'down'); None for no LoRA's name. Whatever stands
    before a layer's name becomes "unet.", and of text encoders' names kohya's (text_layers)."""
    # diffusers before peft.
    if old := re.match(r"(.*)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$", name):
        layer = "out.0" if old[2] == "out" else old[2]
        name = f"{old[1]}.to_{layer}.lora.{old[3]}.weight"
    if old := re.match(r"(.*\.self_attn)\.to_(q|k|v|out)_lora\.(down|up)\.weight$", name):
        name = f"{old[1]}.{old[2]}_proj.lora.{old[3]}.weight"
    if name.startswith("lycoris_"):  # LyCORIS on its own, as SimpleTuner uses it
        name = "lora_unet_" + name.removeprefix("lycoris_")
    for ending, which in ENDINGS.items():
        if found := re.fullmatch(f"(.+?){ending}", name):
            layer = WRAPPERS.sub("", found[1])
            if prefix := TEXT_ENCODER.match(layer):
                in_encoder = layer[prefix.end() :].replace(".", "_")
                return f"lora_te{1 if prefix[2] else 2}_{in_encoder}", which
            return layer if layer.startswith("lora_") else f"unet.{layer}", which
    return None


# ------------------------------------------------------------------------------------------ in


def read(path, unet, text_encoders=()) -> SliderFile:
    """Read any LoRA file for `unet`, or a folder that peft wrote, and with `text_encoders`, both
    of them, what it changes there. ValueError, one line that names the file, if it is not a plain
    low-rank one, damaged, or made for another model. LeftOut is warned of, once, if it holds more
    than is read."""
    path = Path(path)
    if path.is_dir() and (path / "adapter_config.json").exists():
        (path,) = map(Path, list_files(path))
    tensors, metadata = load_tensors(path)
    adapter = adapter_config(path, metadata)
    parts = parts_of(path, tensors, bool(text_encoders))
    stems = {
        theirs: (stem, naming)
        for naming, table in layer_names(unet).items()
        for stem, theirs in table.items()
    }
    in_text = text_layers(text_encoders)
    layers = layers_by_kohya_name(unet) | in_text
    found: dict[str, dict] = {}
    naming = "kohya"
    for name, (layer, which) in parts.items():
        if layer in stems:
            stem, naming = stems[layer]
        elif layer in in_text:
            stem = layer
        elif UNET_NAME.match(layer) or TEXT_ENCODER.match(layer):
            lacks = f"it changes {layer}, which this one does not have"
            raise ValueError(f"{path}: was made for another model: {lacks}")
        else:
            raise ValueError(f"{path}: its layers are named in a way that is not known: {name}")
        if which in found.setdefault(stem, {}):
            remedy = "keep one adapter in a file"
            raise ValueError(f"{path}: changes {layer} twice, again by {name}: {remedy}")
        found[stem][which] = tensors[name]
    if not found:
        raise ValueError(f"{path}: not a slider or LoRA file: it holds nothing for a UNet")
    deltas = {}
    for stem, of_layer in found.items():
        name_in_model, module = layers[stem]
        deltas[stem] = check_delta(path, stem, module, of_layer)
        settings = adapter[stem.split("_")[1]]  # of "unet", "te1", "te2"
        deltas[stem].alpha = adapter_alpha(settings, name_in_model, deltas[stem])
    return SliderFile(deltas, naming, metadata)


def parts_of(path, tensors: dict, with_text: bool) -> dict[str, tuple[str, str]]:
    """{tensor's name: split_name of it} of those that are read, with_text: the text encoders' too.
    LeftOut is warned of for embeddings, and what is added to norms and biases. ValueError for what
    is no part of a LoRA."""
    parts: dict[str, tuple[str, str]] = {}
    left_out: dict[str, set] = {}
    for name, tensor in tensors.items():
        kind = ""
        if EMBEDDING.match(name):
            kind = "embeddings"
        elif NORM_OR_BIAS.match(name) or (name.endswith(".diff") and tensor.ndim == 1):
            kind = "norm or bias differences"
        if kind:
            left_out.setdefault(kind, set()).add(name.rpartition(".")[0] or name)
            continue
        part = split_name(name)
        if part is None:
            refuse(path, name)
        elif TEXT_ENCODER.match(part[0]) and not with_text:
            left_out.setdefault("changes of the text encoders", set()).add(part[0])
        else:
            parts[name] = part
    if left_out and parts:
        what = ", ".join(f"{kind} ({len(names)})" for kind, names in left_out.items())
        why = "only low-rank changes are applied"
        if "changes of the text encoders" in left_out:
            why = "sliders change the UNet alone, --merge the text encoders too"
        line = f"{path}: its {what} are left out: {why} (--strict refuses such a file)"
        warnings.warn(LeftOut(line), stacklevel=3)
    return parts


def refuse(path, name: str):
    """ValueError that says what else a file is that holds a tensor of this name."""
    for pattern, kind in OTHER_KINDS.items():
        if re.search(pattern, name):
            only = "only plain low-rank ones (LoRA, LoCon) can be used"
            raise ValueError(f"{path}: a {kind} file ({name}); {only}")
    if re.search(r"lora_B\.(.+\.)?bias$", name):
        remedy = "train without lora_bias, or merge it into the model with peft"
        raise ValueError(f"{path}: {name} is a bias of peft's, which no slider has: {remedy}")
    raise ValueError(f"{path}: not a slider or LoRA file: {name} is no part of one")


def list_files(path) -> list[str]:
    """The slider files that `path` names: itself; of a folder that peft wrote its tensors; of
    another folder all in it, 2 before 10. ValueError if there is none."""
    path = Path(path)
    if path.is_file():
        return [str(path)]
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if (path / "adapter_config.json").exists():
        files = [path / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
        files = [file for file in files if file.exists()][:1]
    else:
        files = sorted(path.glob("*.safetensors"), key=lambda f: (len(f.stem), f.stem))
    if not files:
        raise ValueError(f"{path}: holds no slider files")
    return [str(f) for f in files]


def parse_json_object(text: str, path) -> dict:
    """A JSON object out of a file's metadata. Raises ValueError, naming the file, for anything
    else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: its metadata is no JSON object")
    return value


def useful_range(metadata: dict[str, str], path="the slider file") -> tuple[float, float] | None:
    """Lowest and highest scale that are of use (support/probe.py), if the file's metadata says.
    ValueError if it says nonsense."""
    if "probe" not in metadata:
        return None
    found = parse_json_object(metadata["probe"], path).get("range")
    is_number = lambda x: isinstance(x, int | float) and abs(x) < 1e6
    if not isinstance(found, list) or len(found) != 2 or not all(map(is_number, found)):
        raise ValueError(f"{path}: damaged: its useful range is {str(found)[:50]}")
    return found[0], found[1]


def adapter_config(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """peft's settings of "unet" and of "te1" and "te2", the text encoders; {} where there are none.
    From the adapter_config.json that peft writes beside adapter_model.safetensors, or from
    diffusers' metadata, which it removes there. ValueError for an adapter of another kind, and for
    one whose A and B alone mean nothing."""
    config = parse_json_object(metadata.pop(ADAPTER, "{}"), path)
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.exists():
        config, path = parse_json_object(beside.read_text(), beside), beside
    parts = {}
    for part, prefix in (("unet", "unet."), ("te1", "text_encoder."), ("te2", "text_encoder_2.")):
        own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        parts[part] = own or config
        kind, init = parts[part].get("peft_type", "LORA"), parts[part].get("init_lora_weights")
        if kind != "LORA":
            only = "only plain low-rank ones (LORA) can be used"
            raise ValueError(f"{path}: a {kind} adapter; {only}")
        if str(init).lower().startswith(CHANGES_THE_BASE):
            remedy = "convert it with peft's path_initial_model_for_weight_conversion"
            why = f"was begun with {init}, which changes the model's own weights too"
            raise ValueError(f"{path}: {why}: {remedy}")
    return parts


def adapter_alpha(adapter: dict, layer: str, delta: Delta) -> float:
    """alpha of a layer by peft's settings: "alpha_pattern" by its name, or "lora_alpha", times
    sqrt(r) with "use_rslora"; without either, the file's own."""
    alpha = adapter.get("lora_alpha")
    for pattern, value in (adapter.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    if alpha is None:
        return delta.alpha
    return float(alpha) * (len(delta.down) ** 0.5 if adapter.get("use_rslora") else 1.0)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file, or of a .pt one, which is unpickled with
    weights_only=True. ValueError, naming the file, for anything else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path}: {size / 2**30:.1f} GiB is no LoRA's size")
    if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged one can raise anything
            what = "not a file of tensors alone, or damaged; it was not read"
            raise ValueError(f"{path}: {what} ({first_line(error)[:100]})") from None
        if isinstance(tensors, dict):
            tensors = tensors.get("state_dict", tensors)
        is_tensor = lambda k, v: isinstance(k, str) and torch.is_tensor(v)
        if not isinstance(tensors, dict) or not all(is_tensor(*item) for item in tensors.items()):
            raise ValueError(f"{path}: not a dict of tensors")
        return tensors, {}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        what = weights.describe_file(path)
        raise ValueError(f"{path}: {what} ({first_line(error)})") from None


def check_delta(path, name: str, layer: Layer, parts: dict) -> Delta:
    """The Delta of one layer, in float32. ValueError unless its tensors fit each other and the
    layer. parts: "down", "up", maybe "alpha", and of LyCORIS maybe "mid"."""
    for which in ("down", "up"):
        if which not in parts:
            raise ValueError(f"{path}: damaged: {name} has no lora_{which}")
    down, up, W = parts["down"].float(), parts["up"].float(), layer.weight
    if (core := parts.get("mid")) is not None:
        down = fold_core(path, name, core.float(), down)
    if W.ndim == 4:  # a 1x1 convolution may be kept as a matrix
        down = down[:, :, None, None] if down.ndim == 2 else down
        up = up[:, :, None, None] if up.ndim == 2 else up
    elif down.ndim == up.ndim == 4:
        down, up = down.flatten(1), up.flatten(1)
    fits = up.ndim == down.ndim == W.ndim and down.shape[1:] == W.shape[1:]
    r = len(down) if fits else 0
    if not r or up.shape != (len(W), r, 1, 1)[: W.ndim]:
        shapes = (
            f"{name} is {tuple(W.shape)}, its lora_down {tuple(down.shape)}, "
            f"its lora_up {tuple(up.shape)}"
        )
        raise ValueError(f"{path}: was made for another model, or is damaged: {shapes}")
    alpha = parts.get("alpha", torch.tensor(float(r)))
    if alpha.numel() != 1 or not all(t.isfinite().all() for t in (down, up, alpha)):
        raise ValueError(f"{path}: {name} holds NaN, infinite numbers or more than one alpha")
    return Delta(down, up, float(alpha))


def fold_core(path, name: str, core, down):
    """A convolution in Tucker's form is up core down, with down (q, in, 1, 1), core (p, q, k, k),
    up (out, p, 1, 1). The core times down is an A (p, in, k, k)."""
    fits = core.ndim == 4 and down.ndim >= 2 and core.shape[1] == len(down)
    if not fits or down.shape[2:].numel() != 1:
        shapes = f"its lora_mid is {tuple(core.shape)}, its lora_down {tuple(down.shape)}"
        raise ValueError(f"{path}: damaged: {name}: {shapes}")
    return torch.einsum("pqhw,qi->pihw", core, down.flatten(1))


# ----------------------------------------------------------------------------------------- out


def one_alpha(deltas: dict[str, Delta]) -> dict[str, Delta]:
    """The same changes with one alpha in all layers, the most frequent; what differs goes into B.

    diffusers reads files whose alphas differ wrongly (findings/diffusers_mixed_alpha.sh). With one
    alpha every reader finds the same alpha / r, whatever the ranks."""
    if not deltas:
        return deltas
    alpha = Counter(delta.alpha for delta in deltas.values()).most_common(1)[0][0] or 1.0
    scaled = lambda delta: Delta(delta.down, delta.up.float() * (delta.alpha / alpha), alpha)
    return {stem: d if d.alpha == alpha else scaled(d) for stem, d in deltas.items()}


def write(
    path,
    deltas: dict[str, Delta],
    metadata: dict,
    naming: str = "kohya",
    unet=None,
    dtype=torch.float16,
):
    """Write a slider file, with one alpha for all layers. metadata: any JSON values. unet: the
    model that the names are of, needed for the namings that are not kohya's."""
    deltas = one_alpha(deltas)
    names = {stem: stem for stem in deltas} if naming == "kohya" else layer_names(unet)[naming]
    peft = naming == "peft"
    down, up = ("lora_A", "lora_B") if peft else ("lora_down", "lora_up")
    tensors = {}
    for stem, delta in deltas.items():
        name, A, B = names[stem], delta.down.detach().cpu(), delta.up.detach().cpu().float()
        if peft:  # has no place for alpha, and takes it to be r: alpha / r goes into B
            B = B * (delta.alpha / len(A))
        else:
            tensors[f"{name}.alpha"] = torch.tensor(delta.alpha, dtype=dtype)
        tensors[f"{name}.{down}.weight"] = A.to(dtype).contiguous()
        tensors[f"{name}.{up}.weight"] = B.to(dtype).contiguous()
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    metadata = tool_metadata(deltas, metadata) | metadata
    for of_another_file in ("sshs_legacy_hash", "modelspec.hash_sha256"):  # of what is converted
        metadata.pop(of_another_file, None)
    metadata["sshs_model_hash"] = hashes.tensors_hash(tensors)
    save_tensors(path, tensors, metadata)


def save_tensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None):
    """A .safetensors file, written under a temporary name, then renamed."""
    write_atomically(Path(path), lambda p: save_file(tensors, p, metadata=metadata))


def tool_metadata(deltas: dict[str, Delta], metadata: dict[str, str]) -> dict[str, str]:
    """What ComfyUI, A1111 and model browsers display, in their keys: kohya's ss_..., and
    Stability's modelspec."""
    settings = parse_json_object(metadata.get("settings", "{}"), "the slider file")
    rank = max((len(delta.down) for delta in deltas.values()), default=0)
    alpha = max((delta.alpha for delta in deltas.values()), default=0.0)
    out = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.implementation": "diffusers",
        "modelspec.title": metadata.get("kind", "slider"),
    }
    keys = {"ss_learning_rate": "lr", "ss_max_train_steps": "steps", "ss_seed": "seed"}
    out |= {k: str(settings[name]) for k, name in keys.items() if settings.get(name) is not None}
    if size := settings.get("size"):
        out["modelspec.resolution"] = str(size) if "x" in str(size) else f"{size}x{size}"
    prompts = settings.get("prompt") or []
    words = [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
    if settings.get("pos"):
        words.insert(0, f"+ {settings['pos']} - {settings.get('neg')}")
    if words:
        out["modelspec.description"] = f"concept slider: {'; '.join(words)}"
    if useful := useful_range(metadata):
        out["modelspec.usage_hint"] = "useful range of scales: {:+g} to {:+g}".format(*useful)
    return out
