"""What a slider does, drawn: a preview strip while it trains, and the probe of its useful range."""

import numpy as np
import torch
from tqdm import tqdm

import sampler
from support import images
from support.batches import samples_at_once
from support.sweep import sweep

SCALES = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)  # that a new slider is tried at
STEPS, LEVELS = 15, (100, 200, 300)
SURPRISE = 1.25  # so much harder to denoise, a picture begins to break down (on the miniature)
PREVIEW_SCALES, PREVIEW_SEEDS = [-2.0, 0.0, 2.0], [0, 1, 2, 3]


@torch.no_grad()
def probe(model, slider, cond, uncond, shape, seeds: int, steps: int = STEPS) -> dict:
    """Where the slider is useful: draws `seeds` pictures at the scales SCALES, looks at their
    latents.

    change:   how far a picture has gone at each scale from scale 0 (negative below): the root mean
              square distances of the latents from scale to scale, added up.
    surprise: how badly the frozen model denoises the picture, as a multiple of scale 0's:
              || eps_theta(x_t) - eps ||^2 at a few low t. It bounds the picture's likelihood
              (Ho et al. 2020), and rises where pictures break down, whatever the attribute.
    range:    the scales where surprise reaches SURPRISE, or where a unit of scale changes a tenth
              of what the first does.
    """
    x_T = sampler.noise(range(seeds), shape, model.device, model.dtype)
    eps = sampler.noise(range(seeds, 2 * seeds), shape, model.device, model.dtype)
    columns = [[(slider, scale)] for scale in SCALES]
    at_once = max(seeds, samples_at_once(model.unet, shape, seeds))
    ts = sampler.timesteps(steps, spacing=model.spacing)
    settings = dict(alpha_bar=model.alpha_bar, steps=ts, batch=at_once)
    drawn = sweep(model.unet, x_T, cond, uncond, columns, **settings)
    x_0, surprise = {}, {}
    for i, x in tqdm(drawn, total=len(SCALES), unit="scale", desc="probe"):
        x_0[i], surprise[i] = x.float(), 0.0
        for level in LEVELS:
            t = torch.full((seeds,), level, device=model.device)
            x_t = sampler.add_noise(x, eps, t, model.alpha_bar)
            error = model.unet(x_t, t, *sampler.expand(cond, seeds)).float() - eps.float()
            surprise[i] += error.square().mean().item()
    zero, n = SCALES.index(0.0), len(SCALES)
    surprise = [surprise[i] / surprise[zero] for i in range(n)]
    distance = lambda a, b: (b - a).square().mean((1, 2, 3)).sqrt().mean().item()
    change = np.cumsum([0.0] + [distance(x_0[i], x_0[i + 1]) for i in range(n - 1)])
    change = (change - change[zero]).tolist()
    side = lambda part: useful_end(SCALES[part], surprise[part], change[part])
    ends = [side(slice(zero, None, -1)), side(slice(zero, None))]
    return {"range": ends, "scales": list(SCALES), "change": change, "surprise": surprise}


def useful_end(scales, surprise, change) -> float:
    """How far from scales[0] = 0 one side is useful; the lists go outwards. Between two scales the
    surprise is taken to be a straight line."""
    first = abs(change[1]) / abs(scales[1])
    for i in range(1, len(scales)):
        if not surprise[i] < SURPRISE:  # NaN too
            finite = np.isfinite(surprise[i])
            rise = surprise[i] - surprise[i - 1]
            part = (SURPRISE - surprise[i - 1]) / rise if finite else 0.0
            return round(scales[i - 1] + part * (scales[i] - scales[i - 1]), 2)
        if abs(change[i] - change[i - 1]) / abs(scales[i] - scales[i - 1]) < first / 10:
            return scales[i - 1]
    return scales[-1]


def draw_scales(model, slider, cond, uncond, x_T, scales, steps=30, **settings) -> list[list]:
    """The noises x_T (n, 4, h, w) drawn with `slider` at each of `scales`: n pictures for each.
    cond, uncond: one row each. settings: support/sweep.py's."""
    columns = [[(slider, scale)] for scale in scales]
    settings |= dict(alpha_bar=model.alpha_bar)
    settings["steps"] = sampler.timesteps(steps, spacing=model.spacing)
    latents = dict(sweep(model.unet, x_T, cond, uncond, columns, **settings))
    return [model.decode(latents[i]) for i in range(len(columns))]


def preview(model, slider, cond, uncond, shape):
    """A sheet of a few seeds at a few scales. cond, uncond: one row each."""
    x_T = sampler.noise(PREVIEW_SEEDS, shape, model.device, model.dtype)
    drawn = draw_scales(model, slider, cond, uncond, x_T, PREVIEW_SCALES, batch=len(x_T))
    rows = [list(row) for row in zip(*drawn)]
    names = [images.scale_label(scale) for scale in PREVIEW_SCALES]
    return images.contact_sheet(rows, names, [str(seed) for seed in PREVIEW_SEEDS])
