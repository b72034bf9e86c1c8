"""Which recipe trains a text slider at SDXL's width?

    python -m experiments.full_width --minutes 3 --out experiments/results

SDXL's own UNet (2.26 billion parameters; only its conditioning is as wide as the miniature's) is
trained from nothing on the miniature's drawn world, for a few minutes of one GPU. Then text sliders
are trained on it with several recipes, and measured (miniature/effect.py). --tiny: on a CPU."""

import json
import math
import multiprocessing
import os
import time

import numpy as np
import torch
from PIL import Image

import lora
import sampler
import train_text
from experiments.common import CONCEPTS, RESULTS
from formats.single_file import SDXL as FULL
from miniature import effect, world
from sdxl import SDXL
from sdxl_unet import UNet
from support import cli, images, options, training
from support.batches import samples_at_once

AT_ONCE, LR, CAPTIONS = 128, 2e-4, 2  # samples in a step; captions for each picture
MEASURED, PUBLISHED = training.LARGE | {"eta": training.ETA}, training.PUBLISHED
RUNS = {
    "age": ("age", MEASURED),
    "age, eta 1": ("age", MEASURED | {"eta": 1.0}),
    "age, lr 4e-3": ("age", MEASURED | {"lr": 4e-3}),
    "eye size": ("eye size", MEASURED),
    "smile": ("smile", MEASURED),
    "age, published": ("age", PUBLISHED),
}


def draw(i: int):
    """Picture number i of the world, and captions of it."""
    rng = np.random.default_rng((11, i))
    made = world.sample(rng)
    return np.asarray(world.draw(made)), [world.caption(made, rng) for _ in range(CAPTIONS)]


@torch.no_grad()
def encode(model, count: int):
    """`count` pictures as latents (n, 4, 16, 16), their captions as tokens (n, CAPTIONS, 77)."""
    with multiprocessing.get_context("fork").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        drawn, captions = zip(*pool.map(draw, range(count), chunksize=64))
    few = [[Image.fromarray(p) for p in drawn[i : i + 500]] for i in range(0, count, 500)]
    x_0 = torch.cat([model.encode(pictures).float() for pictures in few])
    flat = [caption for both in captions for caption in both]
    padded = dict(padding="max_length", max_length=77, truncation=True)
    tokens = (t(flat, return_tensors="pt", **padded).input_ids for t in model.tokenizers)
    return x_0, [ids.view(count, CAPTIONS, 77) for ids in tokens]


def train_unet(model, config: dict, count: int, seconds: float) -> tuple[UNet, dict]:
    """SDXL's UNet, trained to predict eps for so long (min-SNR weights, Hang et al. 2023)."""
    x_0, ids = encode(model, count)
    device, n, g = model.device, AT_ONCE, np.random.default_rng(0)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet(config)
    for name, p in unet.named_parameters():  # every block begins as the identity
        if name.startswith("conv_out.") or name.split(".")[-2] in ("conv2", "proj_out"):
            torch.nn.init.zeros_(p)
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    alpha_bar, time_ids = model.alpha_bar.to(device), model.condition([""])[2].float()
    started, step, average = time.time(), 0, None
    while (part := (time.time() - started) / seconds) < 1:
        level = 1.0 if part < 0.5 else max(0.02, 0.5 * (1 + math.cos(math.pi * (2 * part - 1))))
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 100) * level
        rows, caption = g.integers(0, count, n), g.integers(0, CAPTIONS, n)
        said = torch.from_numpy((g.random(n) > 0.1).astype(np.float32)).to(device)
        x, eps = x_0[rows], torch.randn_like(x_0[:n])
        t = ((torch.randperm(n, device=device) + torch.rand(n, device=device)) / n * 1000).long()
        with torch.autocast(device.type, torch.bfloat16):
            read = lambda e, i: e(i[rows, caption].to(device), output_hidden_states=True)
            with torch.no_grad():
                out = [read(encoder, i) for encoder, i in zip(model.text_encoders, ids)]
            context = torch.cat([o.hidden_states[-2] for o in out], -1) * said[:, None, None]
            cond = context, out[-1].text_embeds * said[:, None], time_ids.expand(n, 6)
            eps_hat = unet(sampler.add_noise(x, eps, t, alpha_bar), t, *cond)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        error = (eps_hat.float() - eps).square().mean((1, 2, 3))
        loss = (snr.clamp(max=5) / snr * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            average = 0.7 * (average or loss.item()) + 0.3 * loss.item()
            print(f"step {step}: loss {average:.4f}, {time.time() - started:.0f} s", flush=True)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    about = {"steps": step, "samples": step * n, "pictures": count, "loss": average, "gpu": gpu}
    return unet.eval().requires_grad_(False), about


def train_slider(model, concept, recipe: dict):
    """A text slider, its meter's reading with the seconds that it took."""
    started, size = time.time(), (model.size,) * 2
    ends = (f"{concept.target}, {words}" for words in (concept.pos, concept.neg))
    preserved = options.combinations(concept.preserve)
    prompts = train_text.encode(model, [concept.target], *ends, preserved, size)
    at_once = samples_at_once(model.unet, model.latent_shape(size), 4 * recipe["batch"])
    settings = dict(eta=recipe["eta"], size=size, seed=0, batch=at_once)
    train, held_out = train_text.teach(model, prompts, **settings)
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet)).to(model.device).attach(model.unet)
    settings = {name: recipe[name] for name in ("steps", "batch", "lr")}
    reading = training.fit_targets(model.unet, slider, train, held_out, **settings)
    slider.detach()
    return slider.requires_grad_(False), reading | {"seconds": time.time() - started}


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("--minutes", type=float, default=3, help="of the UNet's training")
    p.add_argument("--out", default=str(RESULTS))
    p.add_argument("--tiny", action="store_true", help="a small UNet, one slider: for a CPU")
    args = p.parse_args()
    out, model = cli.output_folder(args.out), SDXL.load()
    context, pooled, _ = model.condition([""])
    config = FULL["unet"] | {"cross_attention_dim": context.shape[2], "sample_size": 16}
    config["projection_class_embeddings_input_dim"] = pooled.shape[1] + 6 * 256
    if args.tiny:
        sizes = dict(block_out_channels=[64, 128, 192], attention_head_dim=[2, 4, 6])
        config |= sizes | {"transformer_layers_per_block": [1, 1, 2]}
    count = 200 if args.tiny else 64_000
    unet, about = train_unet(model, config, count, 60 * args.minutes)
    model.unet = unet.to(model.dtype)
    results, rows = {"unet": about, "sliders": {}}, []
    seeds, steps = (effect.SEEDS[:32], 20) if not args.tiny else (effect.SEEDS[:2], 4)
    for name, (concept, recipe) in list(RUNS.items())[: 1 if args.tiny else None]:
        slider, reading = train_slider(model, CONCEPTS[concept], recipe)
        columns = [[(slider, scale)] for scale in effect.SCALES]
        drawn = effect.pictures(model, columns, seeds, effect.PROMPTS[:4], steps=steps, batch=64)
        found = effect.summary(effect.table(drawn), CONCEPTS[concept].attribute)
        results["sliders"][name] = {"recipe": recipe, "meter": reading} | found
        cli.write_text(out / "full_width.json", json.dumps(results, indent=1))
        rows.append([column[0] for column in drawn])
        sheet = images.contact_sheet(rows, list(map(images.scale_label, effect.SCALES)), list(RUNS))
        images.save_image(sheet, out / "full_width.png")
        print(f"{name}: {json.dumps(results['sliders'][name])}", flush=True)


if __name__ == "__main__":
    cli.run(main)
