"""The slider against its equation, and slider files."""

import copy
import re

import pytest
import torch
from torch import nn

import lora


def trained_slider(unet, seed=0, **options):
    """A slider with random B: as if trained."""
    torch.manual_seed(seed)
    slider = lora.Slider(lora.target_layers(unet, options.pop("layers", "all")), **options)
    for name, p in slider.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(p, std=0.05)
    return slider.requires_grad_(False)


class Block(nn.Module):
    """A few layers with the names and kinds of the UNet's; q, k, v see the same x."""

    def __init__(self):
        super().__init__()
        self.attn1_to_q, self.attn1_to_k, self.attn1_to_v = (nn.Linear(6, 5) for _ in range(3))
        self.attn2_to_k = nn.Linear(5, 4, bias=False)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 5, 3, stride=2, padding=1)

    def forward(self, x):  # (b, 16, 6)
        q, k, v = self.attn1_to_q(x), self.attn1_to_k(x).sigmoid(), self.attn1_to_v(x)
        image = self.attn2_to_k(q * k + v).mT.unflatten(-1, (4, 4))  # (b, 4, 4, 4)
        return self.conv2(self.conv1(image).tanh())


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().double()


def random_slider(block, **options):
    layers = dict(block.named_children())
    slider = lora.Slider(layers, **options).double()
    for p in slider.parameters():
        nn.init.normal_(p, std=0.5)
    return slider


@pytest.mark.parametrize("rank", [2, dict(zip(dict(Block().named_children()), (1, 3, 2, 2, 4, 1)))])
def test_it_adds_alpha_over_r_B_A_x(block, rank):
    """Against the same change folded into the dense weights, in float64; one scale for all, and one
    for each sample. Layers may differ in rank, so in alpha / r."""
    slider, x = random_slider(block, rank=rank, alpha=2.0), torch.randn(3, 16, 6).double()

    def folded(scale):
        dense = copy.deepcopy(block)
        for name, layer in dense.named_children():
            part = getattr(slider, lora.kohya_name(name))
            A, B = part.A, part.B
            change = 2.0 / len(A) * (B.flatten(1) @ A.flatten(1))
            layer.weight.data += scale * change.view_as(layer.weight)
        return dense(x)

    expected = [folded(scale) for scale in (1.7, -0.4, 0.0)]
    slider.attach(block)
    with slider.at(1.7):
        assert torch.allclose(block(x), expected[0], atol=1e-12)
    with slider.at(torch.tensor([1.7, -0.4, 0.0]).double()):
        each = block(x)
    assert all(torch.allclose(each[i], expected[i][i], atol=1e-12) for i in range(3))


@pytest.mark.parametrize(
    "scale", [0.7, torch.tensor([0.7, -1.3]), torch.tensor([[0.7, 2], [1, 0]])]
)
def test_its_gradients_are_those_of_finite_differences(block, scale):
    """With a scale for all, for each sample, and for each sample and rank; in float64."""
    slider = random_slider(block, rank=2, alpha=3.0).attach(block)
    x = torch.randn(2, 16, 6, dtype=torch.float64, requires_grad=True)

    def run(x, *_):  # gradcheck moves the slider's weights themselves
        slider.scale = scale
        return block(x)

    assert torch.autograd.gradcheck(run, (x, *slider.parameters()))


def test_weights_that_change_are_cast_anew(block):
    """A step of an optimizer, without the scale being set again; gradients twice over."""
    slider = random_slider(block).attach(block)
    slider.scale, x = 1.0, torch.randn(2, 16, 6).double()
    optimizer = torch.optim.SGD(slider.parameters(), 0.1)
    before = [block(x).square().mean() for _ in range(2)]
    for loss in before:
        loss.backward()
    optimizer.step()
    after = block(x).square().mean()
    slider.scale = 1.0
    assert before[0] == before[1] != after and torch.equal(block(x).square().mean(), after)
    with torch.no_grad():
        assert torch.equal(block(x).square().mean(), after)


def test_scale_zero_untrained_and_detached_are_bit_identical(model, inputs):
    unet, weights = model.unet, {k: v.clone() for k, v in model.unet.state_dict().items()}
    with torch.no_grad():
        untouched = unet(*inputs)
        fresh = lora.Slider(lora.target_layers(unet, "all")).attach(unet)
        with fresh.at(3.0):
            assert torch.equal(unet(*inputs), untouched)  # B = 0
        fresh.detach()
        slider = trained_slider(unet).attach(unet)
        assert torch.equal(unet(*inputs), untouched)  # attached, scale 0
        with slider.at(1.0):
            assert not torch.allclose(unet(*inputs), untouched, atol=1e-3)
        slider.detach()
        assert torch.equal(unet(*inputs), untouched)
    state = unet.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[k], v) for k, v in weights.items())


def test_scale_zero_costs_nothing(model, inputs, monkeypatch):
    slider = trained_slider(model.unet).attach(model.unet)
    calls, add_up = [], lora.add_up
    monkeypatch.setattr(lora, "add_up", lambda *args: calls.append(1) or add_up(*args))
    with torch.no_grad():
        model.unet(*inputs)
        assert not calls
        with slider.at(1.0):
            model.unet(*inputs)
    slider.detach()
    assert len(calls) == len(list(slider.children()))


def test_several_sliders_add_up_as_dense_weights_do(model, inputs):
    """Two attached sliders of different ranks and layers against a copy of the UNet with both
    merged into its weights."""
    first = trained_slider(model.unet, 1, rank=2, layers="attn")
    second = trained_slider(model.unet, 2, rank=5, alpha=3.0, layers="noxattn")
    merged = copy.deepcopy(model.unet)
    for slider, scale in ((first, 1.5), (second, -0.7)):
        for name, module in merged.named_modules():
            part = getattr(slider, lora.kohya_name(name), None)
            if part is not None:
                A, B = part.lora_down.weight.flatten(1), part.lora_up.weight.flatten(1)
                change = scale * part.alpha / len(A) * (B @ A)
                module.weight.data += change.view_as(module.weight)
    first.attach(model.unet), second.attach(model.unet)
    with torch.no_grad(), first.at(1.5), second.at(-0.7):
        ours, expected = model.unet(*inputs), merged(*inputs)
    first.detach(), second.detach()
    assert ((ours - expected).abs().max() / expected.abs().max()) < 1e-4


def test_layer_sets(model):
    names = {s: set(lora.target_layers(model.unet, s)) for s in lora.LAYERS}
    assert names["xattn"] and all(".attn2." in n for n in names["xattn"])
    assert all(re.search(r"\.attn[12]\.", n) for n in names["attn"])
    assert names["xattn"] < names["attn"]
    assert not any(".attn2." in n or "time_embedding" in n for n in names["noxattn"])
    assert names["all"] == names["noxattn"] | names["xattn"]
    samplers = {"down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"}
    assert samplers | {"mid_block.resnets.0.conv1"} <= names["noxattn"]
    without = lora.target_layers(model.unet, "noxattn", conv=False)
    assert without and not any(isinstance(m, nn.Conv2d) for m in without.values())


def test_a_begins_as_the_papers_code_has_it(model):
    """Uniform, of variance 1 / fan_in (kaiming's with a = 1); peft's is a third of that."""
    slider = lora.Slider(lora.target_layers(model.unet), rank=4)
    A = torch.cat([p.A.flatten() * p.A[0].numel() ** 0.5 for p in slider.children()])
    assert A.std().item() == pytest.approx(1, rel=0.02) and A.abs().max() <= 3**0.5


@pytest.mark.parametrize("rank", [0, -1, 10_000])
def test_an_impossible_rank_is_refused(model, rank):
    with pytest.raises(ValueError, match="rank"):
        lora.Slider(lora.target_layers(model.unet), rank=rank)


def test_a_file_brings_back_the_slider_and_its_settings(model, inputs, tmp_path):
    slider = trained_slider(model.unet, rank=3, alpha=2.0)
    lora.save(tmp_path / "a.safetensors", slider, {"settings": {"eta": 2.0}, "kind": "text slider"})
    back = lora.load(tmp_path / "a.safetensors", model.unet)
    assert back.metadata["settings"] == '{"eta": 2.0}' and back.metadata["kind"] == "text slider"
    before, after = slider.state_dict(), back.state_dict()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k].half().float()) for k, v in after.items())
    assert {part.alpha for part in back.children()} == {2.0}
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]
    outputs = []
    for s in (slider, back):
        s.attach(model.unet)
        with torch.no_grad(), s.at(1.0):
            outputs.append(model.unet(*inputs))
        s.detach()
    assert ((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()) < 5e-3
