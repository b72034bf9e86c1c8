"""What the trainers share around student.fit: their common options, previews, the slider file, the verdict."""

import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
import lora
import parallel
import pictures
import sampler
import student
from sdxl import MINIATURE
from sdxl_unet import checkpointing

PROBED = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)  # scales that a new slider is tried at
SURPRISE = 1.25  # a picture that is so much harder to denoise for the frozen model begins to break down: measured on the miniature
VERSION = "0.1"
PROBE_STEPS, PROBE_T = 20, (100, 200, 300)
METER_EVERY = 25
PREVIEW_SCALES, PREVIEW_SEEDS = [-2.0, 0.0, 2.0], [0, 1, 2, 3]


def is_small(unet) -> bool:
    """Far below SDXL's size: the miniature, for which other defaults were measured."""
    return max(unet.config["block_out_channels"]) < 640


SMALL, LARGE = dict(lr=4e-3, batch=8, steps=60), dict(lr=2e-4, batch=2, steps=500)


def recipe(unet, small=SMALL, large=LARGE) -> dict:
    """Defaults: for a small UNet what was measured to work on the miniature, for one of SDXL's size the published recipe's."""
    return dict(small if is_small(unet) else large)


def add_options(p, small=SMALL, large=LARGE, out="slider.safetensors", what="slider file to write"):
    """The options of every trainer. small, large: what `recipe` is given."""

    def option(name, what, fixed=None, **more):
        """With a default of its own, or one that small and large hold."""
        default = f"{small[name]}; for a UNet of SDXL's size {large[name]}" if name in small else fixed
        p.add_argument(f"--{name}", default=None if name in small else fixed, help=f"{what} (default: {default})", **more)

    p.add_argument("--out", default=out, help=f"{what} (default: %(default)s)")
    option("layers", "which layers the slider changes", "noxattn", choices=lora.LAYERS)
    p.add_argument("--no-conv", action="store_true", help="leave convolutions out")
    option("rank", "of each slider", 4, type=int)
    option("alpha", "the LoRA's constant alpha", 1.0, type=cli.number)
    option("steps", "optimiser steps", type=int)
    option("batch", "samples in a step, of all processes together", type=int)
    option("lr", "learning rate", type=cli.number)
    p.add_argument("--checkpointing", action="store_true", help="less memory, more time: compute parts of the UNet again on the way back")
    p.add_argument("--resume", action="store_true", help="go on with a training of the same command that was stopped")
    p.add_argument("--overwrite", action="store_true", help="replace --out, or what is left of an unfinished training")
    p.add_argument("--size", type=int, help="pixels (default: the model's own, at most 512)")
    p.add_argument("--seed", type=cli.seed, default=0)


def add_watching(p):
    """The options of text and pair trainers to look at a training before, while and after it runs."""
    p.add_argument(
        "--preview", type=int, default=0, metavar="STEPS", help="draw a strip beside the slider file, its name with .png, every so many steps (default: never)"
    )
    p.add_argument(
        "--probe", type=int, default=4, metavar="SEEDS", help="pictures to find the useful range of scales with; 0: leave it out (default: %(default)s)"
    )
    p.add_argument("--dry-run", action="store_true", help="train nothing: say how many network evaluations, how long and how much memory it would take")


def check_numbers(args, *above_0):
    for name in (*above_0, "rank", "alpha", "steps", "batch", "lr"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if args.batch is not None and args.batch < parallel.processes():
        raise ValueError(f"--batch must be at least {parallel.processes()}, one sample for each process")
    for name in ("preview", "probe"):
        if getattr(args, name, 0) < 0:
            raise ValueError(f"--{name} must be 0 or more, not {getattr(args, name)}")


def cost(args, teacher: int, held_out: int) -> dict[str, tuple[int, int]]:
    """The cost model: UNet evaluations, one a sample, of each part of a training: {part: (without, with gradients)}.

    teacher: what the teacher takes for all its x_t; held_out: samples that the meter reads each time.
    """

    def drawn(seeds, columns, steps):  # a sweep with guidance: what is before the start once for all columns
        before = sampler.steps_before(0.3, steps)
        return 2 * seeds * (before + columns * (steps - before))

    every = args.preview or METER_EVERY
    plan = {"teacher": (teacher, 0), "training": (0, args.steps * args.batch), "meter": (-(-args.steps // every) * held_out, 0)}
    if args.preview:
        plan["previews"] = (-(-args.steps // args.preview) * drawn(len(PREVIEW_SEEDS), len(PREVIEW_SCALES), 30), 0)
    if args.probe:
        plan["probe"] = (drawn(args.probe, len(PROBED), PROBE_STEPS) + args.probe * len(PROBED) * len(PROBE_T), 0)
    print("what it takes, in samples through the UNet: " + ", ".join(f"{part} {sum(n):,}" + " with gradients" * bool(n[1]) for part, n in plan.items()))
    return plan


def dry_run(args, model, slider, cond, plan: dict):
    """Time a few evaluations without gradients and a few optimiser steps, and say what `plan` (from `cost`) will take."""
    slider.attach(model.unet)
    n = 4 * args.batch
    x_t, t, cond = (
        sampler.noise(range(n), model.latent_shape((args.size,) * 2), model.device, model.dtype),
        torch.full((n,), 500, device=model.device),
        [c[:1] for c in cond],
    )

    def seconds(samples, scale, gradients):
        """Of one sample, median of three after a warm-up."""
        taken = []
        for _ in range(4):
            started = time.time()
            with torch.set_grad_enabled(gradients), slider.at(scale):
                loss = model.unet(x_t[:samples], t[:samples], *sampler.rows(cond, samples)).float().square().mean()
                if gradients:
                    loss.backward()
            loss.item()  # on a GPU: waits until it is done
            taken.append((time.time() - started) / samples)
        return statistics.median(taken[1:])

    each = seconds(n, 0.0, False), seconds(args.batch, 1.0, True)
    slider.detach()
    took = {part: (a * each[0] + b * each[1]) / parallel.processes() for part, (a, b) in plan.items()}
    print(f"{'':10}{'without':>10}{'with gradients':>16}{'seconds':>10}")
    for part, counts in plan.items():
        print(f"{part:10}{counts[0]:10,}{counts[1]:16,}{took[part]:10.0f}")
    print(f"{'together':10}{sum(n[0] for n in plan.values()):10,}{sum(n[1] for n in plan.values()):16,}{sum(took.values()):10.0f}")
    print(
        f"One sample takes {each[0]:.3g} s without, {each[1]:.3g} s with gradients; peak memory so far {peak_memory(model.device) / 2**30:.1f} GiB. Nothing was trained."
    )


def peak_memory(device="cpu") -> int:
    """Bytes: of the GPU's memory, or of this process's (nan where the system does not say). Not getrusage's, which starts
    at the parent process's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) if status.exists() else float("nan")


def start(args, model, recipe: dict) -> tuple[int, int]:
    """Fill in the defaults of `recipe`; returns the size in pixels (height, width)."""
    args.size = args.size or min(model.size, 512)
    size = (args.size,) * 2
    model.latent_shape(size)  # refuses a size the model cannot make before any work is done
    for name, value in recipe.items():
        setattr(args, name, getattr(args, name) or (max(value, parallel.processes()) if name == "batch" else value))
    checkpointing(model.unet, args.checkpointing)
    return size


def new_slider(args, model) -> lora.Slider:
    """On the model's device, of the layers, rank and alpha that the command line names."""
    torch.manual_seed(args.seed)
    return lora.Slider(lora.target_layers(model.unet, args.layers, not args.no_conv), args.rank, args.alpha).to(model.device)


def settings(args) -> dict:
    """What a slider file says it was trained with."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "like", "dry_run", "resume", "overwrite") and not (k == "model" and v == str(MINIATURE))}


def finish(args, model, slider, train, held_out, difference: float, about: dict, cond, uncond, started: float, kept, enough=(0.25, 0.5)):
    """Fit the slider to what the teacher collected, write its file, and say in plain words what came out.

    kept: unfinished.begin's; it is removed in the end. difference, enough: as in student.verdict. about: what else the file's metadata says. cond, uncond: what previews show, by their first rows.
    """
    slider.attach(model.unet)
    path, cond, uncond = Path(args.out), tuple(c[:1] for c in cond), tuple(c[:1] for c in uncond)

    def preview(step):
        if parallel.is_first() and args.preview and (step % args.preview == 0 or step == args.steps):
            pictures.save(strip(model, slider, cond, uncond, train.x_t.shape[1:]), path.with_suffix(".png"))

    reading = student.fit(
        model.unet,
        slider,
        train,
        held_out,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        meter_every=args.preview or METER_EVERY,
        on_meter=preview,
        kept=kept,
    )
    if not parallel.is_first():
        return
    about = about | {"settings": settings(args), "meter": reading, "difference": difference, "version": VERSION}
    lora.save(path, slider, about | {"seconds": round(time.time() - started, 1)})  # what comes now may take a while
    lines = student.verdict(reading, difference, enough, model.guessed)
    print(*lines, sep="\n")
    if args.probe:
        found = probe(model, slider, cond, uncond, train.x_t.shape[1:], args.probe)
        lora.save(path, slider, about | {"probe": found, "seconds": round(time.time() - started, 1)})
        ends = [f"{end:+.1f}" + " (tried no further)" * (end in (PROBED[0], PROBED[-1])) for end in found["range"]]
        if not any(line.startswith("WARNING") for line in lines):
            print(f"Useful at most from scale {ends[0]} to {ends[1]}: beyond, pictures break down or stay as they are.")
    kept.remove()
    print(f"{path}: written, {path.stat().st_size / 1e6:.2f} MB, after {time.time() - started:.0f} s")
    prompt = about.get("prompts", [args.prompt])[0] or "..."  # pairs may be of anything; slider.py wants words
    print(f'To look at it: python slider.py --prompt "{prompt}" --slider {path} --scales -3,-2,-1,0,1,2,3 --out out/{path.stem}{cli.model_words(args)}')
    if args.preview:
        print(f"{path.with_suffix('.png')}: rows are seeds, columns scales")


@torch.no_grad()
def probe(model, slider, cond, uncond, shape, seeds: int, steps: int = PROBE_STEPS) -> dict:
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
        for t in PROBE_T:
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
