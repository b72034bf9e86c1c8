"""DDIM backwards, null-text and negative-prompt inversion, and the editing of a picture from the
command line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from counting import counted
from PIL import Image, ImageDraw

import invert
import sampler
import slider
from miniature import world
from sdxl_unet import UNet
from support import images, inversions


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(5)
    a = world.sample(rng, kind="face", malformed=0)
    return world.draw(a), world.caption(a, rng)


@pytest.fixture(scope="module")
def encoded(model, picture):
    return model.encode([picture[0]]), model.condition([picture[1]]), model.condition([""])


def test_backwards_against_a_closed_form():
    """Of data N(0, s^2) the best eps is sqrt(1 - a) x / (a s^2 + 1 - a), and DDIM's limit keeps
    x_t / sqrt(a s^2 + 1 - a): up and down agree with it, the better the more steps."""
    alpha_bar, s2 = torch.linspace(0.9999, 0.01, 1000), 0.25
    variance = lambda a: a * s2 + 1 - a

    def unet(x, t, *_):
        a = alpha_bar[t].view(-1, 1, 1, 1).double()
        return (1 - a).sqrt() * x / variance(a)

    x_0 = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    errors = []
    for steps in (50, 500):
        way = sampler.ddim_inversion(unet, x_0, (), alpha_bar=alpha_bar, steps=steps)
        t = sampler.timesteps(steps)[0]
        exact = x_0 * (variance(float(alpha_bar[t])) / variance(float(alpha_bar[0]))) ** 0.5
        errors.append(((way[0] - exact).norm() / exact.norm()).item())
        assert torch.equal(way[-1], x_0)
    assert errors[1] < 0.2 * errors[0] < 0.02


def test_pictures_go_on_until_the_worst_is_good_enough():
    """Of two the first is there at once, the second never."""
    alpha_bar = torch.linspace(0.999, 0.01, 1000)
    unet = lambda x, t, context, *_: x + context.mean((1, 2)).view(-1, 1, 1, 1)
    cond = (torch.randn(1, 77, 8), torch.zeros(1, 4), torch.zeros(1, 6))
    null, x_T = tuple(map(torch.zeros_like, cond)), torch.zeros(2, 4, 2, 2)
    settings = dict(alpha_bar=alpha_bar, guidance=3.0)
    x_0 = sampler.sample(unet, x_T, cond, null, steps=[500], **settings)
    pivot = torch.stack([x_T, x_0 + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)])
    two = sampler.expand(cond, 2)
    found = invert.null_text(unet, pivot, [500], two, null, inner=2, **settings)
    assert found.evaluations == 2 + (2 + 2) * 2


def test_float16_fits_as_float32_does():
    """Of a large picture a gradient of the mean is smaller than float16 can hold."""
    alpha_bar = torch.linspace(0.999, 0.5, 1000)
    unet = lambda x, t, context, *_: x + context.mean((1, 2)).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    x_T, words, errors = torch.randn(1, 4, 256, 256), torch.randn(1, 77, 8), {}
    for dtype in (torch.float32, torch.float16):
        cond = tuple(c.to(dtype) for c in (words, torch.zeros(1, 4), torch.ones(1, 6)))
        null, x = tuple(map(torch.zeros_like, cond)), x_T.to(dtype)
        settings = dict(alpha_bar=alpha_bar, guidance=3.0)
        x_0 = sampler.sample(unet, x, cond, null, steps=[300], **settings)
        pivot, fits = torch.stack([x, x_0 + 0.004]), []
        keep = lambda name, make: fits.append(make()) or fits[-1]
        how = dict(inner=20, lr=0.001, tolerance=0.0, remember=keep)
        invert.null_text(unet, pivot, [300], cond, null, **how, **settings)
        errors[dtype] = fits[0]["error"].item()
    assert max(errors.values()) < 2e-6  # it begins at 0.004 squared, 1.6e-5


def test_editing_begins_with_the_picture(model, picture, tmp_path):
    """Inverted, it is drawn again, which the same seed's noise does not; by SDEdit it begins where
    the picture is noised to."""
    how = dict(steps=10, guidance=5.0, size=(128, 128))
    options = dict(strength=None, invert="negative-prompt", steps=10, guidance=5.0, negative="")
    args = SimpleNamespace(prompt=picture[1], out=str(tmp_path), **options)
    settings = slider.edit_settings(model, args, picture[0], (128, 128))

    def off(**settings):
        (drawn,) = slider.generate(model, args.prompt, [0], **how, **settings)
        return np.abs(np.asarray(drawn, float) - np.asarray(picture[0])).mean()

    assert off(**settings) < off() / 2
    z = model.encode([picture[0]])
    half = slider.sdedit(model, lambda seeds: z, 0.5, 10)
    level = torch.tensor([sampler.timesteps(10)[5]])
    x_t = sampler.add_noise(z, sampler.noise([3], z.shape[1:]), level, model.alpha_bar)
    assert half["skip"] == 5 and torch.equal(half["start_from"]([3]), x_t)


def test_a_step_up_undoes_a_step_down():
    alpha_bar = torch.linspace(0.999, 0.01, 1000)
    x, eps = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    for t, t_next in ((981, 961), (21, 1), (1, -19)):
        down = sampler.ddim_step(x, eps, t, t_next, alpha_bar)
        assert torch.allclose(sampler.ddim_step(down, eps, t_next, t, alpha_bar), x, atol=1e-10)


def test_a_step_up_asks_at_the_level_that_the_step_down_does():
    """Of an eps that is the level's alone, x_T comes back to the digit."""
    alpha_bar = torch.linspace(0.9999, 0.01, 1000)
    unet = lambda x, t, *_: torch.ones_like(x) * (t / 100).cos().view(-1, 1, 1, 1)
    x_T, settings = torch.randn(2, 4, 4, 4).double(), dict(alpha_bar=alpha_bar, steps=7)
    x_0 = sampler.sample(unet, x_T, (), guidance=1, **settings)
    way = sampler.ddim_inversion(unet, x_0, (), **settings)
    assert torch.allclose(way[0], x_T, atol=1e-9) and not torch.allclose(x_0, x_T, atol=0.1)


def test_another_edit_is_another_inversion(model, picture, tmp_path):
    """Whatever it depends on is in its file's name."""
    about = dict(prompt="a man", negative="", invert="negative-prompt", steps=1, guidance=2.0)
    others = dict(prompt="a woman", negative="a hat", invert="ddim", steps=2, guidance=3.0)
    about |= dict(strength=None, out=str(tmp_path))
    small = picture[0].resize((64, 64))
    for change in ({}, {}, *({name: value} for name, value in others.items())):
        slider.edit_settings(model, SimpleNamespace(**about | change), small, (64, 64))
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_the_embedding_s_gradient_agrees_with_finite_differences(model, encoded):
    """In float64, of both parts of the unconditional embedding, at three noise levels."""
    unet = UNet(model.unet.config).double().requires_grad_(False)
    unet.load_state_dict(model.unet.state_dict())
    double = lambda part: tuple(c.double() for c in part)
    (z, cond, uncond), g = encoded, torch.Generator().manual_seed(1)
    x_t, goal = torch.randn(2, 1, *z.shape[1:], generator=g, dtype=torch.float64)
    cond, (context, pooled, ids) = double(cond), double(uncond)
    for t in (901, 501, 21):
        with torch.no_grad():
            eps_c = unet(x_t, torch.tensor([t]), *cond)

        def error(context, pooled):
            here = (unet, x_t, t, t - 20, eps_c, (context, pooled, ids), goal)
            return invert.step_loss(*here, alpha_bar=model.alpha_bar, guidance=5.0)[1].sum()

        null = [c.clone().requires_grad_() for c in (context + 0.1, pooled + 0.1)]
        gradients = torch.autograd.grad(error(*null), null)
        for i, gradient in enumerate(gradients):
            direction = torch.randn(gradient.shape, generator=g, dtype=torch.float64)

            @torch.no_grad()
            def moved(h):
                return error(*(c + h * direction if j == i else c for j, c in enumerate(null)))

            h = 1e-4
            numeric = (moved(h) - moved(-h)).item() / (2 * h)
            along = (gradient * direction).sum().item()
            assert along == pytest.approx(numeric, rel=1e-5), (t, i)


@pytest.mark.slow
def test_null_text_inversion_comes_back_to_the_picture_and_ddim_alone_does_not(model, encoded):
    z, cond, uncond = encoded
    settings = dict(alpha_bar=model.alpha_bar, steps=8, guidance=5.0)
    error = {}
    for method in invert.METHODS:
        with counted(model.unet) as n:
            found = invert.invert(model.unet, z, cond, uncond, method=method, **settings)
        # What it says is what was counted.
        assert found.evaluations == sum(n.values()) <= invert.max_evaluations(method, 8)
        back = sampler.sample(model.unet, found.x_T, cond, found.uncond, **settings)
        error[method] = (back - z).square().mean().item()
    assert error["null-text"] < 0.2 * error["ddim"]
    assert error["negative-prompt"] < error["ddim"]


def test_negative_prompt_inversion_is_ddim_s_at_guidance_1(model, encoded):
    z, cond, uncond = encoded
    settings = dict(alpha_bar=model.alpha_bar, steps=4)
    found = invert.invert(model.unet, z, cond, uncond, method="negative-prompt", **settings)
    again = (model.unet, found.x_T, cond)
    guided = sampler.sample(*again, found.uncond, **settings, guidance=6.0)
    plain = sampler.sample(*again, **settings, guidance=1.0)
    assert torch.allclose(guided, plain, atol=1e-3)


def test_an_inversion_is_kept_and_its_key_knows_what_it_is_of(model, encoded, tmp_path):
    z, cond, uncond = encoded
    settings = dict(alpha_bar=model.alpha_bar, steps=2, inner=1)
    make = lambda _: invert.invert(model.unet, z, cond, uncond, **settings)
    made = inversions.cached(tmp_path / "i.safetensors", make)
    again = inversions.cached(tmp_path / "i.safetensors", lambda _: pytest.fail("made again"))
    assert torch.equal(made.x_T, again.x_T) and again.evaluations == 0
    assert all(torch.equal(a, b) for u, v in zip(made.uncond, again.uncond) for a, b in zip(u, v))
    name = inversions.cache_key(model, z, "a man", 30)
    assert name == inversions.cache_key(model, z, "a man", 30)
    others = [(z, "a woman", 30), (z, "a man", 31), (z + 0.01, "a man", 30)]
    assert len({name, *(inversions.cache_key(model, *other) for other in others)}) == 4
    weight = next(model.unet.parameters())
    before = weight.data.clone()
    weight.data += 0.01
    changed = inversions.cache_key(model, z, "a man", 30)
    weight.data.copy_(before)  # to the bit: other tests compare the model with its files
    assert changed != name


def test_an_inversion_that_was_stopped_goes_on_and_finds_the_same(
    model, encoded, tmp_path, monkeypatch
):
    z, cond, uncond = encoded
    settings = dict(alpha_bar=model.alpha_bar, steps=4, inner=2, tolerance=0.0)

    def make(remember):
        return invert.invert(model.unet, z, cond, uncond, remember=remember, **settings)

    whole = inversions.cached(tmp_path / "whole.safetensors", make)
    real, calls = invert.step_loss, []

    def stops(*args, **kw):
        calls.append(args[2])
        if len(calls) == 8:  # three for each t: within the third
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(invert, "step_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        inversions.cached(tmp_path / "part.safetensors", make)
    again = inversions.cached(tmp_path / "part.safetensors", make)
    _, _, third, last = sampler.timesteps(4)
    assert calls[8:] == [third] * 3 + [last] * 3  # the first two t were not fitted again
    assert torch.equal(whole.x_T, again.x_T)
    assert all(torch.equal(a, b) for u, v in zip(whole.uncond, again.uncond) for a, b in zip(u, v))
    assert whole.evaluations == again.evaluations
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["part.safetensors", "whole.safetensors"]


SIZES = [
    ((1024, 1024), (1024, 1024)),
    ((3000, 2000), (832, 1216)),
    ((900, 1600), (1344, 768)),
    ((400, 390), (1024, 1024)),
]


@pytest.mark.parametrize("size, expected", SIZES)
def test_pictures_for_sdxl_keep_their_proportions(size, expected, tmp_path, monkeypatch):
    """SDXL's own training sizes; a disc stays a disc."""
    picture = Image.new("RGB", size, "white")
    r, (cx, cy) = min(size) / 4, (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(picture).ellipse([cx - r, cy - r, cx + r, cy + r], fill="black")
    picture.save(tmp_path / "p.png")
    unet = SimpleNamespace(config={"block_out_channels": [320, 640, 1280]}, factor=4)
    sdxl = SimpleNamespace(unet=unet, size=1024, factor=8)
    fitted, found = slider.open_picture(sdxl, tmp_path / "p.png")
    assert found == expected and fitted.size == expected[::-1]
    assert all(side % 64 == 0 for side in found)
    dark = np.asarray(fitted.convert("L")) < 128
    wide, high = dark.any(0).sum(), dark.any(1).sum()
    assert abs(wide - high) <= 2


def test_the_miniature_takes_any_picture_as_a_square(model, tmp_path, capsys):
    Image.new("RGBA", (300, 200), (255, 0, 0, 128)).save(tmp_path / "p.png")
    fitted, size = slider.open_picture(model, tmp_path / "p.png")
    assert size == (128, 128) and fitted.size == (128, 128)
    assert fitted.getpixel((64, 64)) == (255, 127, 127)
    assert "300x200, brought to 128x128" in capsys.readouterr().out
    assert images.crop_and_resize(fitted, 64, 32).size == (32, 64)
