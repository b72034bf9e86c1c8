"""Slider files mean the same in every tool: what diffusers makes of ours, and we of LyCORIS's and
peft's. Errors are in units of the change that a slider makes, not of the picture."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import trained_slider

import lora
from extras import tools
from formats import slider_files
from sdxl import MINIATURE
from support.merge import Composed, Rounding, add_to_weights, by_layer

DATA = Path(__file__).parent / "data"
KINDS = ("text", "pairs", "merged", "extracted", "one layer", "one convolution")


def run_tools(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["extras.tools", *map(str, words)])
    tools.main()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """{kind: a file in kohya's naming}, as our commands write them."""
    folder, unet = tmp_path_factory.mktemp("files"), model.unet
    paths = {kind: folder / f"{kind.replace(' ', '_')}.safetensors" for kind in KINDS}
    lora.save(paths["text"], trained_slider(unet, 0, layers="noxattn", rank=4), {})
    lora.save(paths["pairs"], trained_slider(unet, 1, layers="all", rank=2, alpha=4.0), {})
    cross = folder / "cross.safetensors"
    lora.save(cross, trained_slider(unet, 2, layers="xattn", rank=8, alpha=4.0), {})
    layers = lora.target_layers(unet)
    for kind, name in (
        ("one layer", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("one convolution", "down_blocks.1.resnets.0.conv2"),
    ):
        torch.manual_seed(3)
        slider = lora.Slider({name: layers[name]}, rank=3, alpha=2.0)
        torch.nn.init.normal_(next(slider.children()).lora_up.weight, std=0.3)
        lora.save(paths[kind], slider, {})
    # A fine-tune that changed everything by a matrix of rank 6.
    tuned = folder / "tuned"
    shutil.copytree(MINIATURE, tuned)
    weights = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    change = trained_slider(unet, 4, layers="all", rank=6)
    tensors = load_file(weights)
    for part, layer in change.layers_of(unet):
        name = next(n for n, m in unet.named_modules() if m is layer) + ".weight"
        A, B = slider_files.concatenate([(part.delta(), 1.0)])
        W = tensors[name].float() + slider_files.delta_weight(A, B)
        tensors[name] = W.to(tensors[name].dtype)
    save_file(tensors, weights)
    with pytest.MonkeyPatch.context() as patch:
        three = (paths["text"], f"{cross}:1.5", paths["pairs"])
        run_tools(patch, "merge", *three, "--out", paths["merged"])
        run_tools(patch, "extract", tuned, "--rank", 5, "--out", paths["extracted"])
    return paths


def change_of(predict, path, model):
    """What the slider file `path` changes in the prediction of our UNet."""
    slider = lora.load(path, model.unet).attach(model.unet)
    try:
        with slider.at(1.0):
            return predict(model.unet) - predict_plain(predict, slider, model)
    finally:
        slider.detach()


def predict_plain(predict, slider, model):
    with slider.at(0.0):
        return predict(model.unet)


@pytest.mark.parametrize("naming", slider_files.NAMINGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_diffusers_applies_our_files_as_we_do(
    model, files, pipeline, inputs, tmp_path, kind, naming
):
    deltas = slider_files.read(files[kind], model.unet).deltas
    path = tmp_path / "slider.safetensors"
    slider_files.write(path, deltas, {}, naming, model.unet)
    ours = change_of(lambda unet: unet(*inputs), path, model)
    x_t, t, context, pooled, time_ids = inputs
    added = {"text_embeds": pooled, "time_ids": time_ids}
    theirs = lambda: pipeline.unet(x_t, t, context, added_cond_kwargs=added).sample
    plain = theirs()
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=naming)
    pipeline.set_adapters([naming], [1.0])
    try:
        error = (theirs() - plain - ours).norm() / ours.norm()
    finally:
        pipeline.unload_lora_weights()
    assert ours.norm() > 1e-5 * plain.norm() and error < 1e-3, f"{error:.2g}"


@pytest.mark.parametrize("naming", slider_files.NAMINGS)
def test_every_layer_of_a_file_has_one_alpha_and_the_change_it_had(model, files, tmp_path, naming):
    mixed = slider_files.read(files["text"], model.unet).deltas
    for i, (stem, delta) in enumerate(mixed.items()):
        mixed[stem] = slider_files.Delta(delta.down, delta.up, delta.alpha * (1 + i % 3))
    path = tmp_path / "mixed.safetensors"
    slider_files.write(path, mixed, {}, naming, model.unet, torch.float32)
    alphas = {float(v) for k, v in load_file(path).items() if k.endswith(".alpha")}
    assert len(alphas) == (0 if naming == "peft" else 1)
    back = slider_files.read(path, model.unet).deltas
    weight = lambda delta: slider_files.delta_weight(*slider_files.concatenate([(delta, 1.0)]))
    for stem, delta in mixed.items():
        torch.testing.assert_close(weight(back[stem]), weight(delta), rtol=1e-5, atol=1e-7)


def rows_of(path, unet):
    """{layer: every 32nd row of the change that the file `path` makes}."""
    file, layers = slider_files.read(path, unet), slider_files.layers_by_kohya_name(unet)
    weight = lambda delta: slider_files.delta_weight(*slider_files.concatenate([(delta, 1.0)]))
    return {layers[stem][0]: weight(delta)[::32] for stem, delta in file.deltas.items()}


@pytest.mark.parametrize("kind", ["plain", "tucker"])
def test_lycoris_files_are_read_as_lycoris_computes_them(model, kind):
    """Files made by lycoris-lora 4.1.3 (tests/data/lycoris/make.py)."""
    folder = DATA / "lycoris"
    expected = load_file(folder / "expected.safetensors")
    found = rows_of(folder / f"{kind}.safetensors", model.unet)
    assert len(found) == 4 and {f"{kind}.{name}" for name in found} < set(expected)
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[f"{kind}.{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["pattern", "rslora"])
def test_folders_of_peft_are_read_with_their_configuration(model, kind):
    """Folders made by peft 0.21.2 (tests/data/peft/make.py): ranks and alphas by patterns,
    rslora."""
    folder = DATA / "peft"
    expected = load_file(folder / "expected.safetensors")
    found = rows_of(folder / kind, model.unet)
    assert len(found) == 3
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[f"{kind}.{name}"], rtol=1e-4, atol=1e-6)
    assert lora.load(folder / kind, model.unet).metadata is not None


@pytest.mark.parametrize("name", ["authors", "ai-toolkit"])
def test_files_that_the_published_trainers_wrote_change_a_layer_as_they_say(model, name, tmp_path):
    """One iteration of theirs at rank 1 (tests/data/published/make.py). The authors' trainer wrote
    its tensors by torch.save, as is done here again."""
    path = DATA / "published" / f"{name}.safetensors"
    tensors = load_file(path)
    if name == "authors":
        path = tmp_path / "authors.pt"
        torch.save(tensors, path)
    (stem,) = {key.split(".")[0] for key in tensors}
    by_kohya_name = {
        "lora_unet_" + n.replace(".", "_"): layer for n, layer in model.unet.named_modules()
    }
    layer = by_kohya_name[stem]
    part = lambda suffix: tensors[f"{stem}.{suffix}"].float()
    up, down = part("lora_up.weight").flatten(1), part("lora_down.weight").flatten(1)
    change = part("alpha") / len(down) * (up @ down).view_as(layer.weight)  # alpha / r B A
    scale = float(layer.weight.norm() / change.norm())  # an iteration changes next to nothing
    changed = copy.deepcopy(layer)
    changed.weight.data += scale * change
    torch.manual_seed(0)
    x = torch.randn(2, layer.weight.shape[1], *[8] * (layer.weight.dim() - 2))
    with torch.no_grad():
        plain = layer(x)
        slider = lora.load(path, model.unet).attach(model.unet)
        try:
            with slider.at(scale):
                found = layer(x)
        finally:
            slider.detach()
        torch.testing.assert_close(found - plain, changed(x) - plain, rtol=1e-4, atol=1e-4)


def test_adapters_that_mean_something_else_are_refused_by_name(model, tmp_path):
    with pytest.raises(
        ValueError, match="begun with pissa.*path_initial_model_for_weight_conversion"
    ):
        lora.load(DATA / "peft" / "pissa", model.unet)
    folder = tmp_path / "adapter"
    shutil.copytree(DATA / "peft" / "pattern", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "a LOHA adapter"),
        ({"init_lora_weights": "olora"}, "begun with olora"),
        ({"init_lora_weights": "pissa_niter_16"}, "begun with pissa_niter_16"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"adapter_config.json: .*{message}"):
            lora.load(folder, model.unet)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(k for k in tensors if "lora_B" in k)
    bias = {name.replace(".weight", ".bias"): torch.zeros(len(tensors[name]))}
    save_file(tensors | bias, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_B.bias is a bias of peft's"):
        lora.load(folder, model.unet)


@pytest.mark.parametrize(
    "name, message",
    [
        ("flux_blocks_0_attn_to_q", "named in a way that is not known: flux_blocks_0_attn_to_q"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "made for another model"),
        ("unet.down_blocks.7.attentions.0.proj_in", "made for another model"),
    ],
)
def test_an_unknown_naming_is_not_another_model(model, tmp_path, name, message):
    path = tmp_path / "x.safetensors"
    parts = ("lora_down", "lora_up")
    save_file({f"{name}.{part}.weight": torch.zeros(2, 2) for part in parts}, path)
    with pytest.raises(ValueError, match=message):
        lora.load(path, model.unet)


# ------------------------------------------------------------------------------------ into weights


def test_what_rounding_keeps_is_what_is_measured():
    """Of a change of 0.05% of W, against the sums written out; float32 keeps all of it."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(400, 300, generator=g).bfloat16()
    change = 5e-4 * torch.randn(400, 300, generator=g)
    rounding = Rounding()
    made = rounding.add(W, change)
    assert made.dtype == torch.bfloat16
    real = made.double() - W.double()
    share = (real * change).sum() / change.double().square().sum()
    cosine = (real * change).sum() / (real.norm() * change.double().norm())
    assert rounding.kept("bfloat16") == pytest.approx(share.item(), rel=1e-4) and share < 0.5
    assert rounding.cosine("bfloat16") == pytest.approx(cosine.item(), rel=1e-4)
    assert rounding.kept("float32") == pytest.approx(1, abs=1e-3)
    warning = rounding.warning("bfloat16", "--store")
    assert f"bfloat16 keeps {share:.0%} of this change (cosine {cosine:.2f})" in warning
    assert "--store float16 keeps" in warning and rounding.warning("float32", "--store") is None
    rounding.add(W.to(torch.float8_e4m3fn), change)  # what a single file may be stored in
    assert "float8_e4m3fn keeps" in rounding.warning("float8_e4m3fn", "--store")
    rounding = Rounding()
    rounding.add(torch.ones(9), torch.full((9,), 1e-9))
    assert "it is too small for any dtype" in rounding.warning("float32", "--dtype")


def test_sliders_are_merged_all_at_once(model):
    """Seven small changes of bfloat16 weights: merged at once more is left than one after
    another."""
    unet = torch.nn.ModuleDict({"layer": torch.nn.Linear(256, 256)}).bfloat16()
    layers = {"layer": unet["layer"]}
    before = unet["layer"].weight.clone()
    sliders = []
    for seed in range(7):
        torch.manual_seed(seed)
        slider = lora.Slider(layers, rank=4)
        part = next(slider.children())
        torch.nn.init.normal_(part.lora_up.weight)
        size = slider_files.delta_weight(*slider_files.concatenate([(part.delta(), 1.0)])).norm()
        part.lora_up.weight.data *= 5e-4 * before.float().norm() / size
        sliders.append((slider, 1.0))
    wanted = sum(
        slider_files.delta_weight(*slider_files.concatenate([(part.delta(), 1.0)]))
        for slider, _ in sliders
        for part in slider.children()
    )

    def kept():
        made = unet["layer"].weight.float() - before.float()
        return ((made * wanted).sum() / wanted.square().sum()).item()

    together = add_to_weights(by_layer(unet, sliders))
    at_once = kept()
    assert together.kept("bfloat16") == pytest.approx(at_once, rel=1e-3)
    unet["layer"].weight = torch.nn.Parameter(before.clone())
    for pair in sliders:
        add_to_weights(by_layer(unet, [pair]))
    assert kept() < 0.6 * at_once


def test_a_composition_does_not_round_changes_away(model):
    """In bfloat16 weights sliders of high rank stay low-rank: their change survives."""
    unet = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 64, bias=False)}).requires_grad_(False)
    layers = {"layer": unet["layer"]}
    sliders = []
    for seed in range(4):
        torch.manual_seed(seed)
        slider = lora.Slider(layers, rank=16).requires_grad_(False)
        part = next(slider.children())
        torch.nn.init.normal_(part.lora_up.weight, std=1e-3)
        sliders.append((slider, 1.0))
    exact = Composed(unet, sliders)
    assert exact.replaced and len(exact.handles) == 1  # float32 keeps the change: W is replaced
    exact.detach()
    unet.bfloat16()
    rounded = Composed(unet, sliders)
    assert len(rounded.handles) == 2 and not rounded.replaced
    rounded.detach()
