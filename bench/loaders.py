"""Full-size slider files of ours through the loading code of other programs, by names and shapes.

    python -m bench.loaders --comfyui DIR --a1111 DIR --forge DIR --invokeai DIR --kohya DIR
        --simpletuner DIR --sdcpp DIR --ggml DIR --diffusers

Each option is optional and names a checkout of that program, which is only read; --diffusers takes
the installed package. Needs torch, diffusers, peft, safetensors, einops, torchsde, scipy, psutil;
--sdcpp needs cmake and g++, too, and --ggml, a checkout of the ggml that is its submodule.

No model is loaded. SDXL's UNet stands on the meta device, which knows shapes alone. A file gets
random A and B of small rank; the program's own code finds the layer that each belongs to and makes
the change that it would add to the weight. That is compared with (alpha / r) B A of that layer:
the share that it is of B A is the scaling really applied. What a program imports but does not need
for this (its server, its memory management) is replaced by empty stubs.
"""

import argparse
import importlib
import importlib.util
import json
import logging
import re
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import formats
from formats import single_file, slider_files
from lora import LAYERS
from sdxl_unet import UNet

FACTS = Path(formats.__file__).parent.parent / "tests" / "facts"

# ---------------------------------------------------------------------------------- the files


@dataclass
class Target:
    """A layer of the UNet that a LoRA can change."""

    stem: str  # its name in kohya's naming
    released: str  # in the released folder
    original: str  # in the original single file
    layer: nn.Module  # on the meta device


def targets() -> tuple[list[Target], UNet]:
    """Every linear layer and convolution of SDXL's UNet; and the UNet, without weights."""
    with torch.device("meta"):
        unet = UNet(single_file.SDXL["unet"])
    original = {
        stem: name.removeprefix("unet.")
        for stem, name in slider_files.layer_names(unet)["dotted"].items()
    }
    layers = slider_files.layers_by_kohya_name(unet)
    return [
        Target(stem, name, original[stem], layer) for stem, (name, layer) in layers.items()
    ], unet


IN_SLIDERS = re.compile(LAYERS["all"])  # what the sliders of any layer set change
all_of_them = lambda here: [t for t in here if IN_SLIDERS.search(t.released)]
a_seventh = lambda here: all_of_them(here)[::7]  # quicker; of every kind
the_others = lambda here: [t for t in here if not IN_SLIDERS.search(t.released)]
attention = lambda target: ".attn" in target.released
two_or_four = lambda target: 2 if attention(target) else 4


def one_two_or_four(target) -> float:
    """4 in self-attention, 2 in cross-attention, 1 elsewhere."""
    return 4.0 if ".attn1" in target.released else 2.0 if attention(target) else 1.0


# What is in a file: its layers, their rank and alpha. alpha None: the file gives none.
KINDS = {
    "every layer of our sliders, alpha 1, rank 4": (all_of_them, lambda t: 4, lambda t: 1.0),
    "no alpha, rank 4": (a_seventh, lambda t: 4, lambda t: None),
    "alpha 1, ranks 2 and 4": (a_seventh, two_or_four, lambda t: 1.0),
    "no alpha, ranks 2 and 4": (a_seventh, two_or_four, lambda t: None),
    "alphas 1, 2 and 4, rank 4": (a_seventh, lambda t: 4, one_two_or_four),
    "every other layer of the UNet, alpha 1, rank 4": (the_others, lambda t: 4, lambda t: 1.0),
}


def make(kind: str, here: list[Target]) -> dict[str, slider_files.Delta]:
    """Random A and B; (alpha / r) B A is what ought to be added."""
    wanted, rank, alpha = KINDS[kind]
    parts = {}
    for target in wanted(here):
        (out, *rest), r = target.layer.weight.shape, rank(target)
        up = torch.randn(out, r, *[1] * (len(rest) - 1)) / 8
        down = torch.randn(r, *rest) / 8
        given = alpha(target)
        parts[target.stem] = slider_files.Delta(down, up, float(r) if given is None else given)
    return parts


def write(path, kind, deltas, naming, unet):
    """As we write it; but alphas that differ, and none at all, which we never write, as `kind`
    says."""
    alphas = {stem: delta.alpha for stem, delta in deltas.items()}
    mixed = len(set(alphas.values())) > 1 and naming != "peft"
    if mixed:
        one = lambda delta: slider_files.Delta(delta.down, delta.up, 1.0)
        deltas = {stem: one(delta) for stem, delta in deltas.items()}
    slider_files.write(path, deltas, {"kind": "slider"}, naming=naming, unet=unet)
    tensors = load_file(path)
    if mixed:
        names = slider_files.layer_names(unet)[naming]
        for stem, alpha in alphas.items():
            tensors[f"{names[stem]}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    if kind.startswith("no alpha"):
        tensors = {name: t for name, t in tensors.items() if not name.endswith(".alpha")}
    save_file(tensors, path, {"kind": "slider"})


# -------------------------------------------------------------------------- stubs for imports


class Empty(type):
    """A class whose attributes, calls and items are such classes again: a stub for anything."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name, (), {})

    def __call__(cls, *args, **options):
        return (
            args[0]
            if len(args) == 1 and callable(args[0]) and not options
            else Empty("called", (), {})
        )

    def __getitem__(cls, key):
        return cls

    def __iter__(cls):
        return iter(())

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class EmptyModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name, (), {})


def stub(*names, **attributes):
    """Put an empty module in the place of each of these; attributes: what it has all the same."""
    for name in names:
        module = EmptyModule(name)
        module.__path__ = []
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        module.__dict__.update(attributes)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, module)


def bare(name: str, folder: Path):
    """A package whose modules can be imported from `folder`, but whose own __init__ is not run."""
    stub(name)
    sys.modules[name].__path__ = [str(folder)]


def stub_missing(*names):
    for name in names:  # "a.b" after "a"
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, EmptyModule) or importlib.util.find_spec(name) is None:
            stub(name)


# ----------------------------------------------------------------------------------- programs
# Each takes its folder and the targets, and returns a reader: path -> pairs (key of the layer, the
# change that the program adds to its weight). A key is a layer's released or original name.


def comfyui(folder, here):
    """comfy/lora.py: model_lora_keys_unet, load_lora, calculate_weight, as in LoraLoader."""
    sys.path.insert(0, str(folder))
    stub_missing(
        "torchvision", "torchvision.transforms", "torchaudio", "av", "cv2", "kornia", "spandrel"
    )
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_detection
    import comfy.utils

    prefix = "diffusion_model."
    weights = original_weights(prefix)
    config = comfy.model_detection.detect_unet_config(weights, prefix)
    model = types.SimpleNamespace(
        state_dict=lambda: weights, model_config=types.SimpleNamespace(unet_config=config)
    )
    keys = comfy.lora.model_lora_keys_unet(model, {})

    def read(path):
        file = comfy.utils.load_torch_file(str(path), safe_load=True)
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), keys)
        for key, patch in patches.items():
            weight = torch.zeros(weights[key].shape)
            name = key.removeprefix(prefix).removesuffix(".weight")
            patched = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, key)
            yield name, patched

    return read


def a1111(folder, here):
    """extensions-builtin/Lora: networks.load_network, and calc_updown of each module of it."""
    sys.path.insert(0, str(folder / "extensions-builtin" / "Lora"))
    cpu = torch.device("cpu")
    others = "cache errors hashes scripts sd_hijack models models.sd3 models.sd3.mmdit "
    others += "textual_inversion textual_inversion.textual_inversion"
    stub("gradio", "lora_patches", "modules", *(f"modules.{name}" for name in others.split()))
    stub("modules.devices", cpu=cpu, device=cpu, dtype=torch.float32)
    stub("modules.sd_models", read_state_dict=load_file)
    wrapper = nn.Module()
    wrapper.diffusion_model = tree(here)
    sd_model = types.SimpleNamespace(
        is_sdxl=True, model=wrapper, conditioner=types.SimpleNamespace(embedders=[])
    )
    nowhere = tempfile.mkdtemp()
    options = types.SimpleNamespace(lora_dir=nowhere, lyco_dir_backcompat=nowhere)
    stub("modules.shared", sd_model=sd_model, cmd_opts=options)
    networks = importlib.import_module("networks")
    networks.assign_network_names_to_compvis_modules(sd_model)
    names = {module: name for name, module in wrapper.diffusion_model.named_modules()}

    def read(path):
        net = networks.load_network("file", types.SimpleNamespace(filename=str(path)))
        for module in net.modules.values():
            weight = module.sd_module.weight
            change, _ = module.calc_updown(torch.empty(1).expand(weight.shape))
            yield names[module.sd_module], change

    return read


def forge(folder, here):
    """sd_forge_lora: load_lora_for_models; then merge_lora_to_weight of each patch that it adds."""
    sys.path.insert(0, str(folder))
    cast = lambda tensor, device, dtype, copy=False: tensor.to(device, dtype)
    bare("backend", folder / "backend")
    stub("backend.memory_management", cast_to_device=cast)
    stub("backend.args", "backend.utils", "backend.operations_gguf", "gguf")
    stub("backend.misc.checkpoint_pickle")
    nowhere = types.SimpleNamespace(lora_dir=tempfile.mkdtemp())
    stub("network", "modules", *(f"modules.{name}" for name in ("sd_models", "errors", "scripts")))
    stub("modules.shared", cmd_opts=nowhere, walk_files=lambda *a, **k: [])
    lora = importlib.import_module("backend.patcher.lora")
    extension = folder / "extensions-builtin" / "sd_forge_lora" / "networks.py"
    spec = importlib.util.spec_from_file_location("sd_forge_lora_networks", extension)
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    prefix = "diffusion_model."
    weights = original_weights(prefix)

    class Patched:
        """What load_lora_for_models asks of a model; it keeps the patches."""

        model = types.SimpleNamespace(
            state_dict=lambda: weights,
            diffusion_model=types.SimpleNamespace(config=FORGE_SDXL),
            config=types.SimpleNamespace(
                huggingface_repo="stabilityai/stable-diffusion-xl-base-1.0"
            ),
        )
        patches: dict = {}
        clone = lambda self: Patched()

        def add_patches(self, filename, patches, strength_patch, online_mode):
            self.patches = patches
            return list(patches)

    def read(path):
        model, _ = networks.load_lora_for_models(Patched(), None, load_file(path), 1.0, 1.0)
        for key, patch in model.patches.items():
            weight = torch.zeros(weights[key].shape)
            name = key.removeprefix(prefix).removesuffix(".weight")
            yield name, lora.merge_lora_to_weight([(1.0, patch, 1.0, None, None)], weight, key)

    return read


FORGE_SDXL = dict(  # SDXL's sizes by the names that unet_to_diffusers asks for
    num_res_blocks=[2, 2, 2],
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    transformer_depth_middle=10,
)


def invokeai(folder, here):
    """backend/patches: the SDXL conversion, then LayerPatcher's search and each layer's weights."""
    for name in ("", ".backend", ".backend.util", ".backend.patches"):
        bare(f"invokeai{name}", folder / f"invokeai{name.replace('.', '/')}")
    model_cache = "invokeai.backend.model_manager.load.model_cache"
    stub("invokeai.backend.model_manager", "invokeai.backend.model_manager.load", model_cache)
    stub(f"{model_cache}.model_cache", f"{model_cache}.torch_module_autocast")
    stub(f"{model_cache}.torch_module_autocast.cast_to_device")
    for name in ("devices", "logging", "fp8"):
        stub(f"invokeai.backend.util.{name}")
    patches = "invokeai.backend.patches"
    patcher = importlib.import_module(f"{patches}.layer_patcher").LayerPatcher
    convert = importlib.import_module(f"{patches}.lora_conversions.sdxl_lora_conversion_utils")
    build = importlib.import_module(f"{patches}.lora_conversions.sd_lora_conversion_utils")
    unet = diffusers_unet()

    def read(path):
        file = convert.convert_sdxl_keys_to_diffusers_format(load_file(path))
        layers = build.lora_model_from_sd_state_dict(file).layers
        flat = not any("." in key for key in layers)
        for key, layer in layers.items():
            if not key.startswith("lora_unet_"):
                continue
            try:
                name, module = patcher._get_submodule(unet, key.removeprefix("lora_unet_"), flat)
            except AttributeError:  # LayerPatcher warns and goes on
                continue
            layer.to(dtype=torch.float32)
            weights = dict(module.named_parameters(recurse=False))
            yield name, layer.get_parameters(weights, weight=1.0)["weight"]

    return read


def kohya(folder, here):
    """networks/lora.py: create_network_from_weights on its own SDXL UNet, and get_weight."""
    sys.path.insert(0, str(folder))
    bare("library", folder / "library")
    bare("networks", folder / "networks")
    stub("library.utils", setup_logging=lambda *a, **k: None)
    lora = importlib.import_module("networks.lora")
    with torch.device("meta"):
        unet = lora.SdxlUNet2DConditionModel()
    names = {module: name for name, module in unet.named_modules()}

    def read(path):
        network, file = lora.create_network_from_weights(
            1.0, str(path), None, [], unet, for_inference=True
        )
        of = {part.lora_name: names[part.org_module_ref[0]] for part in network.unet_loras}
        for part in network.unet_loras:
            network.add_module(part.lora_name, part)
        network.load_state_dict(file, strict=False)
        for part in network.unet_loras:
            yield of[part.lora_name], part.get_weight(1.0)

    return read


def diffusers(_, here):
    """StableDiffusionXLPipeline.load_lora_weights, and peft's get_delta_weight of each layer."""

    def read(path):
        unet = diffusers_unet()
        parts = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
        pipeline = StableDiffusionXLPipeline(**parts, unet=unet, scheduler=EulerDiscreteScheduler())
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="a")
        yield from peft_changes(unet, "a")

    return read


def simpletuner(folder, here):
    """--init_lora of a LoRA run: the configuration it makes of the file, then load_lora_weights.

    Every layer of the UNet is made a target, which is more than its own default (attention)."""
    for name in ("simpletuner", "simpletuner.helpers", "simpletuner.helpers.training"):
        bare(name, folder / name.replace(".", "/"))
    adapter = importlib.import_module("simpletuner.helpers.training.adapter")
    lora_format = importlib.import_module("simpletuner.helpers.training.lora_format")
    every_layer = [target.released for target in here]

    def read(path):
        file = load_file(path)
        settings = lora_format.peft_lora_config_kwargs_from_state_dict(
            file, prefix_to_strip="unet."
        )
        unet = diffusers_unet()
        unet.add_adapter(LoraConfig(target_modules=every_layer, **settings), "default")
        adapter.load_lora_weights({"unet": unet}, str(path), state_dict=file)
        yield from peft_changes(unet, "default")

    return read


SDCPP = r"""
// Adds a LoRA file (1st argument) to weights that are zero. stdin: lines "name ne0 ne1 ne2 ne3",
// innermost first, as in ggml. Their values afterwards go to the file of the 2nd argument, float32,
// one weight after the other.
#include <cstdio>
#include <iostream>
#include "ggml-cpu.h"
#include "model/adapter/lora.hpp"

int main(int, char** argv) {
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_context* context = ggml_init({64 << 20, nullptr, true});
    std::map<std::string, ggml_tensor*> weights;
    std::vector<ggml_tensor*> order;
    std::string name;
    for (int64_t a, b, c, d; std::cin >> name >> a >> b >> c >> d; order.push_back(weights[name]))
        weights[name] = d > 0 ? ggml_new_tensor_4d(context, GGML_TYPE_F32, a, b, c, d)
                              : ggml_new_tensor_2d(context, GGML_TYPE_F32, a, b);
    ggml_backend_buffer_clear(ggml_backend_alloc_ctx_tensors(context, backend), 0);
    LoraModel lora("file", backend, backend, argv[1], "", VERSION_SDXL);
    if (!lora.load_from_file(1)) return 1;
    lora.multiplier = 1.0f;
    lora.apply(weights, VERSION_SDXL, 1, false);
    FILE* out = fopen(argv[2], "wb");
    for (ggml_tensor* weight : order) {
        std::vector<char> bytes(ggml_nbytes(weight));
        ggml_backend_tensor_get(weight, bytes.data(), 0, bytes.size());
        fwrite(bytes.data(), 1, bytes.size(), out);
    }
    fclose(out);
}
"""


def build_sdcpp(folder, ggml, work):
    """ggml for the CPU, and the sources that LoraModel needs: some minutes."""
    size = "-DGGML_MAX_NAME=160"
    off = [
        f"-DGGML_{x}=OFF"
        for x in ("NATIVE", "OPENMP", "BUILD_TESTS", "BUILD_EXAMPLES", "LLAMAFILE", "CPU_REPACK")
    ]
    flags = [f"-DCMAKE_{x}_FLAGS=-O1 {size}" for x in ("C", "CXX")]
    run = lambda *command: subprocess.run(command, check=True, capture_output=True)
    run("cmake", "-S", ggml, "-B", work / "ggml", "-DBUILD_SHARED_LIBS=OFF", *off, *flags)
    run("cmake", "--build", work / "ggml", "--target", "ggml", "ggml-cpu", "ggml-base")
    (work / "driver.cpp").write_text(SDCPP)
    (work / "include").mkdir(exist_ok=True)
    (work / "include" / "ggml").unlink(missing_ok=True)
    (work / "include" / "ggml").symlink_to(ggml.resolve())  # it includes ggml/src/ggml-impl.h
    source = folder / "src"
    files = [
        *source.glob("model_io/*.cpp"),
        *source.glob("core/*.cpp"),
        source / "runtime/imatrix.cpp",
    ]
    files += [
        source / f"{name}.cpp" for name in ("model_loader", "model_manager", "name_conversion")
    ]
    where = [
        source,
        folder / "include",
        folder / "thirdparty",
        ggml / "include",
        ggml / "src",
        work / "include",
    ]
    options = [
        "-O1",
        size,
        "-ffunction-sections",
        "-fdata-sections",
        *(f"-I{path}" for path in where),
    ]
    objects = []
    for file in [work / "driver.cpp", *files, *folder.glob("thirdparty/**/zip.c")]:
        objects.append(work / f"{file.stem}.o")
        compiler = ["gcc"] if file.suffix == ".c" else ["g++", "-std=c++17"]
        run(*compiler, "-c", *options, file, "-o", objects[-1])
    libraries = [
        work / "ggml" / "src" / f"lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml-base")
    ]
    run(
        "g++", "-Wl,--gc-sections", *objects, *libraries, "-lpthread", "-ldl", "-o", work / "driver"
    )


def sdcpp(folder, ggml, work, here):
    """src/model/adapter/lora.hpp: LoraModel's load_from_file and apply, on weights of zeros."""
    if not (work / "driver").exists():
        build_sdcpp(folder, ggml, work)
    prefix = "model.diffusion_model."

    def read(path):
        batch = []
        with safe_open(path, "pt") as file:  # the layers that the file names, to be quick
            names = "\n".join(file.keys())
        ours = [
            t
            for t in here
            if any(name in names for name in (t.stem, t.released, t.original.replace(".", "_")))
        ]
        for target in [*ours, None]:
            if target is None or sum(t.layer.weight.numel() for t in batch) > 100e6:  # 400 MB
                yield from run(path, batch)
                batch = []
            batch.append(target)

    def run(path, batch):
        size = lambda weight: [*reversed(weight.shape), *[0] * (4 - weight.ndim)]
        lines = [
            " ".join(map(str, [f"{prefix}{t.original}.weight", *size(t.layer.weight)]))
            for t in batch
        ]
        values = work / "values"
        subprocess.run(
            [work / "driver", path, values],
            input="\n".join(lines).encode(),
            check=True,
            capture_output=True,
        )
        counts = [t.layer.weight.numel() for t in batch]
        flat = torch.from_file(str(values), size=sum(counts)).split(counts)
        for target, change in zip(batch, flat, strict=True):
            yield target.original, change.view(target.layer.weight.shape)

    return read


def original_weights(prefix) -> dict[str, torch.Tensor]:
    """The UNet's weights and biases by their original names, shapes alone."""
    theirs = "model.diffusion_model."
    shapes = json.loads((FACTS / "sdxl_single_file_keys.json").read_text())
    names = {
        name.removeprefix(theirs): shape
        for name, shape in shapes.items()
        if name.startswith(theirs)
    }
    return {prefix + name: torch.empty(shape, device="meta") for name, shape in names.items()}


def tree(here) -> nn.Module:
    """The UNet's layers in modules that are nested as their original names are."""
    root = nn.Module()
    for target in here:
        *path, last = target.original.split(".")
        at = root
        for name in path:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at._modules[name]
        at.add_module(last, target.layer)
    return root


def diffusers_unet():
    """diffusers' UNet; each weight is one zero in memory, whatever its shape."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**single_file.SDXL["unet"])
    for module in unet.modules():
        for name, weight in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(
                torch.zeros(1).expand(weight.shape), requires_grad=False
            )
    return unet


def peft_changes(unet, adapter):
    for name, module in unet.named_modules():
        if adapter in (getattr(module, "lora_A", None) or {}):
            with torch.no_grad():
                yield name, module.get_delta_weight(adapter).float()


# ---------------------------------------------------------------------------------- the check


def share(change: torch.Tensor, part: slider_files.Delta) -> float | None:
    """s if `change` is s B A; None if it is no multiple of it."""
    A, B, D = part.down.flatten(1), part.up.flatten(1), change.flatten(1).float()
    if D.shape != (len(B), A.shape[1]):
        return None
    dot = ((B.T @ D) * A).sum().item()  # of D and B A
    square = ((B.T @ B) * (A @ A.T)).sum().item()  # of B A with itself
    norm = D.square().sum().item()
    return dot / square if abs(dot * dot / (square * norm) - 1) < 1e-3 else None


@torch.no_grad()
def compare(read, path, parts, here) -> str:
    """One file through one program, in words."""
    stems = {t.released: t.stem for t in here} | {t.original: t.stem for t in here}
    shapes = {t.stem: t.layer.weight.shape for t in here}
    matched, wrong, scales = set(), [], Counter()
    try:
        for name, change in read(path):
            stem = stems.get(name)
            if not change.any():  # a place for it, and nothing in it
                continue
            if stem not in parts or change.shape != shapes[stem]:
                wrong.append(name)
                continue
            right, seen = parts[stem].alpha / len(parts[stem].down), share(change, parts[stem])
            if seen is None:
                wrong.append(name)
                continue
            matched.add(stem)
            scales[
                f"{seen:.3g}" + ("" if abs(seen / right - 1) < 0.01 else f" (right: {right:.3g})")
            ] += 1
    except Exception as error:
        if VERBOSE:
            traceback.print_exc()
        return f"refused: {type(error).__name__}: {str(error).strip().splitlines()[0][:70]}"
    left = Counter(kind_of(stem) for stem in parts if stem not in matched)
    text = f"{len(matched)} matched, {len(parts) - len(matched)} left out, {len(wrong)} wrong"
    text += (
        "; scaling " + ", ".join(f"{s} in {n}" for s, n in sorted(scales.items())) if scales else ""
    )
    if left and matched:
        text += "; left out: " + ", ".join(
            f"{n} {kind}" if n > 1 else kind for kind, n in left.items()
        )
    return text


def kind_of(stem: str) -> str:
    """A layer's name without numbers, to count by: 'up_blocks upsamplers conv'."""
    name = stem.removeprefix("lora_unet_")
    if re.match(r"(conv|time|add)_", name):
        return name
    part = re.search(r"resnets|attn1|attn2|_ff_|proj_(in|out)|(down|up)samplers", name)[0].strip(
        "_"
    )
    return name if "sampler" in part else part


PROGRAMS = [comfyui, a1111, forge, invokeai, kohya, simpletuner, sdcpp, diffusers]
VERBOSE = False


def main():
    global VERBOSE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for program in PROGRAMS[:-1]:
        parser.add_argument(
            f"--{program.__name__}", type=Path, help=program.__doc__.splitlines()[0]
        )
    parser.add_argument(
        "--ggml", type=Path, help="for --sdcpp: the ggml that it has as a submodule"
    )
    parser.add_argument(
        "--build", type=Path, help="for --sdcpp: where it is built, kept for the next time"
    )
    parser.add_argument("--diffusers", action="store_true", help=diffusers.__doc__)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    VERBOSE = args.verbose
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    here, unet = targets()
    given = [p for p in PROGRAMS if getattr(args, p.__name__)]
    readers = {}
    for program in given:
        folder = getattr(args, program.__name__)
        with redirect_stdout(sys.stderr):
            more = (args.ggml, args.build or Path(tempfile.mkdtemp())) if program is sdcpp else ()
            readers[program.__name__] = program(folder, *more, here)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            parts = make(kind, here)
            for naming in ("kohya", "ldm", "peft"):
                if naming == "peft" and kind.startswith("no alpha"):
                    continue  # this naming has no place for alpha: B holds alpha / r
                path = Path(folder) / f"{naming}.safetensors"
                write(path, kind, parts, naming, unet)
                expected = parts
                if naming == "peft":
                    expected = {
                        stem: slider_files.Delta(
                            p.down, p.up * (p.alpha / len(p.down)), float(len(p.down))
                        )
                        for stem, p in parts.items()
                    }
                print(f"\n{naming}, {kind}: {len(parts)} layers")
                for name, read in readers.items():
                    with redirect_stdout(sys.stderr):
                        words = compare(read, path, expected, here)
                    print(f"  {name}: {words}", flush=True)


if __name__ == "__main__":
    main()
