"""What the trainers share around student.fit: their common options, previews, the slider file, the verdict."""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lora
import pictures
import sampler
import student
from sdxl import MINIATURE

PROBED = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)  # scales that a new slider is tried at
SURPRISE = 1.25  # a picture that is so much harder to denoise for the frozen model begins to break down: measured on the miniature
VERSION = "0.1"
PREVIEW_SCALES, PREVIEW_SEEDS = [-2.0, 0.0, 2.0], [0, 1, 2, 3]


def is_small(unet) -> bool:
    """Far below SDXL's size: the miniature, for which other defaults were measured."""
    return max(unet.config["block_out_channels"]) < 640


def recipe(unet) -> dict:
    """Defaults: for a small UNet what was measured to work on the miniature, for one of SDXL's size the published recipe."""
    return dict(lr=0.256 / max(unet.config["block_out_channels"])) | (dict(batch=4, steps=200) if is_small(unet) else dict(batch=1, steps=500))


def add_options(p):
    """The options of every trainer."""
    p.add_argument("--out", default="slider.safetensors", help="slider file to write (default: %(default)s)")
    p.add_argument("--layers", choices=lora.LAYERS, default="noxattn", help="which layers the slider changes (default: %(default)s)")
    p.add_argument("--no-conv", action="store_true", help="leave convolutions out")
    p.add_argument("--rank", type=int, default=4, help="default: %(default)s")
    p.add_argument("--alpha", type=float, default=1.0, help="the LoRA's constant alpha (default: %(default)s)")
    p.add_argument("--steps", type=int, help="optimiser steps (default: 200; for a UNet of SDXL's size 500)")
    p.add_argument("--batch", type=int, help="x_t in a step, each at every scale (default: 4; for a UNet of SDXL's size 1)")
    p.add_argument("--lr", type=float, help="learning rate (default: 2e-4; for narrower UNets more)")
    p.add_argument("--checkpointing", action="store_true", help="less memory, more time: compute parts of the UNet again on the way back")
    p.add_argument("--preview", type=int, default=0, metavar="STEPS",
                   help="draw a strip beside the slider file, its name with .png, every so many steps (default: never)")
    p.add_argument("--probe", type=int, default=4, metavar="SEEDS", help="pictures to find the useful range of scales with; 0: leave it out (default: %(default)s)")
    p.add_argument("--size", type=int, help="pixels (default: the model's own, at most 512)")
    p.add_argument("--seed", type=int, default=0)


def check_numbers(args, *above_0):
    for name in (*above_0, "rank", "alpha", "steps", "batch", "lr"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    for name in ("preview", "probe"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, not {getattr(args, name)}")


def start(args, model, recipe: dict) -> tuple[tuple[int, int], lora.Slider]:
    """Fill in the defaults of `recipe`; returns the size in pixels (height, width) and a new slider on the model's device."""
    args.size = args.size or min(model.size, 512)
    size = (args.size,) * 2
    model.latent_shape(size)  # refuses a size the model cannot make before any work is done
    for name, value in recipe.items():
        setattr(args, name, getattr(args, name) or value)
    model.unet.checkpointing(args.checkpointing)
    torch.manual_seed(args.seed)
    slider = lora.Slider(lora.target_layers(model.unet, args.layers, not args.no_conv), args.rank, args.alpha)
    return size, slider.to(model.device)


def finish(args, model, slider, train, held_out, difference: float, about: dict, cond, uncond, started: float,
           enough=(0.25, 0.5)):
    """Fit the slider to what the teacher collected, write its file, and say in plain words what came out.

    difference, enough: as in student.verdict. about: what else the file's metadata says. cond, uncond: what previews show, by their first rows.
    """
    slider.attach(model.unet)
    path, cond, uncond = Path(args.out), tuple(c[:1] for c in cond), tuple(c[:1] for c in uncond)

    def preview(step):
        if args.preview and (step % args.preview == 0 or step == args.steps):
            pictures.save(strip(model, slider, cond, uncond, train.x_t.shape[2:]), path.with_suffix(".png"))

    reading = student.fit(model.unet, slider, train, held_out, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed,
                          meter_every=args.preview or 25, on_meter=preview)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "like") and not (k == "model" and v == str(MINIATURE))}
    about = about | {"settings": settings, "meter": reading, "difference": difference, "version": VERSION}
    lora.save(path, slider, about | {"seconds": round(time.time() - started, 1)})  # what comes now may take a while
    print(*student.verdict(reading, difference, enough), sep="\n")
    if args.probe:
        found = probe(model, slider, cond, uncond, train.x_t.shape[2:], args.probe)
        lora.save(path, slider, about | {"probe": found, "seconds": round(time.time() - started, 1)})
        print(f"Useful from scale {found['range'][0]:+.1f} to {found['range'][1]:+.1f}: beyond, pictures break down or stay as they are.")
    print(f"{path}: written, {path.stat().st_size / 1e6:.2f} MB, after {time.time() - started:.0f} s")
    if args.preview:
        print(f"{path.with_suffix('.png')}: rows are seeds, columns scales")


@torch.no_grad()
def probe(model, slider, cond, uncond, shape, seeds: int, steps: int = 20) -> dict:
    """Where the slider is useful: draws `seeds` pictures at the scales PROBED and looks at their latents.

    change:   the way a picture has gone at each scale, starting from scale 0 (negative below): the root mean square
              distances of the latents from scale to scale, added up.
    surprise: how badly the frozen model denoises the picture, as a multiple of scale 0's: || eps_theta(x_t) - eps ||^2 at
              a few low t, the same noise for all scales. It is a bound on the picture's likelihood (Ho et al. 2020), and
              it rises where pictures break down, whatever the attribute.
    range:    the scales where surprise reaches SURPRISE, or where a unit of scale changes a tenth of what the first does.
    """
    x_T = sampler.noise(range(seeds), shape, model.device, model.dtype)
    eps = sampler.noise(range(seeds, 2 * seeds), shape, model.device, model.dtype)
    columns = sampler.sweep(model.unet, x_T, cond, uncond, [[(slider, s)] for s in PROBED], alpha_bar=model.alpha_bar, steps=steps, batch=seeds)
    x_0, surprise = {}, {}
    for i, x in tqdm(columns, total=len(PROBED), unit="scale", desc="probe"):
        x_0[i], surprise[i] = x.float(), 0.0
        for t in (100, 200, 300):
            t = torch.full((seeds,), t, device=model.device)
            found = model.unet(sampler.add_noise(x, eps, t, model.alpha_bar), t, *sampler.rows(cond, seeds))
            surprise[i] += (found.float() - eps.float()).square().mean().item()
    zero = PROBED.index(0.0)
    surprise = [surprise[i] / surprise[zero] for i in range(len(PROBED))]
    moves = [(x_0[i + 1] - x_0[i]).square().mean((1, 2, 3)).sqrt().mean().item() for i in range(len(PROBED) - 1)]
    change = np.cumsum([0.0] + moves)
    change = (change - change[zero]).tolist()
    low, high = useful_end(PROBED[zero::-1], surprise[zero::-1], change[zero::-1]), useful_end(PROBED[zero:], surprise[zero:], change[zero:])
    return {"range": [low, high], "scales": list(PROBED), "change": change, "surprise": surprise}


def useful_end(scales, surprise, change) -> float:
    """How far from scales[0] = 0 one side is useful; the three lists go outwards. Between two scales on a straight line."""
    first = abs(change[1]) / abs(scales[1])
    for i in range(1, len(scales)):
        if not surprise[i] < SURPRISE:  # NaN too
            part = (SURPRISE - surprise[i - 1]) / (surprise[i] - surprise[i - 1]) if np.isfinite(surprise[i]) else 0.0
            return round(scales[i - 1] + part * (scales[i] - scales[i - 1]), 2)
        if abs(change[i] - change[i - 1]) / abs(scales[i] - scales[i - 1]) < first / 10:
            return scales[i - 1]
    return scales[-1]


def strip(model, slider, cond, uncond, shape):
    """A sheet of a few seeds at a few scales. cond, uncond: one row; no text encoder is needed."""
    x_T = sampler.noise(PREVIEW_SEEDS, shape, model.device, model.dtype)
    columns = dict(sampler.sweep(model.unet, x_T, cond, uncond, [[(slider, s)] for s in PREVIEW_SCALES], alpha_bar=model.alpha_bar, batch=len(x_T)))
    drawn = [model.pictures(columns[i]) for i in range(len(PREVIEW_SCALES))]
    return pictures.sheet([list(row) for row in zip(*drawn)], [pictures.label(s) for s in PREVIEW_SCALES], [str(s) for s in PREVIEW_SEEDS])
