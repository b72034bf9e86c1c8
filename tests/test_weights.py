"""Every form that SDXL comes in gives the same model; everything else is refused by name."""

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


def folder_tensors(part):
    return {
        new: load_file(file)[old]
        for new, (file, old, _) in weights.locate_tensors(MINIATURE, part).items()
    }


def one_file(path, change=lambda tensors: tensors):
    """The miniature as one file in the original naming."""
    tensors = {
        **original_names.unet(folder_tensors("unet")),
        **original_names.vae(folder_tensors("vae"), levels=4),
        **original_names.text_encoder(folder_tensors("text_encoder")),
        **original_names.text_encoder_2(folder_tensors("text_encoder_2")),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[
            None
        ],
    }
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path)
    return path


def everything(model):
    return {
        f"{part}.{k}": v
        for part, module in (
            ("unet", model.unet),
            ("vae", model.vae),
            ("1", model.text_encoders[0]),
            ("2", model.text_encoders[1]),
        )
        for k, v in module.state_dict().items()
    }


def same(a, b):
    a, b = everything(a), everything(b)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.slow
def test_one_file_is_the_same_model_bit_for_bit(model, inputs, tmp_path):
    other = SDXL.load(one_file(tmp_path / "model.safetensors"), device="cpu", base=MINIATURE)
    assert (
        same(model, other)
        and other.size == model.size
        and other.vae.config["scaling_factor"] == model.vae.config["scaling_factor"]
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.condition(["an old man"]), other.condition(["an old man"]))
    )
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
            for file, mine in shards.items():
                save_file({n: tensors[n] for n in mine}, whole.with_name(file))
            index = {
                "metadata": {},
                "weight_map": {n: file for file, mine in shards.items() for n in mine},
            }
            whole.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
            whole.unlink()
        else:
            whole.rename(whole.with_name(f"{stem}.fp16.safetensors"))
    assert same(model, SDXL.load(tmp_path / "m", device="cpu"))


def test_older_names_of_the_vaes_attention(model, tmp_path):
    shutil.copytree(MINIATURE, tmp_path / "m")
    file = tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {
            k.replace(f"attentions.0.{new}", f"attentions.0.{name}"): v for k, v in tensors.items()
        }
    tensors = {
        k: v[:, :, None, None] if any(f".{n}.weight" in k for n in old.values()) else v
        for k, v in tensors.items()
    }
    save_file(tensors, file)
    assert same(model, SDXL.load(tmp_path / "m", device="cpu"))


def test_full_size_names_all_find_their_place():
    """2,514 tensors of a released single file against the names and shapes of the released
    folder."""
    shapes = {name: tuple(shape) for name, shape in facts("single_file_keys").items()}
    renamed = single_file.rename(shapes)
    for part in weights.PARTS:
        got = {}
        for new, old, action in renamed[part]:
            shape = shapes[old]
            got[new] = list(
                {"squeeze": shape[:2], "transpose": shape[::-1], "": shape}.get(action)
                or (shape[0] // 3, *shape[1:])
            )
        want = {
            weights.released(part, k): v
            for k, v in facts(f"{part}_keys").items()
            if not k.endswith("position_ids")
        }
        assert got == want
    configs = single_file.configs(shapes, single_file.SDXL)
    for part in weights.PARTS:
        stated = {k: v for k, v in facts("configs")[part].items() if k in configs[part]}
        assert {k: configs[part][k] for k in stated} == stated, part
    assert single_file.identify(shapes, {}) == "sdxl"


def test_the_test_helper_writes_the_released_names():
    """original_names, which the other tests stand on, gives exactly the published list from the
    folder's names."""
    empty = lambda part: {
        k: torch.empty(v, device="meta")
        for k, v in facts(f"{part}_keys").items()
        if not k.endswith("position_ids")
    }
    got = {
        **original_names.unet(empty("unet")),
        **original_names.vae(empty("vae"), levels=4),
        **original_names.text_encoder(empty("text_encoder")),
        **original_names.text_encoder_2(empty("text_encoder_2")),
    }
    want = {
        k: v for k, v in facts("single_file_keys").items() if single_file.IGNORED.match(k) is None
    }
    assert {k: list(v.shape) for k, v in got.items()} == want


@pytest.mark.slow
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
        spans = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in maps.read_text().splitlines()
            if line.endswith(file)
        ]
        assert spans and all(
            any(low <= t.data_ptr() < high for low, high in spans) for t in half.values()
        )
    assert all(torch.equal(v, folder_tensors("unet")[k]) for k, v in list(half.items())[:5])


STRANGERS = {
    "lora": ({"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": 1}, "a LoRA or slider file"),
    "sd15": (
        {
            "cond_stage_model.transformer.text_model.embeddings.position_ids": 1,
            "model.diffusion_model.out.2.bias": 1,
        },
        "Stable Diffusion 1.x",
    ),
    "sd2": (
        {"cond_stage_model.model.ln_final.weight": 1, "model.diffusion_model.out.2.bias": 1},
        "Stable Diffusion 2",
    ),
    "refiner": (
        {"conditioner.embedders.0.model.ln_final.weight": 1, "model.diffusion_model.out.2.bias": 1},
        "refiner",
    ),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": 1}, "diffusion transformer"),
    "unet": ({"conv_in.weight": 1, "add_embedding.linear_1.weight": 1}, "one part"),
    "other": ({"a": 1}, "no SDXL checkpoint"),
    "half": (
        {"model.diffusion_model.out.2.bias": 1, "first_stage_model.quant_conv.bias": 1},
        "incomplete",
    ),
    "v": ({"v_pred": 1, "model.diffusion_model.out.2.bias": 1}, "v-prediction"),
}


def test_v_prediction_is_read_in_the_metadata_too():
    shapes = {name: tuple(shape) for name, shape in facts("single_file_keys").items()}
    for said, kind in (("v", "v-prediction"), ("epsilon", "sdxl")):
        assert kind in single_file.identify(shapes, {"modelspec.prediction_type": said})


@pytest.mark.slow
def test_what_other_tools_leave_in_one_file_is_left_out(model, tmp_path):
    """Projections of the first text encoder, which SDXL does not use."""
    names = ("text_projection", "transformer.text_projection.weight")
    more = {f"conditioner.embedders.0.{name}": torch.zeros(2, 2) for name in names}
    assert same(
        model,
        SDXL.load(
            one_file(tmp_path / "m.safetensors", lambda t: t | more), device="cpu", base=MINIATURE
        ),
    )


@pytest.mark.parametrize("name", STRANGERS)
def test_another_kind_of_file_is_named(name, tmp_path):
    tensors, what = STRANGERS[name]
    save_file({k: torch.zeros(v) for k, v in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{what}"):
        weights.find_weights(tmp_path / "x.safetensors")


@pytest.mark.slow
def test_pickles_and_broken_files_are_refused(tmp_path):
    whole = one_file(tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:100_000])
    (tmp_path / "p.ckpt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip.ckpt")
    (tmp_path / "empty.safetensors").touch()
    for name, what in (
        ("cut.safetensors", "cut short"),
        ("p.ckpt", "a pickle"),
        ("zip.ckpt", "a pickle"),
        ("empty.safetensors", "not a readable"),
        ("missing.safetensors", "no such"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{what}"):
            weights.find_weights(tmp_path / name)
    assert not weights.find_weights(whole).tokenizers  # enough for tools.py
    with pytest.raises(ValueError, match="whole.safetensors.*--base"):
        SDXL.load(whole)
    lacks = one_file(
        tmp_path / "lacks.safetensors",
        lambda t: {k: v for k, v in t.items() if "output_blocks.8.0.in_layers.2" not in k},
    )
    extra = one_file(
        tmp_path / "extra.safetensors",
        lambda t: t | {"model.diffusion_model.control.weight": torch.zeros(1)},
    )
    shape = one_file(
        tmp_path / "shape.safetensors",
        lambda t: t | {"model.diffusion_model.out.2.bias": torch.zeros(5)},
    )
    for file, what in (
        (lacks, "missing, such as up_blocks.2.resnets.2.conv1"),
        (extra, "control.weight"),
        (shape, "conv_out.bias"),
    ):
        with pytest.raises(ValueError, match=what):
            SDXL.load(file, device="cpu", base=MINIATURE)


def test_broken_folders_are_refused(tmp_path):
    def broken(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(MINIATURE, folder)
        change(folder)
        return folder

    edit = lambda file, **values: lambda folder: (folder / file).write_text(
        json.dumps(json.loads((folder / file).read_text()) | values)
    )

    def pickles(folder):
        shutil.move(
            folder / "vae" / "diffusion_pytorch_model.safetensors",
            folder / "vae" / "diffusion_pytorch_model.bin",
        )

    def escape(folder):
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
        )

    for change, what in (
        (
            lambda f: (f / "unet" / "config.json").write_text("{"),
            "unet/config.json: not valid JSON",
        ),
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json: missing"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizers cannot be read"),
        (pickles, "a pickle"),
        (escape, "names no files beside it"),
        (edit("scheduler/scheduler_config.json", prediction_type="v_prediction"), "v_prediction"),
        (edit("model_index.json", text_encoder=[None, None]), "refiner"),
        (edit("unet/config.json", block_out_channels=[64, 128, 256]), "do not fit"),
        (edit("unet/config.json", in_channels=9), "9 channels in, 4 out: a model for inpainting"),
        (edit("text_encoder/config.json", num_hidden_layers=4), "do not fit"),
    ):
        with pytest.raises(ValueError, match=what):
            SDXL.load(broken(change), device="cpu")
