"""The noise schedule, DDIM with classifier-free guidance, and LoRA sliders that switch on late.

Everything in this file is about one variable, x_t: latents of shape (B, 4, h, w) at noise level t,

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,        eps ~ N(0, 1)           (Ho et al. 2020, eq. 4)

with t from 999 (almost pure noise) down to 0 (almost a picture).
"""

import torch

import lora


def make_alpha_bar(config: dict) -> torch.Tensor:
    """alpha_bar_t for t = 0 ... T-1, shape (T,), float32, from a folder's scheduler_config.json.

    SDXL's betas are `scaled_linear`: their square roots are linear. Raises ValueError for another kind.
    """
    if config.get("beta_schedule") != "scaled_linear":
        raise ValueError(f"scheduler: beta_schedule {config.get('beta_schedule')!r} is not SDXL's 'scaled_linear'")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"scheduler: prediction_type {config['prediction_type']!r}: only 'epsilon' models are supported")
    try:
        T, start, end = config["num_train_timesteps"], config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
        beta = torch.linspace(start, end, T, dtype=torch.float64) ** 2
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"scheduler: missing or odd numbers ({error})") from None
    return torch.cumprod(1 - beta, 0).float()  # (T,)


def timesteps(steps: int | list[int], T: int = 1000) -> list[int]:
    """The `steps` noise levels that DDIM visits, largest first; `leading` spacing with offset 1, as SDXL's. Or the levels
    themselves, for a model that was distilled to a few of its own: [999, 749, 499, 249].

    Raises ValueError unless 1 <= steps <= T, or the levels fall and lie below T.
    """
    if isinstance(steps, list):
        if not steps or sorted(set(steps), reverse=True) != steps or steps[0] >= T or steps[-1] < 0:
            raise ValueError(f"steps: noise levels must fall from at most {T - 1} to at least 0, not {','.join(map(str, steps))}")
        return steps
    if not 1 <= steps <= T:
        raise ValueError(f"steps: {steps} is not between 1 and {T}")
    return [min(i * (T // steps) + 1, T - 1) for i in reversed(range(steps))]


def add_noise(x_0, eps, t, alpha_bar):
    """x_0, eps (B, 4, h, w), t (B,) -> x_t (B, 4, h, w). Ho et al. 2020, eq. (4)."""
    a = alpha_bar.to(x_0.device)[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1), float32: in bfloat16 1 - a would be 0 at the lowest t
    return a.sqrt().to(x_0.dtype) * x_0 + (1 - a).sqrt().to(x_0.dtype) * eps


def ddim_step(x_t, eps, t: int, t_next: int, alpha_bar):
    """One deterministic DDIM step from level t to t_next (Song et al. 2021, eq. 12 with sigma = 0), down or up.

    A level below 0 means the end: alpha_bar_0, since SDXL's scheduler sets `set_alpha_to_one` to false.
    """
    a_t, a_next = float(alpha_bar[max(t, 0)]), float(alpha_bar[max(t_next, 0)])
    return a_next**0.5 * implied_x_0(x_t, eps, a_t) + (1 - a_next) ** 0.5 * eps


def implied_x_0(x_t, eps, a_t):
    """The picture that x_t and eps imply: Ho et al. 2020, eq. (4), solved for x_0. a_t: alpha_bar_t, a number or (B, 1, 1, 1)."""
    return (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5


@torch.no_grad()
def ddim_backwards(unet, x_0, cond, *, alpha_bar, steps=30):
    """Latents x_0 (B, 4, h, w) walked up to noise, at guidance 1: x*_T ... x*_0, (steps + 1, B, 4, h, w), noise first.

    A step up from level t' to t wants eps(x_t, t), and x_t is not known yet: eps(x_{t'}, t) stands in for it, as the two
    differ little when steps are short (Song et al. 2021, section 4.3; Mokady et al. 2023).
    """
    ts, way = timesteps(steps, len(alpha_bar)), [x_0]
    for t, t_next in reversed(list(zip(ts, [*ts[1:], -1]))):
        eps = unet(way[-1], torch.full((len(x_0),), t, device=x_0.device), *rows(cond, len(x_0)))
        way.append(ddim_step(way[-1], eps, t_next, t, alpha_bar))
    return torch.stack(way[::-1])


def precise(x):
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rows(cond, n: int):
    """The conditioning of one prompt for n pictures: (1, ...) -> (n, ...) of each part; n rows stay as they are."""
    return tuple(c.expand(n, *c.shape[1:]) for c in cond)


def guided_eps(unet, x_t, t, cond, uncond=None, guidance: float = 1.0, ends=None, eta=0.0):
    """eps_u + g (eps_c - eps_u): classifier-free guidance (Ho & Salimans 2022). Returns it, and eps_c alone.

    t: a number, or (B,). cond, uncond: tuples (context (B, 77, d), pooled (B, p), time_ids (B, 6)). guidance 1 needs, and runs, no uncond.
    ends: as in ends_difference; with it the right-hand side of Concept Sliders' eq. (8), eps + eta * ends_difference,
    takes the place of eps: what a trained slider imitates, at 2|P| more evaluations. eta: a number, or (B,).
    """
    t = t if torch.is_tensor(t) else torch.full((len(x_t),), t, device=x_t.device)
    if guidance == 1 or uncond is None:
        eps = eps_c = unet(x_t, t, *cond)
    else:  # both in one batch
        eps_u, eps_c = unet(x_t.repeat(2, 1, 1, 1), t.repeat(2), *(torch.cat(part) for part in zip(uncond, cond))).chunk(2)
        eps = eps_u + guidance * (eps_c - eps_u)
    if ends is not None:  # the slider changes eps_u as it changes eps_c, so guidance does not multiply it
        eta = eta.view(-1, 1, 1, 1) if torch.is_tensor(eta) else eta
        eps = eps + (eta * ends_difference(unet, x_t, t, ends)).to(eps.dtype)
    return eps, eps_c


def ends_difference(unet, x_t, t, ends):
    """mean_{p in P} (eps(x_t, (c+, p), t) - eps(x_t, (c-, p), t)): what eq. (8) adds, but for eta. (B, 4, h, w), float32.

    x_t (B, 4, h, w), t (B,). ends: conditioning of (c+, p) for each p, then of (c-, p) for each p: (2|P|, ...) of each part.
    """
    B, n = len(x_t), len(ends[0])
    eps = unet(x_t.repeat(n, 1, 1, 1), t.repeat(n), *(e.repeat_interleave(B, 0) for e in ends))
    eps_pos, eps_neg = eps.float().view(n, *x_t.shape).chunk(2)  # (|P|, B, 4, h, w) each; float32: a small difference of large numbers
    return (eps_pos - eps_neg).mean(0)


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
    ends=None,
    eta=0.0,
    skip: int = 0,
    stop: int | None = None,
    on_step=None,
):
    """Walk noise x_T (B, 4, h, w) down to latents x_0 (B, 4, h, w), all B with the same settings.

    cond, uncond: as in guided_eps, of B rows or of one for all. uncond may be a list with one for each of the steps, as
                null-text inversion makes it (invert.py).
    steps:      as in timesteps.
    sliders:    pairs (lora.Slider, scale), or triples with a start of its own; a scale is a number, or a tensor (B,): one
                for each picture. Sliders that are not attached are attached for as long as it takes.
    start:      delayed LoRA: scales are 0 while t > t_on = (1 - start) T, so that the frozen model lays out the
                picture first. 0.3 is the paper's code's start_noise = 700 (SDEdit's idea, Meng et al. 2022).
    ends, eta:  eq. (8) without a slider (guided_eps), from `start` on.
    skip, stop: begin after `skip` steps (x_T is the x_t there), end after `stop`: partial denoising.
    on_step:    called as on_step(i, t, x_t, eps_c) before each step; eps_c: the prediction for `cond`, without guidance.
    """
    T = len(alpha_bar)
    ts = timesteps(steps, T)
    x_t, cond = x_T, rows(cond, len(x_T))
    uncond_at = lambda i: uncond and rows(uncond[i] if isinstance(uncond, list) else uncond, len(x_T))
    with lora.hung(unet, [(*pair, start)[:3] for pair in sliders]) as switches:
        for i, t in list(enumerate(ts))[skip:stop]:
            for slider, scale, its_start in switches:
                if t <= (1 - its_start) * T:
                    guided = torch.is_tensor(scale) and uncond is not None and guidance != 1
                    slider.scale = torch.cat([scale, scale]) if guided else scale
            eq_8 = ends if t <= (1 - start) * T else None
            eps, eps_c = guided_eps(unet, x_t, t, cond, uncond_at(i), guidance, eq_8, eta)
            if on_step:
                on_step(i, t, x_t, eps_c)
            x_t = ddim_step(x_t, eps, t, ts[i + 1] if i + 1 < len(ts) else -1, alpha_bar)
    return x_t


def steps_before(start: float, steps, T: int = 1000) -> int:
    """How many of the DDIM steps lie before sliders with this start are switched on."""
    return sum(t > (1 - start) * T for t in timesteps(steps, T))


def sweep(unet, x_T, cond, uncond, columns, *, alpha_bar, steps=30, start: float = 0.3, batch: int = 16, skip: int = 0, ends=None, etas=None, **settings):
    """The same x_T (n, 4, h, w) in several settings: yields (column, x_0 (n, 4, h, w)) for each of `columns`, as they are done.

    columns: for each column a list of pairs (slider, scale) or triples (slider, scale, start); every column names the
    same sliders in the same order, at scales of its own. The steps before the first slider switches on are walked once
    for all columns. ends, etas: eq. (8) in place of a slider (guided_eps), at an eta for each column. batch: pictures
    denoised at once. cond, uncond: of one row (or n, for a single column). settings: the rest as in `sample`.
    """
    columns = [[(*entry, start)[:3] for entry in column] for column in columns]
    etas = etas or [0.0] * len(columns)
    starts = [s for column in columns for _, scale, s in column if scale] + [start] * any(etas)
    before = max(skip, steps_before(min(starts), steps, len(alpha_bar)) if starts and len(columns) > 1 else 0)
    walk = lambda x, **more: sample(unet, x, cond, uncond, alpha_bar=alpha_bar, steps=steps, start=start, **settings, **more)
    n = len(x_T)
    off = [(slider, 0.0) for slider, _, _ in columns[0]]  # named, so that one that was left at a scale is off here
    shared = walk(x_T, skip=skip, stop=before, sliders=off) if before > skip else x_T
    for some in grouped(columns, etas, max(1, batch // n)):
        each = lambda values: torch.tensor(values, device=x_T.device).repeat_interleave(n)  # one for each picture
        sliders = []
        for entries in zip(*(columns[c] for c in some)):  # one slider in these columns
            scales = [scale for _, scale, _ in entries]
            sliders.append((entries[0][0], scales[0] if len(set(scales)) == 1 else each(scales), entries[0][2]))
        eta = each([etas[c] for c in some])
        x_0 = walk(shared.repeat(len(some), 1, 1, 1), skip=before, sliders=sliders, ends=ends if eta.any() else None, eta=eta)
        yield from zip(some, x_0.chunk(len(some)))


def grouped(columns, etas, at_once: int) -> list[list[int]]:
    """Which columns go through the UNet together: those that change nothing by themselves, as they cost less and are to be
    the untouched model's bit for bit; of the others up to `at_once`."""
    changes = [bool(eta) or any(scale for _, scale, _ in column) for column, eta in zip(columns, etas)]
    plain, rest = ([c for c in range(len(columns)) if changes[c] == kind] for kind in (False, True))
    return [[c] for c in plain] + [rest[i : i + at_once] for i in range(0, len(rest), at_once)]


def noise(seeds, shape, device="cpu", dtype=torch.float32):
    """x_T for each seed: (len(seeds), *shape). Drawn on the CPU in float32, one generator a seed,
    so that a seed means the same noise on every machine, in every dtype and in every batch."""
    draw = lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
    return torch.stack([draw(s) for s in seeds]).to(device, dtype)
