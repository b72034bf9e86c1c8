"""What the trainers share around student.fit: their common options, previews, the slider file, the verdict."""

import time
from pathlib import Path

import torch

import cli
import lora
import pictures
import sampler
import student

NUMBERS = ("rank", "alpha", "steps", "batch", "lr")  # options that must be above 0
PREVIEW_SCALES, PREVIEW_SEEDS = [-2.0, 0.0, 2.0], [0, 1, 2, 3]


def add_options(p, steps: str, batch: str, lr: str):
    """The options of every trainer. steps, batch, lr: their defaults in words."""
    p.add_argument("--out", default="slider.safetensors", help="slider file to write (default: %(default)s)")
    p.add_argument("--layers", choices=lora.LAYERS, default="noxattn", help="which layers the slider changes (default: %(default)s)")
    p.add_argument("--no-conv", action="store_true", help="leave convolutions out")
    p.add_argument("--rank", type=int, default=4, help="default: %(default)s")
    p.add_argument("--alpha", type=float, default=1.0, help="the LoRA's constant alpha (default: %(default)s)")
    p.add_argument("--steps", type=int, help=f"optimiser steps (default: {steps})")
    p.add_argument("--batch", type=int, help=f"x_t in a step, each at every scale (default: {batch})")
    p.add_argument("--lr", type=float, help=f"learning rate (default: {lr}; for narrower UNets more)")
    p.add_argument("--checkpointing", action="store_true", help="less memory, more time: compute parts of the UNet again on the way back")
    p.add_argument("--preview", type=int, default=0, metavar="STEPS",
                   help="draw a strip beside the slider file, its name with .png, every so many steps (default: never)")
    p.add_argument("--size", type=int, help="pixels (default: the model's own, at most 512)")
    p.add_argument("--seed", type=int, default=0)


def check_above_0(args, *names):
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if args.preview < 0:
        raise ValueError(f"--preview must be 0 or more, not {args.preview}")


def start(args, model, recipe: dict) -> tuple[tuple[int, int], lora.Slider]:
    """Fill in the defaults of `recipe`; returns the size in pixels (height, width) and a new slider on the model's device."""
    size = (args.size or min(model.size, 512),) * 2
    model.latent_shape(size)  # refuses a size the model cannot make before any work is done
    for name, value in recipe.items():
        setattr(args, name, getattr(args, name) or value)
    model.unet.checkpointing(args.checkpointing)
    torch.manual_seed(args.seed)
    slider = lora.Slider(lora.target_layers(model.unet, args.layers, not args.no_conv), args.rank, args.alpha)
    return size, slider.to(model.device)


def finish(args, model, slider, train, held_out, difference: float, about: dict, cond, uncond, started: float):
    """Fit the slider to what the teacher collected, write its file, and say in plain words what came out.

    difference: as in student.verdict. about: what else the file's metadata says. cond, uncond: what previews show.
    """
    slider.attach(model.unet)
    path = Path(args.out)

    def preview(step):
        if args.preview and (step % args.preview == 0 or step == args.steps):
            pictures.save(strip(model, slider, cond, uncond, train.x_t.shape[2:]), path.with_suffix(".png"))

    reading = student.fit(model.unet, slider, train, held_out, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed,
                          meter_every=args.preview or 25, on_meter=preview)
    lora.save(path, slider, about | {"meter": reading, "difference": difference, "model": model.name,
                                     "seconds": round(time.time() - started, 1)})
    print(*student.verdict(reading, difference), sep="\n")
    print(f"{path}: written, {path.stat().st_size / 1e6:.2f} MB, after {time.time() - started:.0f} s")
    if args.preview:
        print(f"{path.with_suffix('.png')}: rows are seeds, columns scales")


def strip(model, slider, cond, uncond, shape):
    """A sheet of a few seeds at a few scales. cond, uncond: their first rows are taken; no text encoder is needed."""
    n, columns = len(PREVIEW_SEEDS), []
    repeat = lambda c: tuple(part[:1].expand(n, *part.shape[1:]) for part in c)
    for scale in PREVIEW_SCALES:
        x_T = sampler.noise(PREVIEW_SEEDS, shape, model.device, model.dtype)
        columns.append(model.pictures(sampler.sample(model.unet, x_T, repeat(cond), repeat(uncond), alpha_bar=model.alpha_bar,
                                                     sliders=[(slider, scale)])))
    return pictures.sheet([list(row) for row in zip(*columns)], [f"{s:+g}" for s in PREVIEW_SCALES], [str(s) for s in PREVIEW_SEEDS])
