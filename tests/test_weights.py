"""Every form that SDXL comes in gives the same model; everything else is refused by name."""

import functools
import json
import pickle
import shutil
from pathlib import Path

import original_names
import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import single_file, weights
from sdxl import MINIATURE, SDXL

FACTS = Path(__file__).parent / "facts"
facts = lambda name: json.loads((FACTS / f"sdxl_{name}.json").read_text())


@functools.cache
def folder_tensors(part):
    locations = weights.locate_tensors(MINIATURE, part)
    tensors = {file: load_file(file) for file in {file for file, _, _ in locations.values()}}
    return {new: tensors[file][old] for new, (file, old, _) in locations.items()}


def original_tensors(of_part) -> dict:
    """{original name: tensor} from of_part(part) -> {released name: tensor}."""
    return {
        **original_names.unet(of_part("unet")),
        **original_names.vae(of_part("vae"), levels=4),
        **original_names.text_encoder(of_part("text_encoder")),
        **original_names.text_encoder_2(of_part("text_encoder_2")),
    }


def one_file(path, change=lambda tensors: tensors, metadata=None):
    """The miniature as one file in the original naming."""
    tensors = original_tensors(folder_tensors)
    embeddings = "conditioner.embedders.0.transformer.text_model.embeddings"
    tensors[f"{embeddings}.position_ids"] = torch.arange(77)[None]
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path, metadata)
    return path


def everything(model):
    modules = (model.unet, model.vae, *model.text_encoders)
    states = [module.state_dict() for module in modules]
    return {f"{i}.{name}": value for i, state in enumerate(states) for name, value in state.items()}


def same(a, b):
    a, b = everything(a), everything(b)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_one_file_is_the_same_model_bit_for_bit(model, inputs, tmp_path):
    other = SDXL.load(one_file(tmp_path / "model.safetensors"), device="cpu", base=MINIATURE)
    assert same(model, other) and other.size == model.size
    assert other.vae.config["scaling_factor"] == model.vae.config["scaling_factor"]
    conditions = (m.condition(["an old man"]) for m in (model, other))
    assert all(torch.equal(a, b) for a, b in zip(*conditions))
    with torch.no_grad():
        assert torch.equal(model.unet(*inputs), other.unet(*inputs))


def test_fp16_files_and_shards_are_the_same_model(model, tmp_path):
    shutil.copytree(MINIATURE, tmp_path / "m")
    for part in weights.PARTS:
        stem = "model" if "text" in part else "diffusion_pytorch_model"
        whole = tmp_path / "m" / part / f"{stem}.safetensors"
        if part == "unet":  # in two shards
            tensors = load_file(whole)
            names = sorted(tensors)
            shards = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
            for file, part_of_names in shards.items():
                save_file({n: tensors[n] for n in part_of_names}, whole.with_name(file))
            weight_map = {n: file for file, part in shards.items() for n in part}
            index = {"metadata": {}, "weight_map": weight_map}
            whole.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
            whole.unlink()
        else:
            whole.rename(whole.with_name(f"{stem}.fp16.safetensors"))
    assert same(model, SDXL.load(tmp_path / "m", device="cpu"))


def test_older_names_of_the_vaes_attention(model, tmp_path):
    shutil.copytree(MINIATURE, tmp_path / "m")
    file = tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old_name in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, old_name)
                tensor = tensor[:, :, None, None] if name.endswith("weight") else tensor
        tensors[name] = tensor
    assert any(tensor.ndim == 4 and ".query." in name for name, tensor in tensors.items())
    save_file(tensors, file)
    assert same(model, SDXL.load(tmp_path / "m", device="cpu"))


def used_keys(part) -> dict:
    """{name: shape} of a part of the released folder."""
    keys = facts(f"{part}_keys").items()
    return {name: shape for name, shape in keys if not name.endswith("position_ids")}


def test_full_size_names_all_find_their_place():
    """2,514 tensors of a released single file against the names and shapes of the released
    folder."""
    shapes = {name: tuple(shape) for name, shape in facts("single_file_keys").items()}
    renamed = single_file.rename(shapes)
    for part in weights.PARTS:
        got = {}
        for new, old, action in renamed[part]:
            shape = shapes[old]
            third = (shape[0] // 3, *shape[1:])
            done = {"squeeze": shape[:2], "transpose": shape[::-1], "": shape}
            got[new] = list(done.get(action, third))
        expected = {weights.released(part, name): shape for name, shape in used_keys(part).items()}
        assert got == expected
    configs = single_file.configs(shapes, single_file.SDXL)
    for part in weights.PARTS:
        stated = {k: v for k, v in facts("configs")[part].items() if k in configs[part]}
        assert {k: configs[part][k] for k in stated} == stated, part
    assert single_file.identify(shapes) == "sdxl"


def test_the_test_helper_writes_the_released_names():
    """original_names, which the other tests stand on, gives exactly the published list from the
    folder's names."""

    def empty(part):
        return {k: torch.empty(shape, device="meta") for k, shape in used_keys(part).items()}

    got = {k: list(v.shape) for k, v in original_tensors(empty).items()}
    published = facts("single_file_keys").items()
    assert got == {k: v for k, v in published if not single_file.is_left_out(k)}


def test_tensors_go_straight_into_place():
    """Where nothing is converted the weights are views of the mapped file; conversion goes a chunk
    at a time."""
    table = weights.locate_tensors(MINIATURE, "unet")
    chunks = list(weights.read_tensors(table, "cpu", torch.float32, chunk=2**20))
    assert len(chunks) > 10 and sum(map(len, chunks)) == len(table)
    largest = max(t.numel() * 2 for t in folder_tensors("unet").values())
    assert all(sum(t.numel() * 2 for t in c.values()) < 2**20 + largest for c in chunks)
    half = {k: v for c in weights.read_tensors(table, "cpu", torch.float16) for k, v in c.items()}
    maps, file = Path("/proc/self/maps"), str(next(iter(table.values()))[0])
    if maps.exists():  # Linux: every tensor lies within the mapped file
        lines = [line for line in maps.read_text().splitlines() if line.endswith(file)]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        within = lambda t: any(low <= t.data_ptr() < high for low, high in spans)
        assert spans and all(within(t) for t in half.values())
    assert all(torch.equal(v, folder_tensors("unet")[k]) for k, v in list(half.items())[:5])


SD15 = "cond_stage_model.transformer.text_model.embeddings.position_ids"
OUT = "model.diffusion_model.out.2.bias"
STRANGERS = {  # names of tensors, and what the file is said to be
    "lora": (["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"], "a LoRA or slider file"),
    "sd15": ([SD15, OUT], "Stable Diffusion 1.x"),
    "sd2": (["cond_stage_model.model.ln_final.weight", OUT], "Stable Diffusion 2"),
    "refiner": (["conditioner.embedders.0.model.ln_final.weight", OUT], "refiner"),
    "flux": (["double_blocks.0.img_attn.qkv.weight"], "diffusion transformer"),
    "unet": (["conv_in.weight", "add_embedding.linear_1.weight"], "one part"),
    "other": (["a"], "no SDXL checkpoint"),
    "half": ([OUT, "first_stage_model.quant_conv.bias"], "incomplete"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_another_kind_of_file_is_named(name, tmp_path):
    names, what = STRANGERS[name]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{what}"):
        weights.find_weights(tmp_path / "x.safetensors")


def test_pickles_and_broken_files_are_refused(tmp_path):
    whole = one_file(tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:100_000])
    (tmp_path / "p.ckpt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip.ckpt")
    (tmp_path / "empty.safetensors").touch()
    broken = {
        "cut.safetensors": "cut short",
        "p.ckpt": "a pickle",
        "zip.ckpt": "a pickle",
        "empty.safetensors": "not a readable",
        "missing.safetensors": "no such",
    }
    for name, what in broken.items():
        with pytest.raises(ValueError, match=f"{name}.*{what}"):
            weights.find_weights(tmp_path / name)
    assert not weights.find_weights(whole).tokenizers  # enough for extras.tools
    with pytest.raises(ValueError, match="whole.safetensors.*--base"):
        SDXL.load(whole)
    tensors, conv = load_file(whole), "output_blocks.8.0.in_layers.2"
    odd = {
        "missing, such as up_blocks.2.resnets.2.conv1": {
            name: tensor for name, tensor in tensors.items() if conv not in name
        },
        "control.weight": tensors | {"model.diffusion_model.control.weight": torch.zeros(1)},
        "conv_out.bias": tensors | {OUT: torch.zeros(5)},
    }
    for what, changed in odd.items():
        save_file(changed, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=what):
            SDXL.load(tmp_path / "odd.safetensors", device="cpu", base=MINIATURE)


def test_broken_folders_are_refused(tmp_path):
    def broken(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(MINIATURE, folder)
        change(folder)
        return folder

    def edit(file, **values):
        def change(folder):
            settings = json.loads((folder / file).read_text()) | values
            (folder / file).write_text(json.dumps(settings))

        return change

    def no_json(folder):
        (folder / "unet" / "config.json").write_text("{")

    def without(part):
        return lambda folder: shutil.rmtree(folder / part)

    def pickles(folder):
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(".bin"))

    def escape(folder):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.unlink()
        index = {"weight_map": {"a": "../../secret.safetensors"}}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))

    unet, scheduler = "unet/config.json", "scheduler/scheduler_config.json"
    for change, what in (
        (no_json, "unet/config.json: not valid JSON"),
        (without("vae"), "vae/config.json: missing"),
        (without("tokenizer_2"), "tokenizers cannot be read"),
        (pickles, "a pickle"),
        (escape, "names no files beside it"),
        (edit(scheduler, prediction_type="sample"), "'sample' is not supported"),
        (edit("model_index.json", text_encoder=[None, None]), "refiner"),
        (edit(unet, block_out_channels=[64, 128, 256]), "do not fit"),
        (edit(unet, in_channels=9), "9 channels in, 4 out: a model for inpainting"),
        (edit("text_encoder/config.json", num_hidden_layers=4), "do not fit"),
    ):
        with pytest.raises(ValueError, match=what):
            SDXL.load(broken(change), device="cpu")
