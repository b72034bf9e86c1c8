"""SliderSpace: the directions against a known spread, the bank against its sliders, the loss's
gradient against finite differences."""

from copy import copy, deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lora
import sampler
import train_space
from miniature.measure import tensor
from sdxl import MINIATURE
from sdxl_unet import UNet
from support import clip
from support.checkpoint import Checkpoint
from support.sweep import sweep


def encoder():
    return clip.load_encoder(MINIATURE / "image_encoder")


@pytest.fixture(scope="module")
def conds(model):
    return model.condition(["a photo of a person"]), model.condition([""])


def collect(model, conds, **changes):
    settings = dict(samples=6, per_sample=2, size=(128, 128), seed=3, batch=4)
    settings |= dict(steps=6, guidance=3.0, start=0.3)
    return train_space.collect(model, *conds, **(settings | changes))


@pytest.fixture(scope="module")
def six(model, conds):
    return collect(model, conds)


@pytest.fixture
def three(six, monkeypatch):
    """Samples of which two are trained on."""
    monkeypatch.setattr(train_space, "HELD_OUT", 1)
    return six.first(3)


def two_directions():
    g = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(128, 2, generator=g))[0].T


def test_directions_of_a_known_spread():
    """Points spread along known axes, by known amounts, around a mean that is not 0."""
    g = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(10, 10, generator=g))
    each = torch.tensor([4.0, 2.0, 1.0] + [0.1] * 7)
    x = torch.empty(20_000, 10).exponential_(generator=g) - 1  # skewed: the sign is defined
    f = x * each @ axes.T + 5
    v, sigma, share = train_space.directions(f, 3)
    # Not -1: the long tail is on the positive side.
    assert torch.allclose((v @ axes[:, :3]).diagonal(), torch.ones(3), atol=0.01)
    assert torch.allclose(sigma, each[:3], rtol=0.05)
    expected = each[:3].square().sum() / each.square().sum()
    assert share.sum() == pytest.approx(expected.item(), abs=0.01)


def test_independent_directions_are_the_causes_and_principal_ones_mixtures():
    """Four causes of like strength, on and off or evenly spread, along axes of their own: only the
    independent directions find these."""
    g = torch.Generator().manual_seed(1)
    axes, _ = torch.linalg.qr(torch.randn(10, 10, generator=g))
    on_or_off = (torch.rand(20_000, 2, generator=g) < 0.3).float() / 0.21**0.5
    even = torch.rand(20_000, 2, generator=g) * 12**0.5
    strengths = torch.tensor([1.02, 1.01, 1.0, 0.99])
    f = torch.cat([on_or_off, even], 1) * strengths @ axes[:4]
    f += 0.1 * torch.randn(20_000, 10, generator=g)
    best = lambda v: (v @ axes[:4].T).abs().max(1)
    v, sigma, share = train_space.directions(f, 4, independent=True)
    assert best(v)[0].min() > 0.99 and best(v)[1].sort()[0].tolist() == [0, 1, 2, 3]
    assert best(train_space.directions(f, 4)[0])[0].min() < 0.95
    assert torch.allclose(sigma, strengths, rtol=0.05) and 0.9 < share.sum() < 1
    v_again, _, _ = train_space.directions(f, 4, independent=True)
    assert torch.equal(v, v_again)


def test_one_sample_one_slider_of_the_bank(model, inputs):
    """Each row of a batch with another of three sliders of rank 2, forwards and backwards: as with
    that slider alone."""
    layers = lora.target_layers(model.unet, "all")
    torch.manual_seed(0)
    bank = lora.Slider(layers, 6, 3.0).requires_grad_(False)
    for name, p in bank.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(p, std=0.05)
    alone = train_space.split(bank, layers, 3, 2, 1.0)
    each = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 2]]).repeat_interleave(2, 1)
    with torch.no_grad():
        bank.attach(model.unet)
        with bank.at(each):
            together = model.unet(*inputs)
        bank.detach()
        for i, scale in enumerate((1.0, -1.0, 2.0)):
            alone[i].attach(model.unet)
            with alone[i].at(scale):
                expected = model.unet(*(x[i : i + 1] for x in inputs))
            alone[i].detach()
            assert torch.allclose(together[i : i + 1], expected, atol=2e-4)


def test_samples_survive_a_stop_and_x_t_lie_on_the_way(model, conds, six, tmp_path, monkeypatch):
    real, calls, checkpoint = sampler.sample, [], Checkpoint(tmp_path)

    def stops(*args, **kw):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(sampler, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        collect(model, conds, remember=checkpoint.remember)
    again = collect(model, conds, remember=checkpoint.remember)
    assert calls == [4, 2, 2]  # the first batch was not drawn again
    assert torch.equal(six.x_0, again.x_0) and torch.equal(six.x_t, again.x_t)
    assert six.x_t.shape == (6, 2, 4, 16, 16)
    # Spread over the five of the six steps that come after the start.
    assert six.t[0].tolist() == [sampler.timesteps(6)[i] for i in (1, 3)]
    monkeypatch.undo()
    settings = dict(alpha_bar=model.alpha_bar, steps=6, guidance=3.0)
    for m in range(2):
        t = int(six.t[5, m])
        assert t <= 700
        x_T = sampler.noise([3_000_005], model.latent_shape())
        stop = sampler.timesteps(6).index(t)
        reached = sampler.sample(model.unet, x_T, *conds, **settings, stop=stop)
        assert torch.allclose(reached[0], six.x_t[5, m], atol=1e-3)


def test_rows_of_a_space_of_higher_rank(model, conds, three):
    """Every x_t with every direction either way, each once; each slider has its ranks side by
    side, and the meter reads pictures that no row stands for."""
    common = dict(rank=2, guidance=3.0, batch=4)
    space = train_space.Space(model, encoder(), three, *conds, two_directions(), **common)
    bank, rows = SimpleNamespace(), []
    with torch.no_grad():
        signs = torch.tensor([1.0, -1.0])
        _, wanted = space.change(bank, signs, torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert bank.scale.tolist() == [[0, 0, 1, 1], [-1, -1, 0, 0]] * 2  # twice: guidance
    assert torch.equal(wanted, torch.stack([space.v[1], -space.v[0]]))

    def change(bank, sign, i, x):
        rows.extend(zip(x.tolist(), i.tolist(), torch.as_tensor(sign).tolist()))
        return (torch.ones(len(x), 1),) * 2

    space.change = change
    space.loss(bank, torch.arange(len(space)))
    assert len(set(rows)) == len(space) == 2 * 2 * space.n and {s for *_, s in rows} == {1, -1}
    trained_on = {x for x, *_ in rows}
    rows.clear()
    space.meter(lora.Slider({}, {}, {}), 4)
    assert rows and not trained_on & {x for x, *_ in rows}


def test_prompts_take_turns(model, conds, monkeypatch):
    monkeypatch.setattr(train_space, "HELD_OUT", 1)
    two = model.condition(["a photo of a person", "a photo of a hand"])
    samples = collect(model, (two, conds[1]), samples=3, batch=3)
    assert samples.prompt.tolist() == [0, 1, 0]
    common = dict(rank=1, guidance=1.0, batch=4)
    space = train_space.Space(model, encoder(), samples, two, conds[1], two_directions(), **common)
    assert space.prompt.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.slow
def test_the_gradient_through_unet_vae_and_clip_agrees_with_finite_differences(model, conds, three):
    unet = UNet(model.unet.config).double().requires_grad_(False)
    unet.load_state_dict(model.unet.state_dict())
    twin = copy(model)
    twin.unet, twin.vae = unet, deepcopy(model.vae).double()
    twin.alpha_bar = model.alpha_bar.double()
    samples = replace(three, x_0=three.x_0.double(), x_t=three.x_t.double())
    conds = (tuple(c.double() for c in part) for part in conds)
    v, settings = two_directions().double(), dict(rank=1, guidance=1.0, batch=4)
    space = train_space.Space(twin, encoder().double(), samples, *conds, v, **settings)
    torch.manual_seed(0)
    bank = lora.Slider(lora.target_layers(unet, "xattn", conv=False), 2, 2.0).double()
    for name, p in bank.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(p, std=0.05)
    bank.attach(unet)
    rows = torch.tensor([0, 5, 9, 15])
    parameters = list(bank.parameters())
    gradients = torch.autograd.grad(space.loss(bank, rows).sum(), parameters)
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, dtype=torch.float64, generator=g) for p in parameters]

    @torch.no_grad()
    def moved(h):
        for p, d in zip(parameters, directions):
            p += h * d
        value = space.loss(bank, rows).sum().item()
        for p, d in zip(parameters, directions):
            p -= h * d
        return value

    h = 1e-7  # so near that no ReLU of the image encoder switches
    along = sum((g * d).sum() for g, d in zip(gradients, directions)).item()
    assert along == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-4)


def test_the_first_gradient_is_not_rounding(model, conds, three):
    """Of a slider that changes nothing yet: features that differ in their last digits give the
    same gradient."""
    settings = dict(rank=1, guidance=1.0, batch=4)
    space = train_space.Space(model, encoder(), three, *conds, two_directions(), **settings)
    torch.manual_seed(0)
    bank = lora.Slider(lora.target_layers(model.unet, "xattn", conv=False), 2, 2.0)
    bank.attach(model.unet)

    def gradient():
        loss = space.loss(bank, torch.tensor([0, 5])).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(bank.parameters()))])

    one = gradient()
    space.f_0 += 1e-7 * torch.randn(space.f_0.shape, generator=torch.Generator().manual_seed(1))
    other = gradient()
    bank.detach()
    assert one.norm() > 0 and (one - other).norm() < 0.01 * one.norm()


@pytest.mark.slow
def test_sliders_learn_their_directions(model, conds):
    samples, see = collect(model, conds, samples=12), encoder()
    v, sigma, _ = train_space.directions(clip.features(model, see, samples.x_0), 2)
    settings = dict(layers=lora.target_layers(model.unet, "all"), rank=1, alpha=1.0, guidance=1.0)
    settings |= dict(steps=16, batch=8, lr=2e-3, seed=0)
    made, reading = train_space.learn(model, see, samples, *conds, v, **settings)
    assert reading["cosine"] > 0.3 and len(made) == 2
    # Calibrated, scale 2 moves the very pictures it was calibrated on by one standard deviation.
    slider, direction = made[0], (v[0], sigma[0].item())
    drawing = dict(batch=8, steps=4, guidance=3.0, start=0.0)
    train_space.calibrate(model, see, slider, *direction, *conds, seeds=2, size=None, **drawing)
    x_T = sampler.noise(range(2), model.latent_shape())
    columns = [[(slider, scale)] for scale in (-2, 2)]
    drawn = sweep(model.unet, x_T, *conds, columns, alpha_bar=model.alpha_bar, **drawing)
    low, high = (clip.features(model, see, x_0) @ v[0] for _, x_0 in drawn)
    assert (high - low).mean().item() / 2 == pytest.approx(sigma[0].item(), rel=0.4)


def test_features_are_those_of_the_pictures(model, six):
    see = encoder()
    f = clip.features(model, see, six.x_0)
    seen = torch.nn.functional.normalize(see(tensor(model.decode(six.x_0))), dim=-1)
    assert torch.allclose(f.norm(dim=-1), torch.ones(6))
    assert (f - seen).norm(dim=-1).max() < 0.1  # but for rounding and clipping


def test_pictures_of_another_size_are_brought_to_the_encoders(model):
    see, _ = clip.towers(None, model)
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    twice = picture.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(see(picture), encoder()(twice), atol=1e-5)
    assert torch.equal(see(twice), encoder()(twice))


def test_what_is_trained_together_is_what_comes_apart(model, conds, three, inputs, monkeypatch):
    """Each slider that `learn` returns against its rows of the bank, which has just been trained:
    its B is random."""
    seen, x = [], [part[:1] for part in inputs]

    @torch.no_grad()
    def train(bank, *_, **__):
        for part in bank.children():
            part.lora_up.weight.normal_(std=0.05)
        for i in range(2):
            with bank.at((torch.arange(4) // 2 == i).float()[None]):
                seen.append(model.unet(*x))
        return {}

    monkeypatch.setattr(train_space.training, "train", train)
    settings = dict(layers=lora.target_layers(model.unet, "attn"), rank=2, alpha=3.0, guidance=1.0)
    v = two_directions()
    made, _ = train_space.learn(model, encoder(), three, *conds, v, batch=4, seed=0, **settings)
    for one, together in zip(made, seen):
        one.attach(model.unet)
        with torch.no_grad(), one.at(1.0):
            assert torch.allclose(model.unet(*x), together, atol=1e-4)
        one.detach()
    assert not torch.allclose(*seen, atol=0.1)


def test_the_space_s_loss_and_meter_tell_the_sliders_apart(model, conds, three):
    """Slider 0 does just what is wanted, slider 1 half as much and the opposite."""
    common = dict(rank=1, guidance=1.0, batch=4)
    space = train_space.Space(model, encoder(), three, *conds, two_directions(), **common)

    def change(bank, sign, i, x):
        wanted = sign[:, None] * space.v[i]
        return torch.where(i[:, None] == 0, 1.0, -0.5) * wanted, wanted

    space.change = change
    n = space.n  # rows: slider 0 at +, slider 1 at +, slider 1 at -
    assert torch.allclose(space.loss(None, torch.tensor([0, n, 3 * n])), torch.tensor([0.0, 2, 2]))
    reading = space.meter(lora.Slider({}, {}, {}), 4)
    assert reading["cosines"] == pytest.approx([1, -1]) and reading["share"] == pytest.approx(0.25)


def test_a_clip_model_sees_pictures_in_its_own_colours(model, tmp_path):
    """transformers' CLIP, random and small, given OpenAI's normalisation of pixels from 0 to 1."""
    from transformers import CLIPConfig, CLIPModel

    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = small | dict(image_size=32, patch_size=16)
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    net = CLIPModel(config).eval()
    net.save_pretrained(tmp_path)
    model.tokenizers[0].save_pretrained(tmp_path)
    see, encode = clip.towers(str(tmp_path), model)
    pixels = torch.rand(2, 3, 32, 32)
    row = lambda numbers: torch.tensor(numbers).view(1, 3, 1, 1)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    normal = (pixels - row(mean)) / row(std)
    with torch.no_grad():
        expected = clip.tensor_of(net.get_image_features(pixel_values=normal))
    assert expected.std() > 0.1 and torch.allclose(see(2 * pixels - 1), expected, atol=1e-5)
    twice = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(see(2 * twice - 1), expected, atol=1e-5)
    assert encode(["an old man", "a hand"]).shape == (2, 8)


def test_another_model_s_image_encoder_is_not_taken_for_ones_own(model, monkeypatch, tmp_path):
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text('{"hidden_size": 1280}')
    monkeypatch.setattr(model, "folder", tmp_path)
    with pytest.raises(ValueError, match="--clip is needed"):
        clip.towers(None, model)


def test_words_that_lie_along_a_direction_are_named(model):
    """A direction that is made of a word's own change finds that word."""
    _, encode = clip.towers(None, model)
    words = ["hat", "glasses", "red", "smiling"]
    normalize = lambda x: torch.nn.functional.normalize(x, dim=-1)
    f = normalize(encode(["a person", "a person, hat", "a person, smiling"]))
    hints = clip.name_directions(encode, "a person", words, normalize(f[1:] - f[0]))
    assert hints[0][0].startswith("+ hat") and hints[1][0].startswith("+ smiling")
    assert hints[0][1].startswith("- ")


def test_guidance_in_the_predicted_picture(model, conds, three):
    """x_0 from eps_u + g (eps_c - eps_u), each sample at a level of its own, against the two
    predictions made one by one."""
    settings = dict(rank=1, guidance=3.0, batch=4)
    space = train_space.Space(model, encoder(), three, *conds, torch.eye(128)[:2], **settings)
    with torch.no_grad():
        found = space.predict_x_0(torch.tensor([0, 3]))
        for x_0, row in zip(found, (0, 3)):
            x_t, t = space.x_t[row : row + 1], space.t[row : row + 1]
            eps_u, eps_c = (model.unet(x_t, t, *c) for c in conds[::-1])
            a = model.alpha_bar[t]
            expected = (x_t - (1 - a).sqrt() * (eps_u + 3.0 * (eps_c - eps_u))) / a.sqrt()
            assert torch.allclose(x_0, expected[0], atol=1e-3)
