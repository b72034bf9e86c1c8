"""Many sliders at once, and one seed at many scales: the same pictures as one at a time, for
less."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_lora import trained_slider

import sampler
import slider
import train_text
from support import probe
from support.merge import Composed
from support.sweep import composed


@pytest.fixture
def several(model):
    """Four sliders of different ranks and layer sets. The last two's ranks add up to too much for
    narrow layers."""
    return [
        trained_slider(model.unet, i, rank=r, layers=layers).requires_grad_(False)
        for i, (r, layers) in enumerate([(2, "attn"), (4, "noxattn"), (18, "all"), (20, "xattn")])
    ]


def test_composed_sliders_are_each_ones_hooks_together(model, inputs, several):
    """One change for all against one hook for each, and the untouched weights back in place, the
    very tensors."""
    unet, scales = model.unet, [1.5, -0.7, 0.4, -1.0]
    weights = {n: p for n, p in unet.named_parameters()}
    with torch.no_grad():
        untouched = unet(*inputs)
        for s, scale in zip(several, scales):
            s.attach(unet).scale = scale
        expected = unet(*inputs)
        for s in several:
            s.detach()
            s.scale = 0.0
        composed = Composed(unet, list(zip(several, scales)))
        assert (
            len(composed.handles) > 1 and composed.replaced
        )  # this model and these ranks take both forms
        assert torch.equal(unet(*inputs), untouched)
        composed.scale = 1.0
        assert torch.allclose(unet(*inputs), expected, atol=1e-4)
        assert not torch.allclose(expected, untouched, atol=1e-2)
        composed.detach()
        assert torch.equal(unet(*inputs), untouched)
    assert all(p is weights[n] for n, p in unet.named_parameters())


def test_composed_sliders_leave_when_sampling_fails(model, inputs, several):
    first, second, third, _ = several
    sliders = [(first, 1.0, 0.3), (second, 2.0, 0.3), (third, 1.0, 0.5)]
    with pytest.raises(ZeroDivisionError), composed(model.unet, sliders) as switches:
        starts = [start for _, _, start in switches]
        assert len(starts) == 2 and set(starts) == {0.3, 0.5}  # the first two as one
        1 / 0
    assert not any(m._forward_hooks for m in model.unet.modules())


def latents_of(model, monkeypatch):
    """Make model.decode hand out the latents themselves."""
    monkeypatch.setattr(type(model), "decode", lambda self, x_0: list(x_0))


@pytest.mark.slow
def test_a_sweep_is_the_separate_runs_for_less(model, several, monkeypatch):
    """A 7-scale sweep with the start at 0.4 against seven runs: the same latents, at most 0.75 of
    the network evaluations."""
    latents_of(model, monkeypatch)
    moving, fixed = several[1], several[0]
    counted = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    settings = dict(steps=10, start=0.4)
    scales = [-3, -2, -1, 0, 1, 2, 3]
    columns = [[(moving, float(s)), (fixed, 0.5)] for s in scales]
    together = slider.sweep(model, "a photo of a person", [3, 4], columns, **settings)
    cost, counted[:] = sum(counted), []
    alone = lambda column: slider.generate(model, "a photo of a person", [3, 4], column, **settings)
    apart = [alone(column) for column in columns]
    assert cost <= 0.75 * sum(counted)
    hook.remove()
    for a, b in zip(together, apart):
        assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(a, b))
    assert not torch.allclose(together[0][0], together[6][0], atol=0.1)


def test_a_slider_left_at_a_scale_is_off_in_the_steps_that_a_sweep_shares(
    model, several, monkeypatch
):
    latents_of(model, monkeypatch)
    columns = [[(several[1], s)] for s in (-1.0, 1.0)]
    expected = slider.sweep(model, "a photo of a person", [1], columns, steps=4)
    several[1].attach(model.unet).scale = 3.0
    found = slider.sweep(model, "a photo of a person", [1], columns, steps=4)
    several[1].detach()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(expected, found))


def test_a_slider_that_is_off_in_the_first_column_keeps_its_start(model, several, monkeypatch):
    latents_of(model, monkeypatch)
    sweep = lambda columns: slider.sweep(model, "a photo of a person", [1], columns, steps=6)
    column = lambda scale, start=0.6: [(several[0], scale, start), (several[1], 1.0)]
    both, (alone,) = sweep([column(0.0), column(2.0)]), sweep([column(2.0)])
    (early,) = sweep([column(2.0, 0.3)])  # the others' start
    assert torch.allclose(both[1][0], alone[0], atol=1e-4)
    assert not torch.allclose(alone[0], early[0], atol=1e-2)


def test_scale_0_in_a_sweep_is_the_untouched_model_bit_for_bit(model, several, monkeypatch):
    latents_of(model, monkeypatch)
    columns = [[(several[1], s)] for s in (-1.0, 0.0, 1.0)]
    swept = slider.sweep(model, "a photo of a person", [1, 2], columns, steps=4)
    untouched = slider.generate(model, "a photo of a person", [1, 2], steps=4)
    assert all(map(torch.equal, swept[1], untouched))


def test_columns_of_a_sweep_that_name_different_sliders_are_refused(model, several):
    one, other = several[:2]
    for columns in ([[(one, 1.0)], [(other, 1.0)]], [[], [(one, 1.0)]]):
        with pytest.raises(ValueError, match="columns name different sliders"):
            slider.sweep(model, "a photo of a person", [1], columns, steps=4)
    with pytest.raises(ValueError, match="one start"):
        columns = [[(one, 1.0, 0.2)], [(one, 1.0, 0.6)]]
        slider.sweep(model, "a photo of a person", [1], columns, steps=4)


def test_every_slider_has_its_own_start(model, several, monkeypatch):
    """A slider that starts at 0.8 leaves the x_t before that as they were with the other slider
    alone."""
    seen = []
    x_T, cond = sampler.noise([0], (4, 16, 16)), model.condition(["a photo of a person"])
    for sliders in ([(several[1], 1.0)], [(several[1], 1.0), (several[2], 1.0, 0.8)]):
        states = []
        settings = dict(alpha_bar=model.alpha_bar, steps=10, guidance=1.0, start=0.3)
        on_step = lambda i, t, x_t, eps: states.append((t, x_t))
        sampler.sample(model.unet, x_T, cond, sliders=sliders, on_step=on_step, **settings)
        seen.append(states)
    same = {t: torch.allclose(a, b, atol=1e-5) for (t, a), (_, b) in zip(*seen)}
    # x_t of the step after the first below t_on = 200 differs.
    assert same == {t: t > 0.2 * 1000 - 100 for t in same}


def test_eq_8_at_sampling_time_is_what_it_says(model):
    """One step of --guide against the four predictions made one by one, and a slider that made
    just that change."""
    cond, uncond = model.condition(["a photo of a person"]), model.condition([""])
    ages = ("old person", "young person")
    ends = model.condition([f"{age}{p}" for age in ages for p in (", with glasses", "")])
    x_t = sampler.noise([5], (4, 16, 16))
    with torch.no_grad():
        eps = lambda c: model.unet(x_t, torch.tensor([500]), *c)
        one = [eps(tuple(e[i : i + 1] for e in ends)) for i in range(4)]
        plain = eps(uncond) + 4.0 * (eps(cond) - eps(uncond))
        expected = plain + 0.7 * (one[0] + one[1] - one[2] - one[3]) / 2
        delta = lambda x_t, t: 0.7 * train_text.ends_difference(model.unet, x_t, t, ends)
        settings = dict(alpha_bar=model.alpha_bar, steps=[500, 250], guidance=4.0, start=0.0)
        found = []
        for change in (None, delta):
            x = sampler.sample(model.unet, x_t, cond, uncond, delta=change, stop=1, **settings)
            # The eps that this step was made with.
            a, b = (float(model.alpha_bar[t]) for t in (500, 250))
            scale = (1 - b) ** 0.5 - (b / a) ** 0.5 * (1 - a) ** 0.5
            found.append((x - (b / a) ** 0.5 * x_t) / scale)
        assert torch.allclose(found[0], plain, atol=1e-4)
        assert torch.allclose(found[1], expected, atol=1e-4)
        assert not torch.allclose(found[1], plain, atol=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_sweep_in_small_batches_is_each_walk_alone(model, several, monkeypatch, guidance):
    """Three seeds at three scales, then at three strengths of eq. (8), two pictures at a time."""
    latents_of(model, monkeypatch)
    prompt, size, seeds = "a photo of a person", (64, 64), [1, 2, 3]
    uncond = model.condition([""], size)
    ends = model.condition(["an old person", "a young person"], size)
    change = lambda x_t, t: train_text.ends_difference(model.unet, x_t, t, ends)
    settings = dict(steps=4, guidance=guidance)

    def alone(**more):
        x_T, cond = sampler.noise(seeds, (4, 8, 8)), model.condition([prompt], size)
        more |= settings | dict(alpha_bar=model.alpha_bar)
        return sampler.sample(model.unet, x_T, cond, uncond, **more)

    strengths = [-1.0, 0.0, 2.0]
    columns = [[(several[1], s)] for s in strengths]
    with_slider = [dict(sliders=column) for column in columns]
    with_delta = [dict(delta=lambda x_t, t, s=s: s * change(x_t, t)) for s in strengths]
    eq_8 = dict(delta=change, etas=strengths)
    for columns, more, each in ((columns, {}, with_slider), ([[]] * 3, eq_8, with_delta)):
        more |= settings | dict(size=size, batch=2)
        drawn = slider.sweep(model, prompt, seeds, columns, **more)
        for column, here in zip(drawn, each):
            assert torch.allclose(torch.stack(column), alone(**here), atol=1e-3)
        assert not torch.allclose(drawn[0][0], drawn[2][0], atol=0.05)


def test_scales_over_the_useful_range(several):
    one, other = several[:2]
    assert slider.useful_scales([one]) == [-3, -2, -1, 0, 1, 2, 3]
    one.metadata = {"probe": json.dumps({"range": [-1.5, 6.0]})}
    other.metadata = {"probe": json.dumps({"range": [-6.0, 3.0]})}
    assert slider.useful_scales([one]) == [-1.5, -1, -0.5, 0, 2, 4, 6]
    assert slider.useful_scales([one, other]) == [-1.5, -1, -0.5, 0, 1, 2, 3]


@pytest.mark.parametrize("low, high, left", [(-4, 4, 3), (-1, 4, 2), (0, 4, 0), (1, 4, 0)])
def test_even_scales_look_evenly_spaced(low, high, left):
    """Pictures whose grey is a known curve of the scale, steep near 0: neighbours must differ by
    about the same."""
    grey = lambda scale: 120 + 100 * np.tanh(scale / 2)
    picture = lambda s: Image.fromarray(np.full((4, 4), grey(s), dtype=np.float32), mode="F")
    draw = lambda scales: [[picture(s)] * 2 for s in scales]
    scales = slider.even_scales(draw, low, high)
    steps = np.diff([grey(s) for s in scales])
    assert len(scales) == 7 and scales[0] == low and scales[-1] == high
    assert sum(s < 0 for s in scales) == left
    assert (0 in scales) == (low <= 0) and steps.min() > 0
    for side in (steps[:left], steps[left:]):
        assert not len(side) or side.std() < 0.15 * side.mean()
    assert steps.max() < 1.6 * steps.min()


def test_where_a_slider_stops_being_useful():
    scales = [0.0, 1.0, 2.0, 4.0, 8.0]
    end = lambda surprise, change: probe.useful_end(scales, surprise, change)
    breaks_down = end([1, 1, 1.1, 1.2, 2.2], [0, 1, 2, 4, 8])
    assert breaks_down == pytest.approx(4 + 4 * 0.05)
    assert end([1, 1, 1, 1, 1], [0, 1, 1.5, 1.6, 1.7]) == 2.0  # stays as it is from 2 on
    assert end([1, 1, 1, 1, 1], [0, 1, 2, 3, 4]) == 8.0
    assert end([1, 1, float("nan"), 1, 1], [0, 1, 2, 4, 8]) == 1.0
    downward = [-s for s in scales]
    breaks_down = probe.useful_end(downward, [1, 1, 1, 1.5, 9], [0, -1, -2, -4, -8])
    assert breaks_down == pytest.approx(-3)


@pytest.mark.slow
def test_a_slider_that_wrecks_pictures_is_found_out(model):
    cond, uncond = model.condition(["a photo of a person"]), model.condition([""])
    found = []
    for strength in (0.4, 6.0):
        s = trained_slider(model.unet, 3, layers="noxattn")
        for name, p in s.named_parameters():
            if "lora_up" in name:
                p.mul_(strength)
        found.append(probe.probe(model, s, cond, uncond, (4, 16, 16), seeds=2, steps=6))
    gentle, wild = found
    assert gentle["range"][0] < -4 and gentle["range"][1] > 4
    assert -2 < wild["range"][0] < 0 < wild["range"][1] < 2
    for one in found:
        assert one["change"] == sorted(one["change"])
        assert one["change"][4] == 0 and one["surprise"][4] == 1


def test_two_groups_of_sliders_with_starts_of_their_own_add_up(model, inputs):
    """Four sliders whose ranks call for a second W in narrow layers, two and two on switches of
    their own."""
    four = [trained_slider(model.unet, i, rank=9, layers="attn") for i in range(4)]
    starts = [0.3, 0.3, 0.5, 0.5]
    with torch.no_grad():
        with composed(model.unet, [(s, 1.0, at) for s, at in zip(four, starts)]) as switches:
            for switch, scale, _ in switches:
                switch.scale = scale
            ours = model.unet(*inputs)
        for s in four:
            s.attach(model.unet).scale = 1.0
        expected = model.unet(*inputs)
        for s in four:
            s.detach()
    assert len(switches) == 2 and torch.allclose(ours, expected, atol=1e-3)
    twice = [(four[0], 1.0, 0.3), (four[0], 1.0, 0.5)]
    with pytest.raises(ValueError, match="twice"), composed(model.unet, twice):
        pass
