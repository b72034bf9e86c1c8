"""The noise schedule, DDIM with classifier-free guidance, and sliders that switch on late.

Everything here is about one variable, x_t: latents (B, 4, h, w) at noise level (timestep) t,

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,  eps ~ N(0, I)  (Ho et al. 2020, eq. 4)

with t from 999 (almost pure noise) down to 0 (almost a picture).
"""

import torch


def make_alpha_bar(config: dict) -> torch.Tensor:
    """alpha_bar_t for t = 0 ... T-1, (T,), float32, from a scheduler config (formats/schedule.py).

    SDXL's betas are `scaled_linear`: their square roots are linear. `rescale_betas_zero_snr` moves
    sqrt(alpha_bar) to end at 0, in pure noise (Lin et al. 2023, algorithm 1). At 0 eps is x_t and
    tells nothing of x_0, so the end is 2^-28: there float32 still holds x_0 to 1e-3."""
    T, start, end = (config[k] for k in ("num_train_timesteps", "beta_start", "beta_end"))
    beta = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2  # (T,)
    alpha_bar = torch.cumprod(1 - beta, 0)
    if config.get("rescale_betas_zero_snr"):
        shifted = alpha_bar.sqrt() - alpha_bar[-1].sqrt()
        alpha_bar = (alpha_bar[0] * (shifted / shifted[0]) ** 2).clamp(min=2**-28)
    return alpha_bar.float()


def timesteps(steps: int | list[int], T: int = 1000, spacing: str = "leading") -> list[int]:
    """The noise levels that DDIM visits, largest first. spacing: `leading` with offset 1, as
    SDXL's; `trailing`, which begins at T - 1; `linspace`, which has 0 as well.

    A list is taken as the levels themselves, for a model that was distilled to a few of them, such
    as [999, 749, 499, 249]. ValueError unless 1 <= steps <= T, or the levels fall and lie below T.
    """
    if isinstance(steps, list):
        if not steps or sorted(set(steps), reverse=True) != steps or steps[0] >= T or steps[-1] < 0:
            levels = ",".join(map(str, steps))
            raise ValueError(f"steps: noise levels must fall from {T - 1} at most, not {levels}")
        return steps
    if not 1 <= steps <= T:
        raise ValueError(f"steps: {steps} is not between 1 and {T}")
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "linspace":
        return [round((T - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)]
    offset = 1 if steps < T else 0  # where there is room for it
    return [i * (T // steps) + offset for i in reversed(range(steps))]


def noise(seeds, shape, device="cpu", dtype=torch.float32):
    """x_T for each seed: (len(seeds), *shape). Drawn on the CPU in float32 with one generator a
    seed, so that a seed means the same noise on every machine, in every dtype and in every
    batch."""
    draw = lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
    return torch.stack([draw(seed) for seed in seeds]).to(device, dtype)


def add_noise(x_0, eps, t, alpha_bar):
    """x_0, eps (B, 4, h, w), t (B,) -> x_t (B, 4, h, w). Ho et al. 2020, eq. (4)."""
    a = alpha_bar.to(x_0.device)[t].view(-1, 1, 1, 1)  # float32: bfloat16 would round 1 - a to 0
    return a.sqrt().to(x_0.dtype) * x_0 + (1 - a).sqrt().to(x_0.dtype) * eps


def implied_x_0(x_t, eps, a_t):
    """The x_0 that x_t and eps imply: Ho et al. 2020, eq. (4), solved for x_0.
    a_t: alpha_bar_t, a number or (B, 1, 1, 1)."""
    return (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5


def ddim_step(x_t, eps, t: int, t_next: int, alpha_bar):
    """One deterministic step from level t to t_next, down or up (Song et al. 2021, eq. (12) with
    sigma = 0).

    A level below 0 stands for the end: alpha_bar_0, as SDXL's scheduler has `set_alpha_to_one`
    false."""
    a_t, a_next = float(alpha_bar[max(t, 0)]), float(alpha_bar[max(t_next, 0)])
    return a_next**0.5 * implied_x_0(x_t, eps, a_t) + (1 - a_next) ** 0.5 * eps


def convert_v_to_eps(unet, alpha_bar):
    """Make `unet`, which predicts v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans & Ho 2022,
    appendix D), return eps to every caller from now on.

    In float32 at least, and so is every x_t that follows from it: implied_x_0 divides by sqrt(a_t),
    which near pure noise would blow up what a half dtype rounds off eps or x_t."""

    def hook(unet, inputs, v):
        v, x_t = at_least_float32(v), at_least_float32(inputs[0])  # (B, 4, h, w) each
        a_t = alpha_bar[inputs[1]].view(-1, 1, 1, 1)
        return a_t.sqrt() * v + (1 - a_t).sqrt() * x_t

    unet.register_forward_hook(hook)


def guided_eps(unet, x_t, t, cond, uncond=None, guidance: float = 1.0):
    """Classifier-free guidance (Ho & Salimans 2022): (eps_u + g (eps_c - eps_u), eps_c).

    x_t: (B, 4, h, w). t: a number or (B,). cond, uncond: tuples of context (B, 77, d),
    pooled (B, p), time_ids (B, 6). At guidance 1, or without uncond, eps_u is not computed."""
    t = t if torch.is_tensor(t) else torch.full((len(x_t),), t, device=x_t.device)
    if guidance == 1 or uncond is None:
        eps_c = unet(x_t, t, *cond)
        return eps_c, eps_c
    both = (torch.cat(parts) for parts in zip(uncond, cond))  # one batch of 2 B
    eps_u, eps_c = unet(x_t.repeat(2, 1, 1, 1), t.repeat(2), *both).chunk(2)
    return eps_u + guidance * (eps_c - eps_u), eps_c


@torch.no_grad()
def sample(
    unet,
    x_T,
    cond,
    uncond=None,
    *,
    alpha_bar,
    steps=30,
    guidance: float = 5.0,
    sliders=(),
    start: float = 0.3,
    delta=None,
    skip: int = 0,
    stop: int | None = None,
    on_step=None,
):
    """Denoise x_T (B, 4, h, w) to latents x_0 (B, 4, h, w).

    cond, uncond: as in guided_eps, of B rows or of one for all. uncond may be a list with one for
                each step, as null-text inversion makes it (invert.py).
    steps:      as in timesteps.
    sliders:    pairs (slider, scale), or triples (slider, scale, start). A scale is a number, or a
                tensor (B,) with one for each picture. Unattached ones are attached meanwhile.
    start:      delayed LoRA: the scale is 0 while t > t_on = (1 - start) T, so that the frozen
                model lays out the picture. 0.3: start_noise = 700 in the paper's SDXL notebooks.
    delta:      function (x_t, t (B,)) -> (B, 4, h, w), added to eps from `start` on in the place of
                a slider: eq. (8) itself (train_text.ends_difference).
    skip, stop: begin after `skip` steps, where x_T is the x_t there; end after `stop` steps.
    on_step:    called as on_step(i, t, x_t, eps_c) in each step, before x_t moves on.
    """
    T = len(alpha_bar)
    ts = timesteps(steps, T)
    x_t, cond = x_T, expand(cond, len(x_T))
    sliders = [entry if len(entry) == 3 else (*entry, start) for entry in sliders]
    copies = 1 if uncond is None or guidance == 1 else 2  # of the batch, in guided_eps
    repeat = lambda scale: torch.cat([scale] * copies) if torch.is_tensor(scale) else scale
    to_detach = [slider.attach(unet) for slider, _, _ in sliders if not slider.attached]
    try:
        for i in range(len(ts))[skip:stop]:
            t, t_next = [*ts, -1][i : i + 2]  # -1: the end
            for slider, scale, slider_start in sliders:
                slider.scale = repeat(scale) if t <= (1 - slider_start) * T else 0.0
            u = uncond[i] if isinstance(uncond, list) else uncond
            u = None if u is None else expand(u, len(x_t))
            eps, eps_c = guided_eps(unet, x_t, t, cond, u, guidance)
            if delta is not None and t <= (1 - start) * T:
                # Added once, outside of guidance: a slider changes eps_u as it changes eps_c.
                eps = eps + delta(x_t, torch.full((len(x_t),), t, device=x_t.device)).to(eps.dtype)
            if on_step:
                on_step(i, t, x_t, eps_c)
            x_t = ddim_step(x_t, eps, t, t_next, alpha_bar)
    finally:
        for slider, _, _ in sliders:
            slider.scale = 0.0
        for slider in to_detach:
            slider.detach()
    return x_t


def steps_before(start: float, steps, T: int = 1000) -> int:
    """How many of the DDIM steps lie before sliders with this start switch on."""
    return sum(t > (1 - start) * T for t in timesteps(steps, T))


@torch.no_grad()
def ddim_inversion(unet, x_0, cond, *, alpha_bar, steps=30):
    """Latents x_0 (B, 4, h, w) walked up to noise at guidance 1. Returns x*_T ... x*_0 on the way,
    (steps + 1, B, 4, h, w).

    A step up from t' to t wants eps(x_t, t) while x_t is not known yet. eps(x_{t'}, t) stands in
    for it, since the two differ little when steps are short (Song et al. 2021, section 4.3)."""
    ts, trajectory = timesteps(steps, len(alpha_bar)), [x_0]
    for t, t_lower in reversed(list(zip(ts, [*ts[1:], -1]))):
        x_lower = trajectory[-1]  # x_{t'}, of level t_lower
        levels = torch.full((len(x_0),), t, device=x_0.device)
        eps = unet(x_lower, levels, *expand(cond, len(x_0)))  # level t: x_lower stands in for x_t
        trajectory.append(ddim_step(x_lower, eps, t_lower, t, alpha_bar))
    return torch.stack(trajectory[::-1])


def expand(cond, n: int):
    """The conditioning of one prompt for n pictures: (1, ...) -> (n, ...) each; n rows stay as
    they are."""
    return tuple(c.expand(n, *c.shape[1:]) for c in cond)


def at_least_float32(x):
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
