"""Apply sliders:

    python slider.py --prompt "a photo of a person" --slider age.safetensors --seeds 0-3

Writes a labelled strip (rows are seeds, columns are scales), the same as a GIF, and every picture
as a file of its own. `--slider FILE` may be repeated; FILE:1.5 keeps that one at 1.5 while the
others sweep over the scales, FILE:1.5@0.5 also switches it on after half of the denoising. Two
sliders that sweep, with --grid, make a grid for each seed.

FILE may be a folder: all sliders in it, as train_space.py writes them. --each gives every slider a
row of its own, --random 5 draws each seed five times with all sliders at random scales.

    python slider.py --image photo.jpg --prompt "a photo of a person" --slider age.safetensors

edits a real picture. It is inverted first (invert.py); the inversion is kept in the output folder
for the next time. With --strength 0.6 it is instead noised to 60% of the way and drawn again from
there (SDEdit), once for each seed.

From Python:

    model = SDXL.load()
    age = lora.load("age.safetensors", model.unet)
    pictures = slider.generate(model, "a photo of a person", seeds=[0, 1], sliders=[(age, 2.0)])
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import invert
import lora
import sampler
from formats import slider_files
from support import cli, distributed, images, inversions, options, sheets, sizes, training
from support.infotext import Infotext
from support.sweep import sweep as sweep_latents
from train_text import encode, ends_difference


def generate(model, prompt: str, seeds, sliders=(), **settings) -> list[Image.Image]:
    """One picture for each seed. sliders: pairs (slider, scale) or triples (slider, scale, start).
    settings: as in `sweep`."""
    return sweep(model, prompt, seeds, [sliders], **settings)[0]


def sweep(
    model,
    prompt: str,
    seeds,
    columns,
    *,
    negative: str = "",
    size: tuple[int, int] | None = None,
    batch: int = 16,
    start_from=None,
    uncond=None,
    steps=30,
    **settings,
) -> list[list[Image.Image]]:
    """The same seeds in several settings: for each of `columns` a list of pictures, one for each
    seed.

    columns, settings: support/sweep.py's. size: (height, width) in pixels. batch: pictures
    denoised at once. start_from: function of a few seeds, the latents to begin with in the place
    of their noise. uncond: in the place of the conditioning of `negative`."""
    cond, uncond = model.condition([prompt], size), uncond or model.condition([negative], size)
    shape = model.latent_shape(size)
    noise = lambda seeds: sampler.noise(seeds, shape, model.device, model.dtype)
    steps = sampler.timesteps(steps, spacing=model.spacing)
    settings |= dict(alpha_bar=model.alpha_bar, batch=batch, steps=steps)
    mine, drawn = distributed.shard(seeds), [[] for _ in columns]
    for i in range(0, len(mine), batch):
        x_T = (start_from or noise)(mine[i : i + batch])
        for c, x_0 in sweep_latents(model.unet, x_T, cond, uncond, columns, **settings):
            drawn[c] += model.decode(x_0)
    return [distributed.all_gather(column, len(seeds)) for column in drawn]


# ---------------------------------------------------------------------------------- real pictures


def open_picture(model, path, size: str | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture in the file `path` as the model can take it, and its size (height, width): `size`
    (as --size has it), or the one nearest to its proportions that SDXL was trained on. A small
    model knows squares only. What sticks out is cut off; nothing is distorted."""
    picture, square = images.read_image(path), training.is_small(model.unet)
    if not size:
        size = sizes.for_pictures(model, [picture.width / picture.height], model.size, square)
    h, w = sizes.height_width(size)
    if picture.size != (w, h):
        why = ", its middle square" if h == w else ""
        print(f"{path}: {picture.width}x{picture.height}, brought to {w}x{h}{why}")
    return images.crop_and_resize(picture, h, w), (h, w)


def sdedit(model, latents, strength: float, steps) -> dict:
    """SDEdit (Meng et al. 2022): the settings of `sweep` that draw pictures again which are noised
    to `strength`, 0 to 1, of the way. latents: function of a few seeds, their pictures' latents
    (b, 4, h, w), or (1, 4, h, w) of one for all."""
    ts = sampler.timesteps(steps, spacing=model.spacing)
    skip = len(ts) - max(1, round(strength * len(ts)))

    def noised(seeds):
        x_0, t = latents(seeds), torch.full((len(seeds),), ts[skip], device=model.device)
        eps = sampler.noise(seeds, x_0.shape[1:], model.device, model.dtype)
        return sampler.add_noise(x_0, eps, t, model.alpha_bar)

    return dict(start_from=noised, skip=skip)


def edit_settings(model, args, picture, size) -> dict:
    """The settings of `sweep` that draw `picture` again, to edit it: SDEdit's, or its inversion."""
    z = model.encode([picture])
    if args.strength:
        return sdedit(model, lambda seeds: z, args.strength, args.steps)
    about = dict(method=args.invert, steps=args.steps, guidance=args.guidance)
    key = inversions.cache_key(model, z, args.prompt, args.negative, about)
    path = Path(args.out) / f"inversion-{key}.safetensors"

    def make(remember):
        ts = sampler.timesteps(args.steps, spacing=model.spacing)
        n = invert.max_evaluations(args.invert, len(ts))
        at_most = "at most " if args.invert == "null-text" else ""
        print(f"{args.invert} inversion: {at_most}{n} network evaluations")
        settings = about | dict(alpha_bar=model.alpha_bar, steps=ts, remember=remember)
        prompts = (model.condition([words], size) for words in (args.prompt, args.negative))
        made = invert.invert(model.unet, z, *prompts, **settings)
        print(f"{made.evaluations} network evaluations; kept in {path} for the next time")
        return made

    found = inversions.cached(path, make)
    where = (model.device, model.dtype)
    uncond = [tuple(part.to(*where) for part in parts) for parts in found.uncond]
    return dict(start_from=lambda seeds: found.x_T.to(model.device), uncond=uncond)


# ----------------------------------------------------------------------------------------- scales


def useful_scales(sliders) -> list[float]:
    """Seven scales, 0 in the middle, over the range in which all `sliders` are useful, as their
    files say (support/probe.py); -3 to 3 where they do not."""
    ranges = [r for s in sliders if (r := slider_files.useful_range(s.metadata))]
    low, high = max([r[0] for r in ranges], default=-3.0), min([r[1] for r in ranges], default=3.0)
    return [round(float(s), 2) for s in (*np.linspace(low, 0, 4), *np.linspace(0, high, 4)[1:])]


def even_scales(draw, low: float, high: float, count: int = 7) -> list[float]:
    """`count` scales from low to high, at which each picture looks as far from the next. 0 is one
    of them if it lies between.

    draw: scales -> columns of pictures. Draws a finer sweep, adds up the mean absolute differences
    of the pixels from scale to scale, and divides them into even steps: on either side of 0 as
    many as it has of the whole."""
    zero = min(max(0.0, low), high)
    fine = sorted({float(s) for s in (*np.linspace(low, high, 2 * count - 1), zero)})
    pixels = [np.stack([np.asarray(p, dtype=np.float32) for p in c]) for c in draw(fine)]
    distance = np.cumsum([0.0] + [np.abs(b - a).mean() for a, b in zip(pixels, pixels[1:])])
    middle, end = distance[fine.index(zero)], distance[-1]
    left = round((count - 1) * middle / max(end, 1e-9))  # steps below 0, in proportion
    left = min(max(left, int(low < 0)), count - 1 - int(high > 0))  # one on either side at least
    at = [*np.linspace(0, middle, left + 1), *np.linspace(middle, end, count - left)[1:]]
    return [round(float(s), 2) for s in np.interp(at, distance, fine)]


# ----------------------------------------------------------------------------------- command line


def main(captions=None):
    """captions: as in sheets.write_page, what --html says of each picture."""
    args = options.slider(__doc__)
    out = Path(args.out)
    model = cli.load_model(args)
    model.vae.tile = args.vae_tile // model.factor
    training.set_checkpointing(model.unet, args.checkpointing)
    size, picture = sizes.height_width(args.size) if args.size else None, None
    rows = [f"seed{s}" for s in args.seeds]
    if args.image:
        picture, size = open_picture(model, args.image, args.size)
        if args.strength is None:  # an inversion is one noise, not many
            args.seeds, rows = args.seeds[:1], [Path(args.image).stem]
    model.latent_shape(size)  # ValueError for what cannot be, before anything is drawn
    sampler.timesteps(args.steps)
    sliders, named = [], {}  # triples (slider, its fixed scale or None: it sweeps, its start)
    for given, fixed, start in args.slider:
        for path in slider_files.list_files(given):
            slider = lora.load(path, model.unet)
            sliders.append((slider, fixed, args.start if start is None else start))
            named[slider] = Path(path).stem
    infotext = Infotext(args, size or (model.size, model.size), named)
    settings = {k: getattr(args, k) for k in ("steps", "guidance", "start", "negative")}
    settings |= dict(size=size, batch=args.batch or (16 if training.is_small(model.unet) else 4))
    if args.image:
        settings |= edit_settings(model, args, picture, size)
    sweeping = [s for s, fixed, _ in sliders if fixed is None]
    scales = args.scales or (useful_scales(sweeping) if sweeping or args.guide else [0.0])
    if args.guide:
        eta = args.eta or training.text_recipe(model.unet)["eta"]
        preserve = options.combinations(args.preserve)
        _, ends, _ = encode(model, [args.prompt], *args.guide, preserve, size)
        settings["delta"] = lambda x_t, t: ends_difference(model.unet, x_t, t, ends)
        print(f"{2 + len(ends[0])} network evaluations a step and picture; a slider needs 2")

    def column(values):
        """All sliders: those that sweep at `values`, one each, the others at their fixed scales."""
        values = iter(values)
        return [(s, next(values) if fixed is None else fixed, start) for s, fixed, start in sliders]

    def draw(columns, **more):
        infotext.columns, infotext.etas = columns, more.get("etas")
        return sweep(model, args.prompt, args.seeds, columns, **settings, **more)

    def draw_scales(scales):
        etas = dict(etas=[scale * eta for scale in scales]) if args.guide else {}
        return draw([column([scale] * len(sweeping)) for scale in scales], **etas)

    names = [images.scale_label(scale) for scale in scales]
    if args.each:
        drawn = []  # for each slider what the others have once
        for s, fixed, start in sliders:
            drawn.append(draw([[(s, x if fixed is None else fixed, start)] for x in scales]))
    elif args.random:
        rng, shape = np.random.default_rng(args.seeds[0]), (args.random, len(sweeping))
        at_random = rng.uniform(min(scales), max(scales), shape).round(2).tolist()
        drawn = draw([column(values) for values in at_random])
        names = [f"random{i + 1}" for i in range(args.random)]
    elif args.grid:
        drawn = draw([column([across, down]) for down in scales for across in scales])
    else:
        if args.even:
            scales = even_scales(draw_scales, min(scales), max(scales))
            names = [images.scale_label(scale) for scale in scales]
        drawn = draw_scales(scales)
        names = names if sweeping or args.guide else [""]
    if not distributed.is_main_process():
        return
    if args.html:
        titles = [named[s] for s in sweeping] or ["eq. (8)"]
        titles = titles if args.grid else [", ".join(titles)]
        sheets.write_page(args.html, args.prompt, titles, rows, scales, drawn, captions)
    if args.each:
        sheets.write_each(out, infotext, rows, drawn, scales)
    elif args.grid:
        sheets.write_grids(out, infotext, rows, drawn, names)
    else:
        sheets.write_strip(out, infotext, rows, drawn, names, picture)


if __name__ == "__main__":
    cli.run(main)
