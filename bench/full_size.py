"""Full-size SDXL with random weights: time and memory.  python -m bench.full_size

First one optimiser step of a rank-4 text slider, ours against diffusers + peft: bfloat16, batch 1, 512 pixels, the layers
that train_text.py changes by default; the two take turns, medians. Then the peaks of what else a GPU has to hold. Each
measurement is a process of its own, so that its peak resident memory is its own.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import lora
from sdxl_unet import UNet
from sdxl_vae import VAE
from formats.single_file import SDXL

CONFIG = SDXL["unet"]


def empty(kind, dtype=torch.bfloat16):
    """kind(CONFIG) with random weights, made in place in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            unet = kind(CONFIG)
        unet = unet.to_empty(device="cpu")
    finally:
        torch.set_default_dtype(default)
    torch.manual_seed(0)
    for name, p in unet.named_parameters():
        if p.ndim > 1:
            p.data.normal_(0, p[0].numel() ** -0.5)
        else:
            p.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return unet.eval().requires_grad_(False)


def peak_memory() -> int:
    """This process's peak resident memory so far, bytes. Not getrusage's, which starts at the parent process's."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def inputs(dtype=torch.bfloat16, side=64, n=1):
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(n, *shape, generator=g).to(dtype)
    time_ids = torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * n, dtype=dtype)
    return draw(4, side, side), torch.tensor([500] * n), draw(77, 2048), draw(1280), time_ids


def ours(checkpointing):
    unet = empty(UNet)
    unet.checkpointing(checkpointing)
    slider = lora.Slider(lora.target_layers(unet)).attach(unet)
    slider.scale = 1.0
    return list(slider.parameters()), unet


def theirs(checkpointing):
    import diffusers
    import peft
    unet = empty(lambda config: diffusers.UNet2DConditionModel(**config))
    names = [n for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and re.search(lora.LAYERS["noxattn"], n)]
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=1, target_modules=names))
    trained = [p for n, p in unet.named_parameters() if "lora_" in n]
    for p in trained:
        p.data = p.data.float()
        p.requires_grad_(True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    return trained, lambda x, t, context, pooled, ids: unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample


def measure(who, checkpointing, steps):
    """In its own process: seconds of each step (the first, a warm-up, left out) and the peak resident memory in GiB."""
    parameters, unet = {"ours": ours, "diffusers": theirs}[who](checkpointing)
    opt, x, seconds = torch.optim.AdamW(parameters, lr=2e-4), inputs(), []
    for _ in range(steps + 1):
        started = time.time()
        opt.zero_grad()
        loss = unet(*x).float().square().mean()
        loss.backward()
        opt.step()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in parameters)
        seconds.append(time.time() - started)
    print(json.dumps({"seconds": seconds[1:], "GiB": peak_memory() / 2**30}))


@torch.no_grad()
def evaluate(side, n):
    """The frozen UNet on n samples at once, `side` latents wide."""
    unet = empty(UNet)
    before, started = peak_memory(), time.time()
    unet(*inputs(side=side, n=n))
    print(json.dumps({"seconds": [time.time() - started], "GiB": peak_memory() / 2**30, "start": before / 2**30}))


@torch.no_grad()
def decode(tile):
    """The VAE, float32, decoding 1024 pixels in tiles of `tile` latents."""
    torch.manual_seed(0)
    vae = VAE(SDXL["vae"]).eval()
    vae.tile = tile
    before, started = peak_memory(), time.time()
    vae.decode(torch.randn(1, 4, 128, 128))
    print(json.dumps({"seconds": [time.time() - started], "GiB": peak_memory() / 2**30, "start": before / 2**30}))


OTHERS = {"teacher": ("UNet, 8 samples of 512 pixels (collecting at batch 1)", lambda: evaluate(64, 8)),
          "one": ("UNet, 1 sample of 512 pixels", lambda: evaluate(64, 1)),
          "draw": ("UNet, 2 samples of 1024 pixels (drawing, with guidance)", lambda: evaluate(128, 2)),
          "decode": ("VAE, 1024 pixels whole", lambda: decode(128)),
          "tiles": ("VAE, 1024 pixels in tiles of 512", lambda: decode(64))}


def alone(only, *more):
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "bench.full_size", "--only", only, *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=["ours", "diffusers", *OTHERS], help=argparse.SUPPRESS)
    p.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--steps", type=int, default=3, help="in each process, after a warm-up (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=2, help="processes of each kind, alternating (default: %(default)s)")
    args = p.parse_args()
    if args.only in OTHERS:
        return OTHERS[args.only][1]()
    if args.only:
        return measure(args.only, args.checkpointing, args.steps)
    print("| checkpointing | who | s/step (median, range) | peak GiB |\n|---|---|---|---|")
    for checkpointing in (False, True):
        seconds, memory = {}, {}
        for _ in range(args.rounds):
            for who in ("ours", "diffusers"):
                result = alone(who, "--steps", str(args.steps), *["--checkpointing"] * checkpointing)
                seconds.setdefault(who, []).extend(result["seconds"])
                memory[who] = max(memory.get(who, 0), result["GiB"])
        for who, s in seconds.items():
            print(f"| {'yes' if checkpointing else 'no'} | {who} | {statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f}) | {memory[who]:.2f} |", flush=True)
        print(f"ratio of medians, ours to diffusers: {statistics.median(seconds['ours']) / statistics.median(seconds['diffusers']):.2f}\n")
    print("| evaluation, no gradients | s | peak GiB | of it before (weights, Python) |\n|---|---|---|---|")
    for name, (what, _) in OTHERS.items():
        result = alone(name)
        print(f"| {what} | {result['seconds'][0]:.1f} | {result['GiB']:.2f} | {result['start']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
