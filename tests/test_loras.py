"""LoRAs of other people: parts for the text encoders, what is left out of a file, and what slider
files say of where they come from."""

import copy
import hashlib
import json

import pytest
import torch
from commands import TRAIN, run
from safetensors.torch import load_file, save_file
from test_cli import metadata_of
from test_lora import trained_slider
from test_slider_files import change_of, ours_alone
from test_weights import one_file

import lora
import sampler
from formats import slider_files
from sdxl import MINIATURE, SDXL
from support import cli, inversions, probe
from support.merge import merge_files

KOHYAS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
Q = "encoder.layers.0.self_attn.q_proj"


# ----------------------------------------------------------------------------------- text encoders


@pytest.fixture
def pipeline(pipeline):
    """A copy for each test, as LoRAs are fused into it."""
    return copy.deepcopy(pipeline)


def save_as_kohya(path, pipeline):
    """Random changes of rank 4 and alpha 2 of all attention, as kohya's trainer names them."""
    g, tensors = torch.Generator().manual_seed(0), {}
    random = lambda *shape: torch.randn(*shape, generator=g)
    for part, prefix in KOHYAS.items():
        for name, layer in getattr(pipeline, part).named_modules():
            if ".attn" in name or "self_attn" in name:
                if isinstance(layer, torch.nn.Linear):
                    name = name if part == "unet" or "text_model" in name else f"text_model.{name}"
                    stem, (out, fan_in) = prefix + name.replace(".", "_"), layer.weight.shape
                    tensors[f"{stem}.lora_down.weight"] = random(4, fan_in) * fan_in**-0.5
                    tensors[f"{stem}.lora_up.weight"] = random(out, 4) * layer.weight.std() / 2
                    tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)


def save_as_diffusers(path, pipeline):
    """Random changes as peft makes them, alpha in the metadata alone, another in each part."""
    import peft

    torch.manual_seed(0)
    given = {}
    for alpha, (part, prefix) in enumerate(KOHYAS.items(), 2):
        network = copy.deepcopy(getattr(pipeline, part))
        layers = ["to_q", "to_v"] if part == "unet" else ["q_proj", "fc2"]
        settings = dict(r=4, lora_alpha=alpha, init_lora_weights=False, target_modules=layers)
        config = peft.LoraConfig(**settings)
        state = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(config, network))
        given[f"{part}_lora_layers"] = {k: v * 0.3 for k, v in state.items()}
        given[f"{part}_lora_adapter_metadata"] = config.to_dict()
    type(pipeline).save_lora_weights(path.parent, weight_name=path.name, **given)


@pytest.mark.parametrize("save", [save_as_kohya, save_as_diffusers])
def test_a_lora_with_text_encoders_draws_what_diffusers_draws_with_it(pipeline, tmp_path, save):
    path = tmp_path / "style.safetensors"
    save(path, pipeline)
    merged = SDXL.load(device="cpu")
    before = [list(encoder.parameters()) for encoder in merged.text_encoders]
    before = [[p.clone() for p in parameters] for parameters in before]
    merge_files(merged, [(path, 0.7)])
    for encoder, parameters in zip(merged.text_encoders, before):
        changed = [not torch.equal(p, q) for p, q in zip(encoder.parameters(), parameters)]
        assert 6 <= sum(changed) < len(changed)
    ours = ours_alone(merged)
    unet_alone = SDXL.load(device="cpu")
    unet_alone.unet = merged.unet
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    pipeline.fuse_lora(lora_scale=0.7)
    settings = dict(num_inference_steps=8, guidance_scale=5.0, height=128, width=128)
    settings |= dict(latents=sampler.noise([3], (4, 16, 16)), output_type="latent")
    theirs = pipeline(prompt=["a photo of a person"], **settings).images
    error = lambda latents: (latents - theirs).abs().max() / theirs.abs().max()
    assert error(ours) < 1e-3 < error(ours_alone(unet_alone)) / 5


def test_the_names_of_both_text_encoders_layers(model, tmp_path):
    """Each spelling changes just the layer that it names."""
    g = torch.Generator().manual_seed(0)
    for i, spellings in enumerate(
        [
            ("lora_te1_text_model_", "lora_te_text_model_", "text_encoder.text_model.")
            + ("text_encoder.", "base_model.model.text_encoder.", "clip_l.transformer.text_model."),
            ("lora_te2_text_model_", "text_encoder_2.text_model.", "te2.text_model.", "clip_g."),
        ]
    ):
        layer = dict(model.text_encoders[i].named_modules())[Q if i == 0 else f"text_model.{Q}"]
        out, fan_in = layer.weight.shape
        A, B = torch.randn(2, fan_in, generator=g), torch.randn(out, 2, generator=g)
        for prefix in spellings:
            stem = prefix + (Q.replace(".", "_") if prefix.startswith("lora_") else Q)
            tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
            save_file(tensors, tmp_path / "x.safetensors")
            found = slider_files.read(tmp_path / "x.safetensors", model.unet, model.text_encoders)
            ((name, delta),) = found.deltas.items()
            assert slider_files.text_layers(model.text_encoders)[name][1] is layer
            change = slider_files.delta_weight(*slider_files.concatenate([(delta, 1.0)]))
            torch.testing.assert_close(change, B @ A)
    old = {  # diffusers before peft
        f"text_encoder_2.text_model.encoder.layers.0.self_attn.to_q_lora.{kind}.weight": tensor
        for kind, tensor in (("down", A), ("up", B))
    }
    save_file(old, tmp_path / "x.safetensors")
    found = slider_files.read(tmp_path / "x.safetensors", model.unet, model.text_encoders)
    assert list(found.deltas) == [name]


def test_text_encoders_of_another_model_are_refused(model, tmp_path):
    path = tmp_path / "x.safetensors"
    for layer, says in ((31, "layers_31_self_attn_q_proj, which this one"), (0, "its lora_down")):
        stem = f"lora_te2_text_model_encoder_layers_{layer}_self_attn_q_proj"
        save_file({f"{stem}.lora_{kind}.weight": torch.ones(2, 2) for kind in ("down", "up")}, path)
        with pytest.raises(ValueError, match=f"x.safetensors: was made for another model.*{says}"):
            slider_files.read(path, model.unet, model.text_encoders)


def ones(stem: str, d: int) -> dict:
    """A change of a d x d layer."""
    shapes = {"down": (1, d), "up": (d, 1)}
    return {f"{stem}.lora_{kind}.weight": torch.ones(shape) for kind, shape in shapes.items()}


def test_an_inversion_is_of_the_text_encoders_too(model, tmp_path):
    """With a LoRA that changes them alone, words mean something else."""
    x_0, other = torch.zeros(1, 4, 16, 16), SDXL.load(device="cpu")
    assert inversions.cache_key(model, x_0, 1) == inversions.cache_key(other, x_0, 1)
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    d = other.text_encoders[0].config.hidden_size
    save_file(ones(stem, d), tmp_path / "x.safetensors")
    merge_files(other, [(tmp_path / "x.safetensors", 1.0)])
    assert inversions.cache_key(model, x_0, 1) != inversions.cache_key(other, x_0, 1)


@pytest.mark.parametrize("given, weight", [("", 1.0), (":0.5", 0.5), (":-2", -2.0)])
def test_a_merged_lora_has_the_weight_that_is_given(model, tmp_path, given, weight):
    one = trained_slider(model.unet, rank=2, alpha=3.0, layers="xattn")
    lora.save(tmp_path / "a.safetensors", one, {}, dtype=torch.float32)
    words = ["--merge", f"{tmp_path}/a.safetensors{given}", "--device", "cpu"]
    merged = cli.load_model(cli.model_parser("").parse_args(words), vae=False).unet
    for (part, W), (_, plain) in zip(one.layers_of(merged), one.layers_of(model.unet)):
        change = weight * 3.0 / 2 * part.B @ part.A
        assert torch.allclose(W.weight - plain.weight, change, atol=1e-6)


# ---------------------------------------------------------------------------------- what is read


def test_any_prefix_and_any_adapters_name(model, tmp_path):
    slider = trained_slider(model.unet, rank=2, alpha=2.0, layers="attn")
    as_peft = dict(naming="peft", unet=model.unet, dtype=torch.float32)
    lora.save(tmp_path / "peft.safetensors", slider, {}, **as_peft)
    tensors = load_file(tmp_path / "peft.safetensors")
    original = slider_files.layer_names(model.unet)["dotted"]
    peft = slider_files.layer_names(model.unet)["peft"]
    dotted = {peft[stem]: original[stem] for stem in peft}

    def to_original(name):
        layer, which, _ = name.rsplit(".", 2)
        return f"{dotted[layer]}.{which}.weight"

    named = lambda name, adapter: name.replace(".weight", f".{adapter}.weight")
    prefixed = lambda name, prefix: prefix + name.removeprefix("unet.")
    spellings = [
        lambda name: prefixed(name, "model.diffusion_model."),
        lambda name: prefixed(to_original(name), "model.diffusion_model."),
        lambda name: prefixed(to_original(name), "diffusion_model."),
        lambda name: prefixed(name, "base_model.model.unet."),
        lambda name: prefixed(name, "module."),
        lambda name: named(name, "default_0"),
        lambda name: named(name, "my soft_style-2.1"),
    ]
    for i, spell in enumerate(spellings):
        path = tmp_path / f"{i}.safetensors"
        save_file({spell(name): tensor for name, tensor in tensors.items()}, path)
        back = lora.load(path, model.unet)
        for layer, part in slider.named_children():
            found = change_of(back.get_submodule(layer))
            assert torch.allclose(found, change_of(part), atol=1e-7), i


@pytest.fixture
def plain(model, tmp_path):
    """The tensors of a slider."""
    lora.save(tmp_path / "plain.safetensors", trained_slider(model.unet, layers="attn"), {})
    return load_file(tmp_path / "plain.safetensors")


def test_two_adapters_in_a_file_are_refused(model, tmp_path):
    layer, path = "unet.mid_block.attentions.0.proj_in", tmp_path / "two.safetensors"
    names = [f"{layer}.lora_{kind}.{name}.weight" for kind in "AB" for name in ("one", "two")]
    save_file({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(ValueError, match="two.safetensors: changes .* twice.* keep one adapter"):
        lora.load(path, model.unet)


def test_what_is_left_out_is_counted_in_one_line_and_strict_refuses(plain, tmp_path):
    """Norms' and biases' differences, embeddings (one is called "soft", as OFT's tensors are), and
    for a slider the text encoders."""
    path, stem = tmp_path / "more.safetensors", "lora_unet_mid_block_resnets_0"
    d = SDXL.load(device="cpu", vae=False).text_encoders[0].config.hidden_size
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    more = {f"{stem}_norm1.{ending}": torch.ones(4) for ending in ("w_norm", "b_norm")}
    more |= {f"{stem}_norm2.diff": torch.ones(4), f"{stem}_conv1.diff_b": torch.ones(4)}
    more |= {f"bundle_emb.soft_light.clip_{kind}": torch.ones(1, 4) for kind in "lg"}
    save_file(plain | more | ones(text, d), path)
    both = "embeddings (1), norm or bias differences (3)"
    three = "embeddings (1), changes of the text encoders (1), norm or bias differences (3)"
    draw = "slider.py --prompt 'a photo of a person' --seeds 0 --steps 1 --size 64"
    for command, found in (
        (f"-m extras.tools info {path}", f"{three} are left out: sliders change the UNet alone"),
        (f"{draw} --slider {path}:1 --out {tmp_path}/a", f"{three} are left out: sliders change"),
        (f"{draw} --merge {path} --out {tmp_path}/b", f"{both} are left out: only low-rank"),
    ):
        done = run(command)
        lines = [line for line in done.stderr.splitlines() if "left out" in line]
        assert done.returncode == 0 and len(lines) == 1, done.stderr
        assert lines[0].startswith(f"warning: {path}: its ") and found in lines[0]
        strict = run(f"{command} --strict")
        assert strict.returncode == 2 and "Traceback" not in strict.stderr
        assert strict.stderr.strip().splitlines()[-1] == lines[0].replace("warning", "error", 1)
    save_file(plain, path)
    assert run(f"-m extras.tools info {path} --strict").returncode == 0
    save_file(plain | {"lora_unet_conv_in.diff": torch.ones(4, 4, 3, 3)}, path)
    assert "a whole weights file" in run(f"-m extras.tools info {path}").stderr


# --------------------------------------------------------------------------------------- metadata


def after_the_header(path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_slider_names_its_model_in_kohyas_keys_and_no_path(plain, tmp_path, monkeypatch):
    """ss_sd_model_hash is the first 8 digits of the SHA-256 of 64 KiB from 1 MiB on,
    sshs_model_hash that of all behind the slider's own header."""
    monkeypatch.setattr(probe, "SCALES", (-1.0, 0.0, 1.0))  # most of the time goes into the probe
    save_file(plain, tmp_path / "style.safetensors")
    checkpoint = one_file(tmp_path / "my_model.safetensors")
    out = tmp_path / "a.safetensors"
    small = "--trajectories 1 --per-trajectory 1 --denoising-steps 2 --size 64 --steps 1 --batch 1"
    small += f" --rank 1 --probe 1 --merge {tmp_path}/style.safetensors:0.5"
    done = run(f"{TRAIN} {small} --model {checkpoint} --base {MINIATURE} --out {out}")
    assert done.returncode == 0, done.stderr
    about = metadata_of(out)
    assert str(tmp_path) not in json.dumps(about) and str(MINIATURE.parent) not in json.dumps(about)
    settings = json.loads(about["settings"])
    assert settings["model"] == about["ss_sd_model_name"] == "my_model.safetensors"
    assert settings["merge"] == [["style.safetensors", 0.5]] and settings["base"] == "model"
    part = checkpoint.read_bytes()[2**20 :][: 2**16]
    assert about["ss_sd_model_hash"] == hashlib.sha256(part).hexdigest()[:8] and len(part) == 2**16
    assert about["sshs_model_hash"] == hashlib.sha256(after_the_header(out)).hexdigest()
    low, high = json.loads(about["probe"])["range"]
    assert about["modelspec.usage_hint"] == f"useful range of scales: {low:+g} to {high:+g}"
    assert "smiling" in about["modelspec.description"]
    assert about["ss_seed"] == "0" and about["ss_max_train_steps"] == "1"
    done = run(f"train_text.py --like {out} --out {tmp_path}/b.safetensors")
    assert done.returncode == 2 and "--model of its own: name it here too" in done.stderr
    odd = {"settings": json.dumps({"pos": "a man, old", "neg": "a man, young", "steps": "sixty"})}
    save_file(load_file(out), out, metadata=odd)
    done = run(f"train_text.py --like {out} --out {tmp_path}/b.safetensors")
    assert done.returncode == 2 and "its settings say --steps 'sixty'" in done.stderr


def test_a_folder_has_no_hash_and_merged_files_name_files_alone(model, plain, tmp_path):
    a, both, peft = (tmp_path / f"{name}.safetensors" for name in ("a", "both", "peft"))
    small = "--trajectories 1 --per-trajectory 1 --denoising-steps 2 --size 64 --steps 1 --batch 1"
    assert run(f"{TRAIN} {small} --rank 1 --probe 0 --out {a}").returncode == 0
    about = metadata_of(a)
    assert about["ss_sd_model_name"] == "miniature" and "ss_sd_model_hash" not in about
    assert run(f"-m extras.tools merge {a}:2 {a} --out {both}").returncode == 0
    assert json.loads(metadata_of(both)["of"]) == ["a.safetensors:2", "a.safetensors"]
    assert run(f"-m extras.tools merge {a} --to peft --out {peft}").returncode == 0
    assert all("lora_" in name and name.startswith("unet.") for name in load_file(peft))
    peft.unlink()
    save_file(load_file(a), a, metadata=about | {"sshs_legacy_hash": "0", "sshs_model_hash": "1"})
    assert run(f"-m extras.tools convert {a} --to peft --out {peft}").returncode == 0
    about = metadata_of(peft)
    assert about["sshs_model_hash"] == hashlib.sha256(after_the_header(peft)).hexdigest()
    assert "sshs_legacy_hash" not in about and about["ss_sd_model_name"] == "miniature"
