"""The schedule against its definition, DDIM against a closed form and against diffusers, guidance
and the late LoRA."""

import pytest
import torch

import sampler

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
ALPHA_BAR = sampler.make_alpha_bar(CONFIG)
COND = (torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_alpha_bar_is_the_product_of_one_minus_beta():
    product, expected = 1.0, []
    for i in range(1000):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
        expected.append(product)
    assert torch.allclose(ALPHA_BAR, torch.tensor(expected), rtol=1e-5)


def test_a_walk_in_two_parts_has_each_steps_own_uncond_and_a_late_delta():
    """As a sweep makes it: the steps before the start once, then the others."""
    unet = lambda x, t, c, *_: x + c.view(-1, 1, 1, 1)
    cond = lambda value: (torch.full((1,), float(value)),) * 3
    nulls = [cond(i) for i in range(6)]
    settings = dict(alpha_bar=ALPHA_BAR, steps=6, guidance=3.0)
    walk = lambda x, **part: sampler.sample(unet, x, cond(9), nulls, **settings, **part)
    x_T = sampler.noise([0], (4, 2, 2))
    assert torch.equal(walk(walk(x_T, stop=2), skip=2), walk(x_T))
    late = dict(alpha_bar=ALPHA_BAR, steps=[500, 250], guidance=1, start=0.6)
    change = lambda x, t: torch.ones_like(x)
    plain, guided = (
        sampler.sample(unet, x_T, cond(9), delta=delta, stop=1, **late) for delta in (None, change)
    )
    assert torch.equal(plain, guided)  # at t = 500 it is not on yet
    plain, guided = (
        sampler.sample(unet, x_T, cond(9), delta=delta, **late) for delta in (None, change)
    )
    assert not torch.equal(plain, guided)


@pytest.mark.parametrize("steps", [1, 4, 30, 50, 77])
def test_schedule_and_steps_agree_with_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    spacing = dict(steps_offset=1, timestep_spacing="leading")
    ends = dict(set_alpha_to_one=False, clip_sample=False)
    theirs = diffusers.DDIMScheduler(**CONFIG, **spacing, **ends)
    theirs.set_timesteps(steps)
    ts = sampler.timesteps(steps)
    assert ts == theirs.timesteps.tolist()
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 5, 5, generator=g), torch.randn(2, 4, 5, 5, generator=g)
    for t in (ts[0], ts[-1]):
        ours = sampler.ddim_step(x, eps, t, t - 1000 // steps, ALPHA_BAR)
        assert torch.allclose(ours, theirs.step(eps, t, x).prev_sample, rtol=1e-4, atol=1e-5)


def gaussian_unet(mean, std):
    """The exact eps for data x_0 ~ N(mean, std^2): eps = sqrt(1 - a) (x_t - sqrt(a) mean) / (a
    std^2 + 1 - a)."""

    def unet(x, t, *cond):
        a = ALPHA_BAR[t].view(-1, 1, 1, 1).to(x.dtype)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return unet


def test_ddim_follows_the_closed_form_on_gaussian_data():
    """On Gaussian data the probability-flow ODE keeps (x_t - sqrt(a_t) mean) / sqrt(a_t std^2 + 1
    - a_t) constant."""
    mean, std = 0.7, 0.3
    x_T = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (50, 200, 1000):
        settings = dict(alpha_bar=ALPHA_BAR, steps=steps, guidance=1)
        x_0 = sampler.sample(gaussian_unet(mean, std), x_T, COND, **settings)
        first, last = ALPHA_BAR[sampler.timesteps(steps)[0]].double(), ALPHA_BAR[0].double()
        constant = (x_T - first.sqrt() * mean) / (first * std**2 + 1 - first).sqrt()
        exact = last.sqrt() * mean + constant * (last * std**2 + 1 - last).sqrt()
        errors.append((x_0 - exact).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 5e-3


def test_add_noise_keeps_unit_variance_and_mixes_as_written():
    x_0, eps = torch.full((2, 4, 3, 3), 2.0), torch.full((2, 4, 3, 3), -1.0)
    x_t = sampler.add_noise(x_0, eps, torch.tensor([0, 999]), ALPHA_BAR)
    for row, t in zip(x_t, (0, 999)):
        assert torch.allclose(row, 2 * ALPHA_BAR[t].sqrt() - (1 - ALPHA_BAR[t]).sqrt())


def test_noise_of_half_precision_latents_is_not_rounded_away():
    """alpha_bar_0 = 0.99915 is 1 in bfloat16: 1 - alpha_bar is not."""
    x_0, eps = torch.zeros(1, 4, 2, 2).bfloat16(), torch.ones(1, 4, 2, 2).bfloat16()
    x_t = sampler.add_noise(x_0, eps, torch.tensor([0]), ALPHA_BAR)
    assert x_t.dtype == torch.bfloat16
    assert x_t.float().mean().item() == pytest.approx(0.00085**0.5, rel=0.01)


def test_guidance_is_linear_and_runs_one_batch():
    calls = []

    def unet(x, t, context, pooled, time_ids):
        calls.append(len(x))
        return x * 0 + context.view(-1, 1, 1, 1)

    cond, uncond = (torch.full((2,), 3.0),) * 3, (torch.full((2,), 1.0),) * 3
    x = torch.zeros(2, 4, 2, 2)
    assert torch.equal(sampler.guided_eps(unet, x, 5, cond, uncond, 4.0)[0], x + 1 + 4 * (3 - 1))
    assert torch.equal(sampler.guided_eps(unet, x, 5, cond, uncond, 1.0)[0], x + 3)
    assert calls == [4, 2]


class Knob:
    scale, attached = 9.0, True


@pytest.mark.parametrize("start, on_from", [(0.0, 1000), (0.3, 700), (0.5, 500), (1.0, 0)])
def test_the_slider_is_off_while_t_is_above_t_on(start, on_from):
    knob, seen = Knob(), []

    def unet(x, t, *cond):
        seen.append((int(t[0]), knob.scale))
        return x

    settings = dict(alpha_bar=ALPHA_BAR, steps=20, guidance=1, start=start)
    sampler.sample(unet, torch.zeros(1, 4, 2, 2), COND, sliders=[(knob, 2.0)], **settings)
    assert [scale for _, scale in seen] == [2.0 if t <= on_from else 0.0 for t, _ in seen]
    assert knob.scale == 0.0 and len({scale for _, scale in seen}) == (2 if 0 < start < 1 else 1)
    if 0 < on_from < 1000:  # at t_on itself it is on
        seen.clear()
        levels, settings["steps"] = [on_from + 1, on_from], [on_from + 1, on_from]
        sampler.sample(unet, torch.zeros(1, 4, 2, 2), COND, sliders=[(knob, 2.0)], **settings)
        assert seen == list(zip(levels, (0.0, 2.0))) and sampler.steps_before(start, levels) == 1


def test_stop_gives_the_x_t_on_the_way_and_noise_belongs_to_its_seed():
    x_T = sampler.noise([3, 4], (4, 5, 5))
    assert torch.equal(x_T[1], sampler.noise([4], (4, 5, 5))[0])
    unet, visited = gaussian_unet(0.1, 0.9), []
    on_step = lambda i, t, x, eps: visited.append(x)
    settings = dict(alpha_bar=ALPHA_BAR, steps=10, guidance=1)
    sampler.sample(unet, x_T, COND, on_step=on_step, **settings)
    part = sampler.sample(unet, x_T, COND, stop=4, **settings)
    assert torch.equal(part, visited[4])


def test_every_number_of_steps_is_a_way_down():
    for spacing in ("leading", "trailing", "linspace"):
        for steps in (1, 2, 3, 7, 500, 501, 999, 1000):
            ts = sampler.timesteps(steps, spacing=spacing)
            assert len(ts) == steps and sampler.timesteps(ts) == ts


def test_impossible_steps_are_refused():
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match="steps"):
            sampler.timesteps(steps)


def test_levels_of_ones_own(model):
    """The levels that a number of steps stands for, named one by one, are the same walk; levels
    that do not fall are refused."""
    prompts = model.condition(["a man"]), model.condition([""])
    x_T = sampler.noise([0], (4, 16, 16))
    settings = dict(alpha_bar=model.alpha_bar)
    walk = lambda steps: sampler.sample(model.unet, x_T, *prompts, steps=steps, **settings)
    assert torch.equal(walk(3), walk(sampler.timesteps(3)))
    assert not torch.equal(walk(4), walk([999, 749, 499, 249]))
    for bad in ([], [1, 2], [5, 5], [1000, 3], [3, -1]):
        with pytest.raises(ValueError, match="steps: noise levels"):
            sampler.timesteps(bad)
