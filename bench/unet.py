"""Our UNet against diffusers' and, in training, peft's: time and memory.  python -m bench.unet

The miniature and full-size SDXL, with random weights, float32 and bfloat16: a forward pass without gradients (batch 2, as
guidance has it; the miniature 8) and an optimiser step of a rank-4 text slider on the layers that train_text.py changes
(batch 1; the miniature 8), at 512 pixels (the miniature 128). The two take turns in processes of their own, so that each
peak of resident memory is its own; medians. --what memory: the peaks of what else a GPU has to hold.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import invert
import lora
import train_space
from formats.single_file import SDXL
from sdxl import MINIATURE
from sdxl_unet import UNet
from sdxl_vae import VAE
from support import cost, training
from support.cli import DTYPES

CONFIGS = {
    "miniature": json.loads((MINIATURE / "unet" / "config.json").read_text()),
    "full": SDXL["unet"],
}
SIDE = {"miniature": 16, "full": 64}  # of the latents
BATCH = {"miniature": (8, 8), "full": (2, 1)}  # without gradients, in training


def empty(kind, dtype=torch.bfloat16, config=SDXL["unet"]):
    """kind(config) with random weights, made in place in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            unet = kind(config)
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


def inputs(dtype=torch.bfloat16, side=64, n=1, config=SDXL["unet"]):
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(n, *shape, generator=g).to(dtype)
    time_ids = torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * n, dtype=dtype)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return (
        draw(4, side, side),
        torch.tensor([500] * n),
        draw(77, config["cross_attention_dim"]),
        draw(pooled),
        time_ids,
    )


def ours(config, dtype):
    """The frozen UNet; a function that gives it a slider and returns what is to be trained."""
    unet = empty(UNet, dtype, config)

    def slider(checkpointing):
        slider = lora.Slider(lora.target_layers(unet)).attach(unet)
        slider.scale = 1.0
        training.set_checkpointing(unet, checkpointing)
        return list(slider.parameters())

    return unet, slider


def theirs(config, dtype):
    import diffusers
    import peft

    unet = empty(lambda c: diffusers.UNet2DConditionModel(**c), dtype, config)

    def slider(checkpointing):
        names = [
            n
            for n, m in unet.named_modules()
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
            and re.search(lora.LAYERS["noxattn"], n)
        ]
        unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=1, target_modules=names))
        trained = [p for n, p in unet.named_parameters() if "lora_" in n]
        for p in trained:
            p.data = p.data.float()
            p.requires_grad_(True)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        return trained

    return lambda x, t, context, pooled, ids: unet(
        x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
    ).sample, slider


def measure(who, what, size, dtype, steps):
    """In its own process: seconds of each step (the first, a warm-up, left out) and the peak resident memory in GiB."""
    config, training_ = CONFIGS[size], what != "forward"
    unet, slider = {"ours": ours, "diffusers": theirs, "compiled": ours}[who](config, dtype)
    x, seconds = inputs(dtype, SIDE[size], BATCH[size][training_], config), []
    opt = torch.optim.AdamW(slider(what == "checkpointing"), lr=2e-4) if training_ else None
    if who == "compiled":
        unet = torch.compile(unet)
    for _ in range(steps + 1):
        started = time.time()
        with torch.set_grad_enabled(training_):
            loss = unet(*x).float().square().mean()
        if training_:
            opt.zero_grad()
            loss.backward()
            opt.step()
        assert loss.isfinite()
        seconds.append(time.time() - started)
    print(
        json.dumps({"seconds": seconds[1:], "first": seconds[0], "GiB": cost.peak_memory() / 2**30})
    )


@torch.no_grad()
def evaluate(side, n):
    """The frozen UNet on n samples at once, `side` latents wide."""
    unet = empty(UNet)
    before, started = cost.peak_memory(), time.time()
    unet(*inputs(side=side, n=n))
    print(
        json.dumps(
            {
                "seconds": [time.time() - started],
                "GiB": cost.peak_memory() / 2**30,
                "start": before / 2**30,
            }
        )
    )


@torch.no_grad()
def decode(tile):
    """The VAE, float32, decoding 1024 pixels in tiles of `tile` latents."""
    torch.manual_seed(0)
    vae = VAE(SDXL["vae"]).eval()
    vae.tile = tile
    before, started = cost.peak_memory(), time.time()
    vae.decode(torch.randn(1, 4, 128, 128))
    print(
        json.dumps(
            {
                "seconds": [time.time() - started],
                "GiB": cost.peak_memory() / 2**30,
                "start": before / 2**30,
            }
        )
    )


def null_text(checkpointing):
    """One gradient of null-text inversion (invert.py): of the unconditional embedding, one sample of 512 pixels."""
    unet = empty(UNet)
    training.set_checkpointing(unet, checkpointing)
    x_t, t, context, pooled, time_ids = inputs()
    before, started = cost.peak_memory(), time.time()
    null = context.float().requires_grad_(), pooled.float().requires_grad_()
    _, loss = invert.step_loss(
        unet,
        x_t,
        501,
        481,
        x_t,
        (*(c.to(x_t.dtype) for c in null), time_ids),
        x_t,
        alpha_bar=torch.linspace(1, 0, 1000),
        guidance=5.0,
    )
    loss.sum().backward()
    print(
        json.dumps(
            {
                "seconds": [time.time() - started],
                "GiB": cost.peak_memory() / 2**30,
                "start": before / 2**30,
            }
        )
    )


def space(checkpointing):
    """One gradient of SliderSpace's loss (train_space.py) of a slider of rank 1: through CLIP ViT-L/14, the VAE (float32) and the UNet, one
    sample of 512 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    vae = VAE(SDXL["vae"]).eval().requires_grad_(False)
    vit_l = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    tower = CLIPVisionModelWithProjection(vit_l).eval().requires_grad_(False)
    see = lambda x: tower(pixel_values=F.adaptive_avg_pool2d((x + 1) / 2, 224)).image_embeds
    unet = empty(UNet)
    training.set_checkpointing(unet, checkpointing)
    training.set_checkpointing(vae, checkpointing)
    x_t, t, *cond = inputs()
    model = SimpleNamespace(
        unet=unet, vae=vae, alpha_bar=torch.linspace(1, 0, 1000), device="cpu", dtype=torch.bfloat16
    )
    samples, zero = (
        train_space.Samples(x_t, x_t[:, None], t[:, None], torch.tensor([0])),
        torch.tensor([0]),
    )
    v = F.normalize(torch.randn(1, 768), dim=1)
    of = train_space.Space(
        model, see, samples, tuple(cond), tuple(cond), v, rank=1, guidance=1.0, batch=1
    )
    slider = lora.Slider(lora.target_layers(unet, "xattn"), 1).attach(unet)
    before, started = cost.peak_memory(), time.time()
    (1 - F.cosine_similarity(*of.change(slider, zero, zero, torch.ones(1)))).sum().backward()
    print(
        json.dumps(
            {
                "seconds": [time.time() - started],
                "GiB": cost.peak_memory() / 2**30,
                "start": before / 2**30,
            }
        )
    )


def arithmetic():
    """Multiplications and additions of one sample at 512 pixels, and how many of them a cache of the prompt's keys and values saves."""
    with torch.device("meta"):
        unet, x = UNet(CONFIGS["full"]), [v.to("meta") for v in inputs(torch.float32)]
    with FlopCounterMode(display=False) as count:
        unet(*x)
    saved = sum(
        2 * 77 * m.weight.numel()
        for name, m in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    )
    print(
        f"\none sample of 512 pixels: {count.get_total_flops() / 1e12:.2f} TFLOP, of which keys and values of the prompt {saved / count.get_total_flops():.1%}"
    )


OTHERS = {
    "teacher": (
        "UNet, 8 samples of 512 pixels (the teacher at --batch 2)",
        lambda: evaluate(64, 8),
    ),
    "one": ("UNet, 1 sample of 512 pixels", lambda: evaluate(64, 1)),
    "draw": ("UNet, 2 samples of 1024 pixels (drawing, with guidance)", lambda: evaluate(128, 2)),
    "null": ("null-text inversion, a gradient of 1 sample of 512 pixels", lambda: null_text(False)),
    "null-again": ("the same with `--checkpointing`", lambda: null_text(True)),
    "space": (
        "SliderSpace, a gradient of 1 sample of 512 pixels, back through CLIP ViT-L, VAE and UNet",
        lambda: space(False),
    ),
    "space-again": ("the same with `--checkpointing`", lambda: space(True)),
    "decode": ("VAE, 1024 pixels whole", lambda: decode(128)),
    "tiles": ("VAE, 1024 pixels in tiles of 512", lambda: decode(64)),
}


def alone(*words):
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.unet", "--only", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    p.add_argument(
        "--size", choices=CONFIGS, action="append", help="may be repeated (default: both)"
    )
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        action="append",
        help="may be repeated (default: both)",
    )
    p.add_argument(
        "--what",
        choices=["forward", "train", "checkpointing", "memory", "arithmetic"],
        action="append",
        help="may be repeated (default: forward, train)",
    )
    p.add_argument(
        "--against",
        choices=["diffusers", "compiled"],
        default="diffusers",
        help="compiled: our own, through torch.compile (default: %(default)s)",
    )
    p.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="processes of each kind, alternating (default: %(default)s)",
    )
    args = p.parse_args()
    if args.only and args.only[0] in OTHERS:
        return OTHERS[args.only[0]][1]()
    if args.only:
        who, what, size, dtype, steps = args.only
        return measure(who, what, size, DTYPES[dtype], int(steps))
    what = args.what or ["forward", "train"]
    print(
        f"| UNet | dtype | | ours, s (range) | {args.against}, s (range) | ratio of medians | GiB, ours | {args.against} |\n"
        + "|---" * 8
        + "|"
    )
    for size in args.size or CONFIGS:
        for dtype in args.dtype or ["float32", "bfloat16"]:
            for kind in [w for w in what if w not in ("memory", "arithmetic")]:
                seconds, memory = {"ours": [], args.against: []}, {"ours": 0.0, args.against: 0.0}
                for _ in range(args.rounds):
                    for who in seconds:
                        result = alone(who, kind, size, dtype, "20" if size == "miniature" else "2")
                        seconds[who] += result["seconds"]
                        memory[who] = max(memory[who], result["GiB"])
                middle = {who: statistics.median(s) for who, s in seconds.items()}
                cells = [
                    f"{middle[who]:.3g} ({min(s):.3g} to {max(s):.3g})"
                    for who, s in seconds.items()
                ]
                first = f"; compiling took {result['first']:.0f} s" if who == "compiled" else ""
                print(
                    f"| {size} | {dtype} | {kind} | {cells[0]} | {cells[1]}{first} | {middle['ours'] / middle[who]:.2f} | "
                    f"{memory['ours']:.2f} | {memory[who]:.2f} |",
                    flush=True,
                )
    if "memory" in what:
        print(
            "\n| full size, bfloat16 | s | peak GiB | of it before (weights, Python) |\n|---|---|---|---|"
        )
        for name, (meaning, _) in OTHERS.items():
            result = alone(name)
            print(
                f"| {meaning} | {result['seconds'][0]:.1f} | {result['GiB']:.2f} | {result['start']:.2f} |",
                flush=True,
            )
    if "arithmetic" in what:
        arithmetic()


if __name__ == "__main__":
    main()
