"""Slider files: every naming in and out, what other tools make of ours and we of theirs, and what
is refused."""

import json
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from test_lora import trained_slider
from torch import nn

import lora
import sampler
from formats import single_file, slider_files
from sdxl import MINIATURE, SDXL
from sdxl_unet import UNet

ROOT = Path(__file__).parent.parent


def change_of(part: lora.LowRank):
    """(alpha / r) B A of one layer, in the shape of its weight."""
    return slider_files.delta_weight(*slider_files.concatenate([(part.delta(), 1.0)]))


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return UNet(single_file.SDXL["unet"])


def comfyui_names(depths=(0, 2, 10)):
    """ComfyUI's own table for SDXL, restated from its rules: it walks the original model's input,
    middle and output blocks and says which diffusers module each layer is; a LoRA key is
    "lora_unet_" and either name with underscores."""
    resnet = {
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    inside = [f"attn{i}.to_{c}" for i in (1, 2) for c in ("q", "k", "v", "out.0")] + [
        "ff.net.0.proj",
        "ff.net.2",
    ]
    transformer = lambda depth: ["proj_in", "proj_out"] + [
        f"transformer_blocks.{b}.{n}" for b in range(depth) for n in inside
    ]
    table = {}
    for x, depth in enumerate(depths):
        n = 1 + 3 * x
        for i in range(2):
            table |= {
                f"down_blocks.{x}.resnets.{i}.{new}": f"input_blocks.{n}.0.{old}"
                for old, new in resnet.items()
            }
            table |= {
                f"down_blocks.{x}.attentions.{i}.{t}": f"input_blocks.{n}.1.{t}"
                for t in transformer(depth)
                if depth
            }
            n += 1
        table[f"down_blocks.{x}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    table |= {f"mid_block.attentions.0.{t}": f"middle_block.1.{t}" for t in transformer(depths[-1])}
    for i, n in enumerate((0, 2)):
        table |= {
            f"mid_block.resnets.{i}.{new}": f"middle_block.{n}.{old}" for old, new in resnet.items()
        }
    for x, depth in enumerate(reversed(depths)):
        for i in range(3):
            n = 3 * x + i
            table |= {
                f"up_blocks.{x}.resnets.{i}.{new}": f"output_blocks.{n}.0.{old}"
                for old, new in resnet.items()
            }
            table |= {
                f"up_blocks.{x}.attentions.{i}.{t}": f"output_blocks.{n}.1.{t}"
                for t in transformer(depth)
                if depth
            }
        table[f"up_blocks.{x}.upsamplers.0.conv"] = (
            f"output_blocks.{3 * x + 2}.{2 if depth else 1}.conv"
        )
    ends = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
    }
    return table | {new: old for old, new in ends.items()}


def test_every_name_we_write_for_sdxl_is_one_that_comfyui_and_kohya_know(full_size):
    """ComfyUI takes either naming; kohya's trainer names the original model's modules; its
    converter's table is the same."""
    table = comfyui_names()
    flat = lambda name: "lora_unet_" + name.replace(".", "_")
    ours = slider_files.layer_names(full_size)
    for layers in lora.LAYERS:
        stems = {slider_files.kohya_name(name) for name in lora.target_layers(full_size, layers)}
        assert stems and stems <= {flat(new) for new in table}
        assert {ours["ldm"][s] for s in stems} <= {flat(old) for old in table.values()}
    assert all(
        ours["ldm"][flat(new)] == flat(old)
        for new, old in table.items()
        if flat(new) in ours["ldm"]
    )
    released = json.loads((ROOT / "tests/facts/sdxl_single_file_keys.json").read_text())
    original = {
        flat(n.removeprefix("model.diffusion_model.").removesuffix(".weight"))
        for n in released
        if n.startswith("model.diffusion_model.")
    }
    assert set(ours["ldm"].values()) <= original and len(set(ours["ldm"].values())) == len(
        ours["ldm"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("naming", slider_files.NAMINGS)
def test_round_trips_are_exact(model, tmp_path, naming, dtype):
    """Different ranks per layer, convolutions, alpha / r a power of two (which peft's naming folds
    into B without rounding)."""
    layers = lora.target_layers(model.unet, "all")
    torch.manual_seed(0)
    rank = {name: 2 ** (i % 4) for i, name in enumerate(layers)}
    slider = lora.Slider(layers, rank, alpha={name: 2.0 * r for name, r in rank.items()})
    for part in slider.children():
        for p in part.parameters():
            p.data = torch.randn_like(p).to(dtype).float()
    lora.save(
        tmp_path / "a.safetensors",
        slider,
        {"kind": "x"},
        naming=naming,
        unet=model.unet,
        dtype=dtype,
    )
    first = slider_files.read(tmp_path / "a.safetensors", model.unet)
    assert (
        first.naming == naming
        and first.metadata["kind"] == "x"
        and first.metadata["ss_network_dim"] == "8"
    )
    back = lora.load(tmp_path / "a.safetensors", model.unet)
    assert all(
        torch.equal(change_of(back.get_submodule(n)), change_of(part))
        for n, part in slider.named_children()
    )
    slider_files.write(
        tmp_path / "b.safetensors", first.parts, first.metadata, naming, model.unet, dtype
    )
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == dtype for k in a)


def test_other_spellings_of_the_same_slider(model, tmp_path):
    slider = trained_slider(model.unet, rank=3, alpha=3.0, layers="attn")
    lora.save(tmp_path / "ours.safetensors", slider, {}, dtype=torch.float32)
    ours = load_file(tmp_path / "ours.safetensors")
    peft = {}
    lora.save(
        tmp_path / "peft.safetensors",
        slider,
        {},
        naming="peft",
        unet=model.unet,
        dtype=torch.float32,
    )
    for name, t in load_file(tmp_path / "peft.safetensors").items():
        peft[name] = t
    spellings = {
        "published.pt": ours,
        "no_alpha": {k: v for k, v in ours.items() if not k.endswith("alpha")},
        "comfyui": {"diffusion_model." + k.removeprefix("unet."): v for k, v in peft.items()},
        "base_model": {"base_model.model." + k.removeprefix("unet."): v for k, v in peft.items()},
        "default": {
            k.replace("lora_A.weight", "lora_A.default.weight").replace(
                "lora_B.weight", "lora_B.default.weight"
            ): v
            for k, v in peft.items()
        },
        "dots": {
            k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v
            for k, v in peft.items()
        },
        "processor": {
            re.sub(
                r"\.to_(q|k|v|out)(\.0)?\.lora_([AB])\.weight",
                lambda m: f".processor.to_{m[1]}_lora.{'down' if m[3] == 'A' else 'up'}.weight",
                k,
            ): v
            for k, v in peft.items()
        },
    }
    for name, tensors in spellings.items():
        path = tmp_path / (name if "." in name else name + ".safetensors")
        torch.save(tensors, path) if path.suffix == ".pt" else save_file(
            {k: v.clone() for k, v in tensors.items()}, path
        )
        back = lora.load(path, model.unet)
        assert all(
            torch.allclose(change_of(back.get_submodule(n)), change_of(part), atol=1e-7)
            for n, part in slider.named_children()
        ), name


def test_text_encoder_parts_are_reported(model, tmp_path):
    lora.save(tmp_path / "a.safetensors", trained_slider(model.unet, layers="attn"), {})
    tensors = load_file(tmp_path / "a.safetensors")
    for ending in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors[f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{ending}"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.warns(
        UserWarning, match="b.safetensors: its 1 changes of the text encoders are left out"
    ):
        lora.load(tmp_path / "b.safetensors", model.unet)


def bad_files(folder, good: dict):
    """name -> what the line must say: each a file that must not be used."""
    first = next(k for k in good if k.endswith("lora_up.weight"))
    stem = first.removesuffix(".lora_up.weight")
    write = lambda name, tensors: save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / name
    )
    for kind, ending in (("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("dora", "dora_scale")):
        write(f"{kind}.safetensors", good | {f"{stem}.{ending}": torch.zeros(2, 2)})
    write("nan.safetensors", good | {first: good[first] * float("nan")})
    write("rank.safetensors", good | {first: good[first][:, :1]})
    write("half.safetensors", {k: v for k, v in good.items() if k != first})
    write(
        "nowhere.safetensors",
        good
        | {
            "lora_unet_nowhere.lora_down.weight": torch.zeros(2, 2),
            "lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2),
        },
    )
    write("alphas.safetensors", good | {f"{stem}.alpha": torch.zeros(3)})
    write("other.safetensors", {"a": torch.zeros(2)})
    whole = (folder / "nan.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:5000])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "lies.safetensors").write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    (folder / "code.pt").write_bytes(pickle.dumps(Bomb()))
    (folder / "list.pt").write_bytes(b"")
    torch.save([1, 2], folder / "list.pt")
    with open(folder / "huge.safetensors", "wb") as f:
        f.truncate(slider_files.LARGEST + 1)  # sparse: takes no room
    return {
        "loha.safetensors": "LoHa",
        "lokr.safetensors": "LoKr",
        "dora.safetensors": "DoRA",
        "nan.safetensors": "NaN",
        "rank.safetensors": "damaged",
        "half.safetensors": "no lora_up",
        "nowhere.safetensors": "another model",
        "alphas.safetensors": "alpha",
        "other.safetensors": "no part of one",
        "cut.safetensors": "cut short",
        "empty.safetensors": "cut short",
        "lies.safetensors": "cut short",
        "code.pt": "was not read",
        "list.pt": "not a dict of tensors",
        "huge.safetensors": "no LoRA's size",
        "missing.safetensors": "no such file",
    }


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in a pickle was run",))


def test_what_must_not_be_used_is_refused_by_name(model, inputs, tmp_path):
    lora.save(tmp_path / "good.safetensors", trained_slider(model.unet, layers="attn"), {})
    for name, says in bad_files(tmp_path, load_file(tmp_path / "good.safetensors")).items():
        with pytest.raises(ValueError, match=says) as error:
            lora.load(tmp_path / name, model.unet)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not any(m._forward_hooks for m in model.unet.modules())


# ---------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def pipeline():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        MINIATURE, torch_dtype=torch.float32, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures_of_both(model, pipeline, slider, scale, steps=8):
    """Final latents of the same seed: ours, and the pipeline's with its adapter at `scale`."""
    prompt, x_T = ["a photo of a person"], sampler.noise([3], (4, 16, 16))
    pipeline.set_adapters(["theirs"], [scale])
    theirs = pipeline(
        prompt=prompt,
        latents=x_T,
        num_inference_steps=steps,
        guidance_scale=5.0,
        height=128,
        width=128,
        output_type="latent",
    ).images
    ours = sampler.sample(
        model.unet,
        x_T,
        model.condition(prompt),
        model.condition([""]),
        alpha_bar=model.alpha_bar,
        steps=steps,
        guidance=5.0,
        sliders=[(slider, scale)],
        start=0.0,
    )
    return ours, theirs


@pytest.mark.parametrize("naming", slider_files.NAMINGS)
def test_diffusers_draws_our_sliders_as_we_do(model, pipeline, tmp_path, naming):
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet), rank=4, alpha=1.0).requires_grad_(False)
    for part in slider.children():
        nn.init.normal_(part.lora_up.weight, std=0.2)
    lora.save(
        tmp_path / "a.safetensors", slider, {}, naming=naming, unet=model.unet, dtype=torch.float32
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="theirs")
    plain = sampler.sample(
        model.unet,
        sampler.noise([3], (4, 16, 16)),
        model.condition(["a photo of a person"]),
        model.condition([""]),
        alpha_bar=model.alpha_bar,
        steps=8,
    )
    try:
        for scale in (-2.0, 0.5, 3.0):
            ours, theirs = pictures_of_both(model, pipeline, slider, scale)
            assert ((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3, scale
            assert (ours - plain).abs().max() > 0.05
    finally:
        pipeline.unload_lora_weights()


def test_we_draw_diffusers_loras_as_it_does(model, pipeline, tmp_path):
    import peft

    pipeline.unet.add_adapter(
        peft.LoraConfig(
            r=3,
            lora_alpha=3,
            init_lora_weights=False,
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"],
        ),
        "theirs",
    )
    state = peft.get_peft_model_state_dict(pipeline.unet, adapter_name="theirs")
    for p in state.values():
        p.mul_(0.3)
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="b.safetensors")
    slider = lora.load(tmp_path / "b.safetensors", model.unet)
    try:
        for scale in (-2.0, 0.5, 3.0):
            ours, theirs = pictures_of_both(model, pipeline, slider, scale)
            assert ((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3, scale
    finally:
        pipeline.unet.delete_adapters("theirs")


# ------------------------------------------------------------------------------------ extras.tools


def tool(*words):
    done = run(" ".join(shlex.quote(str(word)) for word in ("-m", "extras.tools", *words)))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alpha_in_diffusers_metadata_is_in_force(model, pipeline, tmp_path):
    """Its save_lora_weights writes alpha into the metadata alone: rank 4 with alpha 1 is a quarter
    of what B A says."""
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=1, init_lora_weights=False, target_modules=["to_q", "conv2"]
    )
    pipeline.unet.add_adapter(config, "theirs")
    state = peft.get_peft_model_state_dict(pipeline.unet, adapter_name="theirs")
    type(pipeline).save_lora_weights(
        tmp_path,
        unet_lora_layers=state,
        weight_name="b.safetensors",
        unet_lora_adapter_metadata=config.to_dict(),
    )
    slider = lora.load(tmp_path / "b.safetensors", model.unet)
    try:
        ours, theirs = pictures_of_both(model, pipeline, slider, 1.0)
        assert ((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3
        assert {part.factor for part in slider.children()} == {0.25}
    finally:
        pipeline.unet.delete_adapters("theirs")


def test_damaged_pt_files_are_one_line(model, tmp_path):
    lora.save(tmp_path / "good.safetensors", trained_slider(model.unet, layers="xattn", rank=1), {})
    torch.save(load_file(tmp_path / "good.safetensors"), tmp_path / "good.pt")
    whole, g = bytearray((tmp_path / "good.pt").read_bytes()), torch.Generator().manual_seed(0)
    for i in range(60):
        cut = int(torch.randint(len(whole), (1,), generator=g))
        broken = (
            whole[:cut]
            if i % 2
            else whole[: cut // 8] + bytes([whole[cut // 8] ^ 255]) + whole[cut // 8 + 1 :]
        )
        (tmp_path / "bad.pt").write_bytes(broken)
        try:
            lora.load(
                tmp_path / "bad.pt", model.unet
            )  # a flipped bit may leave a file that is still whole
        except ValueError as error:
            assert "bad.pt" in str(error) and "\n" not in str(error)


@pytest.fixture
def two(model, tmp_path):
    sliders = [
        trained_slider(model.unet, 1, rank=2, alpha=1.0, layers="attn"),
        trained_slider(model.unet, 2, rank=5, alpha=3.0, layers="noxattn"),
    ]
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for s, path in zip(sliders, paths):
        lora.save(path, s, {"kind": "text slider"}, dtype=torch.float32)
    return sliders, paths


def changes_of(slider, unet):
    """{layer: dense change}."""
    return {
        n: change_of(slider.get_submodule(n)) if n in dict(slider.named_children()) else 0.0
        for n in slider_files.layers_by_kohya_name(unet)
    }


def test_merging_files_is_exact_and_of_lower_rank_the_nearest(model, tmp_path, two):
    (one, other), paths = two
    tool(
        "merge",
        f"{paths[0]}:1.5",
        f"{paths[1]}:-0.5",
        "--store",
        "float32",
        "--out",
        tmp_path / "all.safetensors",
    )
    tool(
        "merge",
        f"{paths[0]}:1.5",
        f"{paths[1]}:-0.5",
        "--store",
        "float32",
        "--rank",
        3,
        "--out",
        tmp_path / "low.safetensors",
    )
    a, b = changes_of(one, model.unet), changes_of(other, model.unet)
    whole, low = (
        changes_of(lora.load(tmp_path / f"{n}.safetensors", model.unet), model.unet)
        for n in ("all", "low")
    )
    for name in a:
        expected = 1.5 * a[name] - 0.5 * b[name]
        if torch.is_tensor(expected):
            assert torch.allclose(whole[name], expected, atol=1e-6)
            S = torch.linalg.svdvals(expected.flatten(1).double())
            error = (low[name] - expected).flatten(1).double().norm()
            assert error <= S[3:].norm() + 1e-5  # Eckart-Young: no rank-3 matrix is nearer
    # Beyond a layer's full rank (here 64), whole and cut: both load and say the same.
    tool("merge", *[paths[1]] * 15, "--store", "float32", "--out", tmp_path / "many.safetensors")
    tool(
        "merge",
        *[paths[1]] * 15,
        "--store",
        "float32",
        "--rank",
        70,
        "--out",
        tmp_path / "cut.safetensors",
    )
    for name, change in changes_of(other, model.unet).items():
        if torch.is_tensor(change):
            break
    many, cut = (lora.load(tmp_path / f"{n}.safetensors", model.unet) for n in ("many", "cut"))
    assert torch.allclose(
        change_of(many.get_submodule(name)), 15 * change, atol=1e-4
    ) and torch.allclose(change_of(cut.get_submodule(name)), 15 * change, atol=1e-3)
    text = tool("info", paths[0], tmp_path / "all.safetensors")
    assert "rank 2" in text and "rank 2, 5, 7" in text and "cosine" in text


def test_baking_in_and_extracting_again(model, inputs, tmp_path, two):
    (one, _), paths = two
    tool("bake", f"{paths[0]}:2", "--out", tmp_path / "baked")
    baked = SDXL.load(tmp_path / "baked", device="cpu")
    merged = SDXL.load(device="cpu")
    one.merge(merged.unet, 2.0)
    with torch.no_grad():
        a, b = baked.unet(*inputs), merged.unet(*inputs)
    assert (a - b).norm() < 3e-3 * b.norm()  # the folder is in float16
    said = tool(
        "extract",
        tmp_path / "baked",
        "--rank",
        2,
        "--layers",
        "attn",
        "--store",
        "float32",
        "--out",
        tmp_path / "back.safetensors",
    )
    assert "rank 2 holds 9" in said or "rank 2 holds 100" in said
    found, expected = (
        changes_of(lora.load(tmp_path / "back.safetensors", model.unet), model.unet),
        changes_of(one, model.unet),
    )
    for name, change in expected.items():
        if torch.is_tensor(change):
            assert (found[name] - 2 * change).norm() < 0.1 * change.norm()


@pytest.mark.slow
def test_a_single_file_can_be_baked_into_too(model, inputs, tmp_path, two):
    from test_weights import one_file

    _, paths = two
    one_file(tmp_path / "m.safetensors")
    tool(
        "bake",
        f"{paths[1]}:1",
        "--model",
        tmp_path / "m.safetensors",
        "--base",
        MINIATURE,
        "--out",
        tmp_path / "n.safetensors",
    )
    tool("bake", f"{paths[1]}:1", "--out", tmp_path / "folder")
    a, b = (
        SDXL.load(tmp_path / "n.safetensors", device="cpu", base=MINIATURE),
        SDXL.load(tmp_path / "folder", device="cpu"),
    )
    with torch.no_grad():
        assert torch.equal(a.unet(*inputs), b.unet(*inputs))


@pytest.mark.slow
def test_like_trains_the_same_slider_again(tmp_path):
    train = [sys.executable, "train_text.py"]
    first = [
        *train,
        "--pos",
        "a photo of a person, smiling",
        "--neg",
        "a photo of a person, frowning",
        "--preserve",
        "man, woman",
        "--preserve",
        "with a hat",
        "--steps",
        "3",
        "--trajectories",
        "2",
        "--per-trajectory",
        "3",
        "--denoising-steps",
        "6",
        "--probe",
        "0",
        "--rank",
        "2",
        "--seed",
        "5",
        "--positive-only",
        "--out",
        str(tmp_path / "a.safetensors"),
    ]
    for command in (
        first,
        [
            *train,
            "--like",
            str(tmp_path / "a.safetensors"),
            "--out",
            str(tmp_path / "b.safetensors"),
        ],
        [
            *train,
            "--like",
            str(tmp_path / "a.safetensors"),
            "--rank",
            "3",
            "--out",
            str(tmp_path / "c.safetensors"),
        ],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    a, b, c = (load_file(tmp_path / f"{n}.safetensors") for n in "abc")
    assert a.keys() == b.keys() == c.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(len(v) == 3 for k, v in c.items() if k.endswith("lora_down.weight"))
    done = subprocess.run(
        [sys.executable, "train_pairs.py", "--like", str(tmp_path / "a.safetensors")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "trained by another script" in done.stderr
        and "Traceback" not in done.stderr
    )
