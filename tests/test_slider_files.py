"""Slider files: every naming in and out, what other tools make of ours and we of theirs, and what
is refused."""

import json
import pickle
import re

import pytest
import torch
import v_network
from commands import ROOT, TRAIN, run
from safetensors.torch import load_file, save_file
from test_lora import trained_slider
from test_weights import one_file
from torch import nn

import lora
import sampler
from formats import single_file, slider_files
from sdxl import MINIATURE, SDXL
from sdxl_unet import UNet


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
    inside = [f"attn{i}.to_{c}" for i in (1, 2) for c in ("q", "k", "v", "out.0")]
    inside += ["ff.net.0.proj", "ff.net.2"]
    table = {}

    def add_resnet(new_block, old_block):
        for old, new in resnet.items():
            table[f"{new_block}.{new}"] = f"{old_block}.{old}"

    def add_transformer(new_block, old_block, depth):
        blocks = [f"transformer_blocks.{b}.{name}" for b in range(depth) for name in inside]
        for name in ["proj_in", "proj_out", *blocks] if depth else []:
            table[f"{new_block}.{name}"] = f"{old_block}.{name}"

    for x, depth in enumerate(depths):
        n = 1 + 3 * x
        for i in range(2):
            add_resnet(f"down_blocks.{x}.resnets.{i}", f"input_blocks.{n + i}.0")
            add_transformer(f"down_blocks.{x}.attentions.{i}", f"input_blocks.{n + i}.1", depth)
        table[f"down_blocks.{x}.downsamplers.0.conv"] = f"input_blocks.{n + 2}.0.op"
    add_transformer("mid_block.attentions.0", "middle_block.1", depths[-1])
    for i, n in enumerate((0, 2)):
        add_resnet(f"mid_block.resnets.{i}", f"middle_block.{n}")
    for x, depth in enumerate(reversed(depths)):
        for i in range(3):
            n = 3 * x + i
            add_resnet(f"up_blocks.{x}.resnets.{i}", f"output_blocks.{n}.0")
            add_transformer(f"up_blocks.{x}.attentions.{i}", f"output_blocks.{n}.1", depth)
        upsampler = f"output_blocks.{3 * x + 2}.{2 if depth else 1}.conv"
        table[f"up_blocks.{x}.upsamplers.0.conv"] = upsampler
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
    known = {flat(new): flat(old) for new, old in table.items()}
    assert all(known[new] == old for new, old in ours["ldm"].items() if new in known)
    released = json.loads((ROOT / "tests/facts/sdxl_single_file_keys.json").read_text())
    prefix = "model.diffusion_model."
    in_unet = [name.removeprefix(prefix) for name in released if name.startswith(prefix)]
    original = {flat(name.removesuffix(".weight")) for name in in_unet}
    written = set(ours["ldm"].values())
    assert written <= original and len(written) == len(ours["ldm"])


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
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lora.save(one, slider, {"kind": "x"}, naming=naming, unet=model.unet, dtype=dtype)
    first = slider_files.read(one, model.unet)
    assert first.naming == naming and first.metadata["kind"] == "x"
    assert first.metadata["ss_network_dim"] == "8"
    back = lora.load(one, model.unet)
    for name, part in slider.named_children():
        assert torch.equal(change_of(back.get_submodule(name)), change_of(part))
    slider_files.write(other, first.deltas, first.metadata, naming, model.unet, dtype)
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == dtype for k in a)


def test_other_spellings_of_the_same_slider(model, tmp_path):
    slider = trained_slider(model.unet, rank=3, alpha=3.0, layers="attn")
    lora.save(tmp_path / "ours.safetensors", slider, {}, dtype=torch.float32)
    ours = load_file(tmp_path / "ours.safetensors")
    in_peft = dict(naming="peft", unet=model.unet, dtype=torch.float32)
    lora.save(tmp_path / "peft.safetensors", slider, {}, **in_peft)
    peft = load_file(tmp_path / "peft.safetensors")

    def of_a_processor(name):
        kind = {"A": "down", "B": "up"}
        new = lambda m: f".processor.to_{m[1]}_lora.{kind[m[3]]}.weight"
        return re.sub(r"\.to_(q|k|v|out)(\.0)?\.lora_([AB])\.weight", new, name)

    spellings = {
        "comfyui": lambda name: "diffusion_model." + name.removeprefix("unet."),
        "base_model": lambda name: "base_model.model." + name.removeprefix("unet."),
        "default": lambda name: re.sub(r"lora_([AB])\.", r"lora_\1.default.", name),
        "dots": lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        "processor": of_a_processor,
    }
    files = {
        f"{kind}.safetensors": {spell(name): tensor.clone() for name, tensor in peft.items()}
        for kind, spell in spellings.items()
    }
    files["no_alpha.safetensors"] = {k: v for k, v in ours.items() if not k.endswith("alpha")}
    files["published.pt"] = ours
    for name, tensors in files.items():
        write = torch.save if name.endswith(".pt") else save_file
        write(tensors, tmp_path / name)
        back = lora.load(tmp_path / name, model.unet)
        for layer, part in slider.named_children():
            found = change_of(back.get_submodule(layer))
            assert torch.allclose(found, change_of(part), atol=1e-7), name


def bad_files(folder, good: dict):
    """name -> what the line must say: each a file that must not be used."""
    first = next(k for k in good if k.endswith("lora_up.weight"))
    stem = first.removesuffix(".lora_up.weight")

    def write(name, tensors):
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)

    for kind, ending in (("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("dora", "dora_scale")):
        write(f"{kind}.safetensors", good | {f"{stem}.{ending}": torch.zeros(2, 2)})
    write("nan.safetensors", good | {first: good[first] * float("nan")})
    write("rank.safetensors", good | {first: good[first][:, :1]})
    scalar = {f"{stem}.lora_down.weight": torch.tensor(1.0)}
    write("scalar.safetensors", good | scalar)
    write("half.safetensors", {k: v for k, v in good.items() if k != first})
    nowhere = [f"lora_unet_nowhere.lora_{kind}.weight" for kind in ("down", "up")]
    write("nowhere.safetensors", good | {name: torch.zeros(2, 2) for name in nowhere})
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
        "scalar.safetensors": "damaged",
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


def pictures_of_both(model, pipeline, slider, scale, steps=8):
    """Final latents of the same seed: ours, and the pipeline's with its adapter at `scale`."""
    prompt, x_T = ["a photo of a person"], sampler.noise([3], (4, 16, 16))
    pipeline.set_adapters(["theirs"], [scale])
    settings = dict(num_inference_steps=steps, guidance_scale=5.0, height=128, width=128)
    theirs = pipeline(prompt=prompt, latents=x_T, output_type="latent", **settings).images
    return ours_alone(model, [(slider, scale)], steps), theirs


def ours_alone(model, sliders=(), steps=8):
    cond, uncond = model.condition(["a photo of a person"]), model.condition([""])
    settings = dict(alpha_bar=model.alpha_bar, steps=steps, guidance=5.0, start=0.0)
    x_T = sampler.noise([3], (4, 16, 16))
    return sampler.sample(model.unet, x_T, cond, uncond, sliders=sliders, **settings)


# Every naming is looked at in every run of the tests: in one step by test_exchange.py.
OTHERS = [name for name in slider_files.NAMINGS if name != "kohya"]
NAMINGS = ["kohya", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("naming", NAMINGS)
def test_diffusers_draws_our_sliders_as_we_do(model, pipeline, tmp_path, naming):
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet), rank=4, alpha=1.0).requires_grad_(False)
    for part in slider.children():
        nn.init.normal_(part.lora_up.weight, std=0.2)
    as_theirs = dict(naming=naming, unet=model.unet, dtype=torch.float32)
    lora.save(tmp_path / "a.safetensors", slider, {}, **as_theirs)
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="theirs")
    plain = ours_alone(model)
    try:
        for scale in (-2.0, 0.5, 3.0):
            ours, theirs = pictures_of_both(model, pipeline, slider, scale)
            assert ((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3, scale
            assert (ours - plain).abs().max() > 0.05
    finally:
        pipeline.unload_lora_weights()


def test_we_draw_diffusers_loras_as_it_does(model, pipeline, tmp_path):
    import peft

    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"]
    settings = dict(r=3, lora_alpha=3, init_lora_weights=False, target_modules=layers)
    pipeline.unet.add_adapter(peft.LoraConfig(**settings), "theirs")
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


def tool(command: str) -> str:
    done = run(f"-m extras.tools {command}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alpha_in_diffusers_metadata_is_in_force(model, pipeline, tmp_path):
    """Its save_lora_weights writes alpha into the metadata alone: rank 4 with alpha 1 is a quarter
    of what B A says."""
    import peft

    settings = dict(r=4, lora_alpha=1, init_lora_weights=False, target_modules=["to_q", "conv2"])
    config = peft.LoraConfig(**settings)
    pipeline.unet.add_adapter(config, "theirs")
    state = peft.get_peft_model_state_dict(pipeline.unet, adapter_name="theirs")
    options = dict(weight_name="b.safetensors", unet_lora_adapter_metadata=config.to_dict())
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=state, **options)
    slider = lora.load(tmp_path / "b.safetensors", model.unet)
    try:
        ours, theirs = pictures_of_both(model, pipeline, slider, 1.0)
        assert ((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3
        assert {part.alpha_over_r for part in slider.children()} == {0.25}
    finally:
        pipeline.unet.delete_adapters("theirs")


def test_damaged_pt_files_are_one_line(model, tmp_path):
    lora.save(tmp_path / "good.safetensors", trained_slider(model.unet, layers="xattn", rank=1), {})
    torch.save(load_file(tmp_path / "good.safetensors"), tmp_path / "good.pt")
    refused = 0
    whole, g = bytearray((tmp_path / "good.pt").read_bytes()), torch.Generator().manual_seed(0)
    for i in range(60):
        at = int(torch.randint(len(whole), (1,), generator=g))
        broken = bytearray(whole)
        if i % 2:
            del broken[at:]
        else:
            broken[at // 8] ^= 255
        (tmp_path / "bad.pt").write_bytes(broken)
        try:
            # Flipped bits may leave a file that is still whole.
            lora.load(tmp_path / "bad.pt", model.unet)
        except ValueError as error:
            refused += 1
            assert "bad.pt" in str(error) and "\n" not in str(error)
    assert refused >= 30  # all that were cut short, at the least


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
    """{layer: dense change, or 0.0 where the slider has none}."""
    changes = {name: change_of(part) for name, part in slider.named_children()}
    return {name: changes.get(name, 0.0) for name in slider_files.layers_by_kohya_name(unet)}


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_a_merged_file_says_what_its_sliders_model_predicts(model, tmp_path, prediction):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file in files:
        metadata = {"modelspec.prediction_type": prediction}
        lora.save(file, trained_slider(model.unet, 1, rank=2), metadata)
    merged = tmp_path / "merged.safetensors"
    tool(f"merge {files[0]} {files[1]} --out {merged}")
    assert slider_files.read(merged, model.unet).metadata["modelspec.prediction_type"] == prediction


def test_files_of_models_that_predict_different_things_are_not_merged_unasked(model, tmp_path):
    files = [tmp_path / f"{prediction}.safetensors" for prediction in ("v", "epsilon")]
    for file in files:
        metadata = {"modelspec.prediction_type": file.stem}
        lora.save(file, trained_slider(model.unet, 1, rank=2), metadata)
    merged = tmp_path / "merged.safetensors"
    command = f"merge {files[0]} {files[1]} --out {merged}"
    done = run(f"-m extras.tools {command}")
    assert done.returncode == 2 and "models that predict epsilon and v" in done.stderr
    assert "Traceback" not in done.stderr and not merged.exists()
    tool(f"{command} --prediction v")
    assert slider_files.read(merged, model.unet).metadata["modelspec.prediction_type"] == "v"


def test_merging_files_is_exact_and_of_lower_rank_the_nearest(model, tmp_path, two):
    (one, other), paths = two
    file = lambda name: tmp_path / f"{name}.safetensors"
    exactly = "--store float32 --out"
    both = f"{paths[0]}:1.5 {paths[1]}:-0.5"
    tool(f"merge {both} {exactly} {file('all')}")
    tool(f"merge {both} --rank 3 {exactly} {file('low')}")
    a, b = changes_of(one, model.unet), changes_of(other, model.unet)
    load = lambda name: lora.load(file(name), model.unet)
    whole, low = (changes_of(load(name), model.unet) for name in ("all", "low"))
    for name in a:
        expected = 1.5 * a[name] - 0.5 * b[name]
        if torch.is_tensor(expected):
            assert torch.allclose(whole[name], expected, atol=1e-6)
            S = torch.linalg.svdvals(expected.flatten(1).double())
            error = (low[name] - expected).flatten(1).double().norm()
            assert error <= S[3:].norm() + 1e-5  # Eckart-Young: no rank-3 matrix is nearer
    # Beyond a layer's full rank (here 64), whole and cut: both load and say the same.
    fifteen = " ".join([str(paths[1])] * 15)
    tool(f"merge {fifteen} {exactly} {file('many')}")
    tool(f"merge {fifteen} --rank 70 {exactly} {file('cut')}")
    name, part = next(other.named_children())
    many, cut = (change_of(load(kind).get_submodule(name)) for kind in ("many", "cut"))
    assert torch.allclose(many, 15 * change_of(part), atol=1e-4)
    assert torch.allclose(cut, 15 * change_of(part), atol=1e-3)
    text = tool(f"info {paths[0]} {file('all')}")
    assert "rank 2" in text and "rank 2, 5, 7" in text and "cosine" in text


def test_baking_in_and_extracting_again(model, inputs, tmp_path, two):
    (one, _), paths = two
    (tmp_path / "baked.tmp").mkdir()
    (tmp_path / "baked.tmp" / "mine").write_text("mine")
    refused = run(f"-m extras.tools bake {paths[0]}:2 --out {tmp_path}/baked")
    assert refused.returncode == 2 and "baked.tmp: in the way" in refused.stderr
    (tmp_path / "baked.tmp" / "mine").unlink()
    (tmp_path / "baked.tmp").rmdir()
    tool(f"bake {paths[0]}:2 --out {tmp_path}/baked")
    baked = SDXL.load(tmp_path / "baked", device="cpu")
    one.attach(model.unet)
    with torch.no_grad(), one.at(2.0):
        a, b = baked.unet(*inputs), model.unet(*inputs)
    one.detach()
    assert (a - b).norm() < 3e-3 * b.norm()  # the folder is in float16
    back, options = tmp_path / "back.safetensors", "--rank 2 --layers attn --store float32"
    v_model = v_network.folder(tmp_path / "v", prediction_type="v_prediction")
    printed = tool(f"extract {tmp_path}/baked --model {v_model} {options} --out {back}")
    assert "rank 2 holds 9" in printed or "rank 2 holds 100" in printed
    assert slider_files.read(back, model.unet).metadata["modelspec.prediction_type"] == "v"
    found = changes_of(lora.load(back, model.unet), model.unet)
    expected = changes_of(one, model.unet)
    for name, change in expected.items():
        if torch.is_tensor(change):
            assert (found[name] - 2 * change).norm() < 0.1 * change.norm()


@pytest.mark.slow
def test_a_single_file_can_be_baked_into_too(model, inputs, tmp_path, two):
    _, paths = two
    one_file(tmp_path / "m.safetensors")
    single = f"--model {tmp_path}/m.safetensors --base {MINIATURE}"
    tool(f"bake {paths[1]}:1 {single} --out {tmp_path}/n.safetensors")
    tool(f"bake {paths[1]}:1 --out {tmp_path}/folder")
    a = SDXL.load(tmp_path / "n.safetensors", device="cpu", base=MINIATURE)
    b = SDXL.load(tmp_path / "folder", device="cpu")
    with torch.no_grad():
        assert torch.equal(a.unet(*inputs), b.unet(*inputs))


def test_like_trains_the_same_slider_again(tmp_path):
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    options = "--preserve 'man, woman' --preserve 'with a hat' --rank 2 --seed 5 --positive-only"
    small = "--trajectories 1 --per-trajectory 3 --denoising-steps 6 --size 64"
    small += " --steps 3 --batch 3 --probe 0"
    like = f"train_text.py --like {a}"
    commands = [f"{TRAIN} {options} {small} --out {a}", f"{like} --out {b}"]
    for command in (*commands, f"{like} --rank 3 --out {c}"):
        done = run(command)
        assert done.returncode == 0, done.stderr
    a_tensors, b_tensors, c_tensors = (load_file(file) for file in (a, b, c))
    assert a_tensors.keys() == b_tensors.keys() == c_tensors.keys()
    assert all(torch.equal(a_tensors[k], b_tensors[k]) for k in a_tensors)
    assert all(len(v) == 3 for k, v in c_tensors.items() if k.endswith("lora_down.weight"))
    done = run(f"train_pairs.py --like {a}")
    assert done.returncode == 2 and "trained by another script" in done.stderr
    assert "Traceback" not in done.stderr
