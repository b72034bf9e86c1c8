"""Our UNet against diffusers' and, in training, peft's: time and memory.

    python -m bench.unet

The miniature and full-size SDXL, with random weights, float32 and bfloat16: a forward pass without
gradients (batch 2, as guidance has it; the miniature 8) and an optimizer step of a rank-4 text
slider on the layers that train_text.py changes (batch 1; the miniature 8), at 512 pixels (the
miniature 128). The two take turns in processes of their own, so that each peak of resident memory
is its own; medians. --what memory: the peaks of what else a GPU has to hold."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
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
from support import cli, cost, training
from support.options import default_help

CONFIGS = {
    "miniature": json.loads((MINIATURE / "unet" / "config.json").read_text()),
    "full": SDXL["unet"],
}
SIDE = {"miniature": 16, "full": 64}  # of the latents
BATCH = {"miniature": (8, 8), "full": (2, 1)}  # without gradients, in training
GIB = 2**30


def empty(kind, dtype=torch.bfloat16, config=SDXL["unet"], device="cpu"):
    """kind(config) with random weights, made in place in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            unet = kind(config)
        unet = unet.to_empty(device=device)
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
    """x_t, t, context, pooled, time_ids of n samples."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(n, *shape, generator=g).to(dtype)
    x_t, t = draw(4, side, side), torch.tensor([500] * n)
    context = draw(77, config["cross_attention_dim"])
    of_time_ids = 6 * config["addition_time_embed_dim"]
    pooled = draw(config["projection_class_embeddings_input_dim"] - of_time_ids)
    time_ids = torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * n, dtype=dtype)
    return x_t, t, context, pooled, time_ids


# ---------------------------------------------------------------------------- one against the other


def ours(config, dtype):
    """The frozen UNet; a function that gives it a slider and returns what is to be trained."""
    unet = empty(UNet, dtype, config)

    def add_slider(checkpointing):
        slider = lora.Slider(lora.target_layers(unet)).attach(unet)
        slider.scale = 1.0
        training.set_checkpointing(unet, checkpointing)
        return list(slider.parameters())

    return unet, add_slider


def theirs(config, dtype):
    """The same of diffusers and peft."""
    import diffusers

    unet = empty(lambda c: diffusers.UNet2DConditionModel(**c), dtype, config)

    def add_slider(checkpointing):
        trained = add_peft(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        return trained

    return call_diffusers(unet), add_slider


def call_diffusers(unet):
    """diffusers' UNet, called as ours is."""

    def predict(x_t, t, context, pooled, time_ids):
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return unet(x_t, t, context, added_cond_kwargs=added).sample

    return predict


def add_peft(unet):
    """A rank-4 adapter of peft on the layers that train_text.py changes; what is to be trained."""
    import peft

    kinds, pattern = (torch.nn.Linear, torch.nn.Conv2d), lora.LAYERS["noxattn"]
    layers = [n for n, m in unet.named_modules() if isinstance(m, kinds)]
    names = [n for n in layers if re.search(pattern, n)]
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=1, target_modules=names))
    trained = [p for n, p in unet.named_parameters() if "lora_" in n]
    for p in trained:
        p.data = p.data.float()
        p.requires_grad_(True)
    return trained


def measure(who, what, size, dtype, steps):
    """In its own process: seconds of each step (the first, a warm-up, left out) and the peak
    resident memory in GiB."""
    config, gradients = CONFIGS[size], what != "forward"
    make = {"ours": ours, "diffusers": theirs, "compiled": ours}[who]
    unet, add_slider = make(config, dtype)
    x, seconds = inputs(dtype, SIDE[size], BATCH[size][gradients], config), []
    if gradients:
        optimizer = torch.optim.AdamW(add_slider(what == "checkpointing"), lr=2e-4)
    if who == "compiled":
        unet = torch.compile(unet)
    for _ in range(steps + 1):
        started = time.time()
        with torch.set_grad_enabled(gradients):
            loss = unet(*x).float().square().mean()
        if gradients:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        seconds.append(time.time() - started)
    found = {"seconds": seconds[1:], "first": seconds[0], "GiB": cost.peak_memory() / GIB}
    print(json.dumps(found))


# ---------------------------------------------------------------------- what else a GPU has to hold


@contextmanager
def measured():
    """with measured(): ... prints how long it took, the peak memory, and that before it."""
    before, started = cost.peak_memory(), time.time()
    yield
    seconds = [time.time() - started]
    print(json.dumps({"seconds": seconds, "GiB": cost.peak_memory() / GIB, "start": before / GIB}))


@torch.no_grad()
def evaluate(side, n):
    """The frozen UNet on n samples at once, `side` latents wide."""
    unet = empty(UNet)
    with measured():
        unet(*inputs(side=side, n=n))


@torch.no_grad()
def decode(tile):
    """The VAE, float32, decoding 1024 pixels in tiles of `tile` latents."""
    torch.manual_seed(0)
    vae = VAE(SDXL["vae"]).eval()
    vae.tile = tile
    with measured():
        vae.decode(torch.randn(1, 4, 128, 128))


def null_text(checkpointing):
    """One gradient of null-text inversion (invert.py): of the unconditional embedding, one sample
    of 512 pixels."""
    unet = empty(UNet)
    training.set_checkpointing(unet, checkpointing)
    x_t, t, context, pooled, time_ids = inputs()
    with measured():
        null = context.float().requires_grad_(), pooled.float().requires_grad_()
        uncond = (*(c.to(x_t.dtype) for c in null), time_ids)
        settings = dict(alpha_bar=torch.linspace(1, 0, 1000), guidance=5.0)
        _, loss = invert.step_loss(unet, x_t, 501, 481, x_t, uncond, x_t, **settings)
        loss.sum().backward()


def clip_vit_l():
    """CLIP ViT-L/14 with random weights: pictures (B, 3, H, W) in [-1, 1] -> (B, 768)."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    tower = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    return lambda x: tower(pixel_values=F.adaptive_avg_pool2d((x + 1) / 2, 224)).image_embeds


def space(checkpointing):
    """One gradient of SliderSpace's loss (train_space.py) of a slider of rank 1: through CLIP
    ViT-L/14, the VAE (float32) and the UNet, one sample of 512 pixels."""
    torch.manual_seed(0)
    vae = VAE(SDXL["vae"]).eval().requires_grad_(False)
    encoder, unet = clip_vit_l(), empty(UNet)
    training.set_checkpointing(unet, checkpointing)
    training.set_checkpointing(vae, checkpointing)
    x_t, t, *cond = inputs()
    cond, zero = tuple(cond), torch.tensor([0])
    model = SimpleNamespace(unet=unet, vae=vae, device="cpu", dtype=torch.bfloat16)
    model.alpha_bar = torch.linspace(1, 0, 1000)
    samples = train_space.Samples(x_t, x_t[:, None], t[:, None], zero)
    v = F.normalize(torch.randn(1, 768), dim=1)
    settings = dict(rank=1, guidance=1.0, batch=1)
    of = train_space.Space(model, encoder, samples, cond, cond, v, **settings)
    slider = lora.Slider(lora.target_layers(unet, "xattn"), 1).attach(unet)
    with measured():
        made, wanted = of.change(slider, zero, zero, torch.ones(1))
        (1 - F.cosine_similarity(made, wanted)).sum().backward()


OTHERS = {
    "teacher": (
        "UNet, 8 samples of 512 pixels (the teacher at --batch 1)",
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


def arithmetic():
    """Multiplications and additions of one sample at 512 pixels, and how many of them a cache of
    the prompt's keys and values saves."""
    with torch.device("meta"):
        unet, x = UNet(CONFIGS["full"]), [v.to("meta") for v in inputs(torch.float32)]
    with FlopCounterMode(display=False) as count:
        unet(*x)
    names = ("attn2.to_k", "attn2.to_v")
    layers = [m for name, m in unet.named_modules() if name.endswith(names)]
    saved = sum(2 * 77 * layer.weight.numel() for layer in layers)
    total = count.get_total_flops()
    cacheable = f"of which keys and values of the prompt {saved / total:.1%}"
    print(f"\none sample of 512 pixels: {total / 1e12:.2f} TFLOP, {cacheable}")


# ------------------------------------------------------------------------------------ command line


def alone(*words):
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "bench.unet", "--only", *words]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_comparison(kind: str, size: str, dtype: str, against: str, rounds: int):
    """A row of the table: ours and the other take turns."""
    seconds, memory = {"ours": [], against: []}, {"ours": 0.0, against: 0.0}
    for _ in range(rounds):
        for who in seconds:
            result = alone(who, kind, size, dtype, "20" if size == "miniature" else "2")
            seconds[who] += result["seconds"]
            memory[who] = max(memory[who], result["GiB"])
    middle = {who: statistics.median(taken) for who, taken in seconds.items()}
    cells = [size, dtype, kind]
    for who, taken in seconds.items():
        cells.append(f"{middle[who]:.3g} ({min(taken):.3g} to {max(taken):.3g})")
    if against == "compiled":
        cells[-1] += f"; compiling took {result['first']:.0f} s"
    cells.append(f"{middle['ours'] / middle[against]:.2f}")
    cells += [f"{gib:.2f}" for gib in memory.values()]
    print(f"| {' | '.join(cells)} |", flush=True)


def parse_args():
    p = cli.plain_parser(__doc__)
    p.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    both = dict(action="append", help="may be repeated (default: both)")
    p.add_argument("--size", choices=CONFIGS, **both)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], **both)
    kinds = ["forward", "train", "checkpointing", "memory", "arithmetic"]
    what = "may be repeated (default: forward, train)"
    p.add_argument("--what", choices=kinds, action="append", help=what)
    against = default_help("compiled: our own, through torch.compile")
    others = dict(choices=["diffusers", "compiled"], default="diffusers")
    p.add_argument("--against", help=against, **others)
    rounds = default_help("processes of each kind, alternating")
    p.add_argument("--rounds", type=int, default=3, help=rounds)
    return p.parse_args()


def main():
    args = parse_args()
    if args.only and args.only[0] in OTHERS:
        return OTHERS[args.only[0]][1]()
    if args.only:
        who, what, size, dtype, steps = args.only
        return measure(who, what, size, cli.DTYPES[dtype], int(steps))
    what, against = args.what or ["forward", "train"], args.against
    head = f"UNet | dtype | | ours, s (range) | {against}, s (range) | ratio of medians"
    print(f"| {head} | GiB, ours | {against} |\n" + "|---" * 8 + "|")
    kinds = [kind for kind in what if kind not in ("memory", "arithmetic")]
    for size in args.size or CONFIGS:
        for dtype in args.dtype or ["float32", "bfloat16"]:
            for kind in kinds:
                print_comparison(kind, size, dtype, against, args.rounds)
    if "memory" in what:
        head = "full size, bfloat16 | s | peak GiB | of it before (weights, Python)"
        print(f"\n| {head} |\n|---|---|---|---|")
        for name, (meaning, _) in OTHERS.items():
            result = alone(name)
            taken = f"{result['seconds'][0]:.1f} | {result['GiB']:.2f} | {result['start']:.2f}"
            print(f"| {meaning} | {taken} |", flush=True)
    if "arithmetic" in what:
        arithmetic()


if __name__ == "__main__":
    main()
