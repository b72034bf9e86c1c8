"""The cost model: what a training takes in network evaluations, and --dry-run, which times them."""

import re
import statistics
import time
from pathlib import Path

import torch

import sampler
from support import distributed, graphs, probe, sizes
from support.batches import samples_at_once
from support.training import METER_EVERY, is_small, split_trajectories

# Seconds of a sample of 512 pixels through SDXL's UNet, in large batches: without and with
# gradients, as --dry-run measured them there (docs/speed.md).
H200 = (0.0038, 0.0129)


def estimate(args, teacher: int, held_out: int) -> dict[str, tuple[int, int]]:
    """{part of a training: UNet evaluations, one a sample, (without, with gradients)}; printed too.

    teacher: what the teacher takes for all its x_t. held_out: samples that the meter reads each
    time."""
    every = args.preview or METER_EVERY
    plan = {
        "teacher": (teacher, 0),
        "training": (0, args.steps * args.batch),
        "meter": (-(-args.steps // every) * held_out, 0),
    }
    if args.preview:
        strip = drawn(len(probe.PREVIEW_SEEDS), len(probe.PREVIEW_SCALES), 30)
        plan["previews"] = (-(-args.steps // args.preview) * strip, 0)
    if args.probe:
        pictures = drawn(args.probe, len(probe.SCALES), probe.STEPS)
        plan["probe"] = (pictures + args.probe * len(probe.SCALES) * len(probe.LEVELS), 0)
    parts = (f"{part} {sum(n):,}{' with gradients' * bool(n[1])}" for part, n in plan.items())
    print(f"what it takes, in samples through the UNet: {', '.join(parts)}")
    return plan


def text_slider(args, n_ends: int) -> dict[str, tuple[int, int]]:
    """`estimate` for train_text.py, with n_ends = 2|P| predictions of eq. (8) at each x_t (2 where
    P is empty)."""
    denoising = args.denoising_steps * (1 if args.guidance == 1 else 2)
    trained, held_out = split_trajectories(args.trajectories)
    teacher = (trained + held_out) * (denoising + args.per_trajectory * n_ends)
    return estimate(args, teacher, held_out=2 * held_out * args.per_trajectory)


def drawn(seeds: int, columns: int, steps: int) -> int:
    """Evaluations of a sweep with guidance: the steps before the start once for all columns."""
    before = sampler.steps_before(0.3, steps)
    return 2 * seeds * (before + columns * (steps - before))


def dry_run(args, model, slider, cond, plan: dict):
    """Time a few evaluations without gradients and a few with, and print what `plan` (from
    `estimate`) will take: evaluations, seconds, memory."""
    slider.attach(model.unet)
    shape = model.latent_shape(sizes.height_width(args.size))
    at_once = samples_at_once(model.unet, shape, 4 * args.batch)
    x_t = sampler.noise(range(max(at_once, args.batch)), shape, model.device, model.dtype)
    t = torch.full((len(x_t),), 500, device=model.device)

    def loss(x_t, t):
        one = tuple(c[:1] for c in cond)
        return model.unet(x_t, t, *sampler.expand(one, len(x_t))).float().square().mean()

    def gradients(x_t, t):
        slider.scale = 1.0
        return torch.autograd.grad(loss(x_t, t), list(slider.parameters()))

    def seconds(function, samples):
        """Of one sample, the median of three after a warm-up."""
        taken = []
        for _ in range(4):
            started = time.time()
            function(x_t[:samples], t[:samples])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append((time.time() - started) / samples)
        return statistics.median(taken[1:])

    without = seconds(torch.no_grad()(loss), at_once)
    with_gradients = seconds(graphs.captured(gradients, model.device), args.batch)
    slider.scale = 0.0
    slider.detach()
    total = tuple(sum(n) for n in zip(*plan.values()))  # without, with gradients
    print(f"{'':10}{'without':>10}{'with gradients':>16}{'seconds':>10}")
    for part, (a, b) in (plan | {"together": total}).items():
        s = (a * without + b * with_gradients) / distributed.world_size()
        print(f"{part:10}{a:10,}{b:16,}{s:10.0f}")
    memory = peak_memory(model.device) / 2**30
    print(
        f"One sample takes {without:.3g} s without, {with_gradients:.3g} s with gradients; "
        f"peak memory so far {memory:.1f} GiB. Nothing was trained."
    )
    if model.device.type == "cpu" and not is_small(model.unet):
        on_h200 = sum(n * s for n, s in zip(total, H200)) * shape[1] * shape[2] / 64**2
        slower = "for another GPU multiply by 800 and divide by its TFLOP/s in bfloat16"
        print(f"An NVIDIA H200 (800 TFLOP/s) takes about {on_h200:.2g} s for that; {slower}.")


def peak_memory(device="cpu") -> float:
    """Bytes: of the GPU's memory, or of this process's (NaN where the system does not say). Not
    getrusage's, which starts at the parent process's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
