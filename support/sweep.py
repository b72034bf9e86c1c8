"""The same noise in several settings, for less than one run each: what strips, previews, the probe
of the useful range and calibration draw with."""

from contextlib import contextmanager

import torch

import sampler
from support.merge import Composed


def sweep(
    unet,
    x_T,
    cond,
    uncond,
    columns,
    *,
    alpha_bar,
    steps=30,
    start: float = 0.3,
    batch: int = 16,
    skip: int = 0,
    delta=None,
    etas=None,
    **settings,
):
    """Denoise x_T (n, 4, h, w) once for each column: yields (column, x_0 (n, 4, h, w)), as they
    are done.

    columns: for each a list of pairs (slider, scale) or triples (slider, scale, start). All
    columns name the same sliders in the same order, each with one start; ValueError otherwise. The
    steps before the first of them switches on are walked once for all columns. batch: pictures
    denoised at once. cond, uncond: of one row (or n, for one column). delta, etas: as in
    sampler.sample, times an eta for each column. settings: the rest of sample's."""
    n, T = len(x_T), len(alpha_bar)
    columns = [[(*entry, start)[:3] for entry in column] for column in columns]
    sliders_of = lambda column: [slider for slider, _, _ in column]
    if any(sliders_of(column) != sliders_of(columns[0]) for column in columns):
        raise ValueError("columns name different sliders: one that is off in a column has scale 0")
    if any(len({s for _, scale, s in entries if scale}) > 1 for entries in zip(*columns)):
        raise ValueError("a slider has one start in all columns")
    # Where it is on: what stands beside a scale of 0 says nothing.
    start_of = [next((s for _, scale, s in entries if scale), start) for entries in zip(*columns)]
    etas = etas or [0.0] * len(columns)
    starts = [s for column in columns for _, scale, s in column if scale] + [start] * any(etas)
    if starts and len(columns) > 1:
        shared_steps = max(skip, sampler.steps_before(min(starts), steps, T))
    else:
        shared_steps = skip

    def walk(x, sliders, **more):
        with composed(unet, sliders) as switches:
            more = dict(alpha_bar=alpha_bar, steps=steps, start=start, sliders=switches) | more
            return sampler.sample(unet, x, cond, uncond, **settings, **more)

    off = [(slider, 0.0, start) for slider, _, _ in columns[0]]  # one left at a scale is off here
    shared = walk(x_T, off, skip=skip, stop=shared_steps) if shared_steps > skip else x_T
    for group in group_columns(columns, etas, max(1, batch // n)):
        per_picture = lambda values: torch.tensor(values, device=x_T.device).repeat_interleave(n)
        sliders = []
        for entries, its_start in zip(zip(*(columns[c] for c in group)), start_of):  # of a slider
            scales = [scale for _, scale, _ in entries]
            scale = scales[0] if len(set(scales)) == 1 else per_picture(scales)
            sliders.append((entries[0][0], scale, its_start))
        more = {}
        if any(etas[c] for c in group):
            eta = per_picture([etas[c] for c in group]).view(-1, 1, 1, 1)
            more["delta"] = lambda x_t, t: eta * delta(x_t, t)
        x_0 = walk(shared.repeat(len(group), 1, 1, 1), sliders, skip=shared_steps, **more)
        yield from zip(group, x_0.chunk(len(group)))


def group_columns(columns, etas, at_once: int) -> list[list[int]]:
    """Which columns go through the UNet together. Those that change nothing stay alone: they cost
    less, and are the untouched model's pictures bit for bit. Of the others, up to `at_once`."""
    changes = [
        bool(eta) or any(scale for _, scale, _ in column) for column, eta in zip(columns, etas)
    ]
    plain, rest = ([c for c in range(len(columns)) if changes[c] == kind] for kind in (False, True))
    return [[c] for c in plain] + [rest[i : i + at_once] for i in range(0, len(rest), at_once)]


@contextmanager
def composed(unet, sliders):
    """with composed(unet, sliders) as switches: sampler.sample(..., sliders=switches)

    sliders: triples (slider, scale, start). Inside they are attached to `unet` at scale 0, those
    with a number as scale and the same start as one merge.Composed. Yields triples (slider, scale,
    start). ValueError if one slider is given twice."""
    if len({id(slider) for slider, _, _ in sliders}) < len(sliders):
        raise ValueError("the same slider is given twice: load its file once for each")
    switches, by_start = [], {}
    for slider, scale, start in sliders:
        slider.scale = 0.0
        if torch.is_tensor(scale):
            switches.append((slider, scale, start))
        elif scale:
            by_start.setdefault(start, []).append((slider, scale))
    several = sum(len(pairs) > 1 for pairs in by_start.values()) > 1
    to_detach = []
    try:
        for start, pairs in by_start.items():
            if len(pairs) > 1:
                to_detach.append(Composed(unet, pairs, only_low_rank=several))
                pairs = [(to_detach[-1], 1.0)]
            switches.append((*pairs[0], start))
        to_detach += [slider.attach(unet) for slider, _, _ in switches if not slider.attached]
        yield switches
    finally:
        for slider, _, _ in switches:
            slider.scale = 0.0
        for slider in to_detach:
            slider.detach()
