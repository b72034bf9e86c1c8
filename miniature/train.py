"""Train the miniature SDXL from nothing (or `make miniature`):

    python -m miniature.train

Five stages, each resumable: kill it at any time and start it again.

    data    draw the training pictures (world.py)
    vae     the autoencoder: L1 + edges + KL
    judge   the network half of the measuring stick (measure.py)
    clip    tokenizer, two text encoders and an image encoder, contrastive (Radford et al. 2021)
    unet    the UNet: predict eps on the VAE's latents (Ho et al. 2020), weighted by min-SNR
            (Hang et al. 2023)

Work in progress lives in miniature/training/ (checkpoints, log.txt, sample grids). The result is
an ordinary SDXL folder, miniature/model/, with the image encoder beside its parts."""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import sampler
import slider
from formats import slider_files, weights, write_atomically
from miniature import world
from miniature.measure import OUTPUTS, judge_loss, targets
from sdxl import SDXL, split_words
from sdxl_unet import UNet
from sdxl_vae import VAE
from support.clip import ConvolutionalEncoder

HERE = Path(__file__).parent
WORK = HERE / "training"
MODEL = WORK / "model"
PICTURES = 32_000

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 128],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "act_fn": "silu",
    "sample_size": world.SIZE,
    "scaling_factor": 1.0,
    "force_upcast": False,
}


def log(message):
    line = f"{time.strftime('%H:%M:%S')} {message}"
    print(line, flush=True)
    with open(WORK / "log.txt", "a") as f:
        f.write(line + "\n")


def write_json(path, value, indent=2):
    text = json.dumps(value, indent=indent) + "\n"
    write_atomically(path, lambda p: p.write_text(text))


class Checkpoint:
    """A training's state on disk: modules, averages, optimizer and step, replaced in one rename."""

    def __init__(self, name, **parts):
        self.path, self.parts = WORK / f"{name}.pt", parts

    def load(self) -> int:
        """Restore the parts; returns the step to go on from (0 if there is nothing to resume)."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def save(self, step):
        states = {name: part.state_dict() for name, part in self.parts.items()}
        write_atomically(self.path, lambda p: torch.save({"step": step} | states, p))


def warm_then_cosine(step, steps, warm=100):
    """Learning-rate factor: linear warm-up, then a half cosine down to 0."""
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_half(state, path):
    """A .safetensors file of the state dict, in float16."""
    half = lambda tensor: tensor.half().contiguous() if tensor.is_floating_point() else tensor
    tensors = {name: half(tensor) for name, tensor in state.items()}
    slider_files.save_tensors(path, tensors, {"format": "pt"})


def grid(pictures, path):
    """Save pictures (N, 3, H, W) in [-1, 1] as one PNG."""
    pictures = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    world.grid([Image.fromarray(picture) for picture in pictures]).save(path)


def two_rounds(step, first, second):
    """Learning-rate factor of two schedules, one after the other, the second at half the height."""
    if step < first:
        return warm_then_cosine(step, first)
    return 0.5 * warm_then_cosine(step - first, second)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for weight matrices and kernels: here it
    learns about 2.5 times more in a step than Adam does."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                x = p.grad + group["momentum"] * m
                x = x.reshape(len(p), -1).bfloat16()  # (out, in * k * k)
                x = x / (x.norm() + 1e-7)
                wide = x if x.shape[0] <= x.shape[1] else x.T
                for _ in range(5):  # Newton-Schulz: all singular values toward 1
                    a = wide @ wide.T
                    wide = 3.4445 * wide + (-4.7750 * a + 2.0315 * a @ a) @ wide
                x = wide if x.shape[0] <= x.shape[1] else wide.T
                lr = group["lr"] * max(1, x.shape[0] / x.shape[1]) ** 0.5
                p.add_(x.reshape(p.shape).to(p.dtype), alpha=-lr)


class Optimizer:
    """Muon for the matrices of `module`, AdamW for the rest (biases, norms, thin layers), on one
    schedule."""

    def __init__(self, module, lr_muon, lr_adam):
        is_matrix = lambda p: p.ndim > 1 and min(len(p), p[0].numel()) >= 16
        matrices = [p for p in module.parameters() if is_matrix(p)]
        others = [p for p in module.parameters() if not is_matrix(p)]
        adam = torch.optim.AdamW(others, lr_adam, betas=(0.9, 0.99), weight_decay=0.0)
        self.parts = [Muon(matrices, lr_muon), adam]
        self.lrs = [lr_muon, lr_adam]

    def step(self, loss, module, factor):
        for part, lr in zip(self.parts, self.lrs):
            part.param_groups[0]["lr"] = lr * factor
            part.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)


# --------------------------------------------------------------------------------------------- data


def make_data():
    """Draw PICTURES pictures to training/pictures.npy (uint8, N x 128 x 128 x 3), attributes
    beside them."""
    pictures_path, attributes_path = WORK / "pictures.npy", WORK / "attributes.json"
    if not attributes_path.exists():
        shape, temporary = (PICTURES, world.SIZE, world.SIZE, 3), WORK / "pictures.tmp"
        pictures = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        attributes = []
        for i in range(PICTURES):
            # Seeds (1, i): the held-out pictures use others.
            a = world.sample(np.random.default_rng((1, i)))
            attributes.append(a)
            pictures[i] = np.asarray(world.draw(a))
        pictures.flush()
        temporary.replace(pictures_path)
        write_json(attributes_path, attributes, indent=None)  # last: with it the stage is done
        log(f"data: {PICTURES} pictures drawn")
    return np.load(pictures_path, mmap_mode="r"), json.loads(attributes_path.read_text())


def to_tensor(pictures):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------- VAE


def edges(x):
    """Horizontal and vertical differences: thin lines weigh more than in a plain L1."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(pictures, device, first=8000, crop=7000, second=2500, save_every=200):
    """Two rounds, each with its own learning-rate schedule: `first` steps, of which `crop` on
    64x64 crops (the network is convolutional: four times cheaper), then `second` steps on whole
    pictures. Thin lines weigh double."""
    folder = MODEL / "vae"
    if (folder / "diffusion_pytorch_model.safetensors").exists():
        return
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).to(device, memory_format=torch.channels_last)  # a tenth faster
    opt = Optimizer(vae, 0.01, 1e-3)
    checkpoint = Checkpoint("vae", vae=vae, opt=opt)
    started = time.time()
    for step in range(checkpoint.load(), first + second):
        rng = np.random.default_rng((2, step))
        # By step, so that a resumed training is the same training.
        torch.manual_seed(2_000_000 + step)
        fine = step >= first
        batch = 16 if step < crop else 6 if fine else 8
        x = pictures[np.sort(rng.choice(len(pictures), batch, replace=False))]
        if step < crop:  # a corner for each picture
            corners = rng.integers(0, world.SIZE - 63, (len(x), 2))
            x = np.stack([p[r : r + 64, c : c + 64] for p, (r, c) in zip(x, corners)])
        x = to_tensor(x).to(device)
        with torch.autocast(device, torch.bfloat16):
            mean, logvar = vae.moments(x)
            logvar = logvar.float().clamp(-30, 20)
            z = mean.float() + torch.randn_like(mean, dtype=torch.float32) * (0.5 * logvar).exp()
            y = vae.decode_unscaled(z)
        y = y.float()
        thin = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x)))
        reconstruction = (y - x).abs().mean() + 2 * thin
        kl = 0.5 * (mean.float() ** 2 + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction + 2e-4 * kl
        opt.step(loss, vae, two_rounds(step, first, second))
        if step % 50 == 0:
            l1, seconds = (y - x).abs().mean().item(), time.time() - started
            losses = f"L1 {l1:.4f} edges {thin.item():.4f} kl {kl.item():.3f}"
            log(f"vae {step}/{first + second} {losses} {seconds:.0f}s")
        if (step + 1) % save_every == 0:
            checkpoint.save(step + 1)
            with torch.no_grad():
                x = to_tensor(pictures[:8]).to(device)
                y = vae.decode_unscaled(vae.moments(x)[0])
                grid(torch.cat([x, y]).cpu(), WORK / "vae.png")
    # The scaling factor makes the latents' standard deviation 1, as SDXL's 0.13025 does (Rombach
    # et al. 2022, app. G).
    with torch.no_grad():
        batches = [to_tensor(pictures[i : i + 64]).to(device) for i in range(0, 1024, 64)]
        std = torch.cat([vae.moments(x)[0] for x in batches]).std().item()
    write_json(folder / "config.json", VAE_CONFIG | {"scaling_factor": round(1 / std, 5)})
    save_half(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    log(f"vae: done, scaling factor {1 / std:.5f}")


# --------------------------------------------------------------------------------------------- CLIP

# As SDXL's: the second is wider, has the projection, another activation, another padding token.
TEXT_CONFIGS = [
    dict(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=3,
        hidden_act="quick_gelu",
        projection_dim=96,
    ),
    dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=128,
    ),
]


def byte_symbols():
    """GPT-2's printable stand-in for each of the 256 bytes (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def bpe(word, merges):
    """Byte-pair encoding (Sennrich et al. 2016): join the pair that was learned first, until none
    is left to join."""
    parts, rank = [*word[:-1], word[-1] + "</w>"], {pair: i for i, pair in enumerate(merges)}
    while pairs := [pair for pair in zip(parts, parts[1:]) if pair in rank]:
        i = [*zip(parts, parts[1:])].index(min(pairs, key=rank.get))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def make_tokenizers(attributes):
    """A byte-level BPE like CLIP's: all 256 bytes, bare and word-final, so that any Unicode text
    is accepted, and merges that make one token of every word in the captions."""
    from transformers import CLIPTokenizer

    rng = np.random.default_rng(3)
    words = sorted({w for a in attributes for w in split_words(world.caption(a, rng, mention=0.8))})
    vocab = [*byte_symbols(), *(b + "</w>" for b in byte_symbols())]
    merges = []
    for word in words:
        parts = bpe(word, merges)
        # What the merges so far leave in pieces gets one more: later ones undo no earlier ones.
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            vocab.append(parts[0] + parts[1])
            parts = bpe(word, merges)
    vocab = {token: i for i, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    for folder, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
        tokenizer.save_pretrained(MODEL / folder)
        # The form that older readers want.
        write_json(MODEL / folder / "vocab.json", vocab)
        (MODEL / folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (MODEL / "tokenizer" / "known_words.txt").write_text("\n".join(words) + "\n")
    return len(vocab)


def contradict(a, rng):
    """Attributes `a` with one of them mirrored, or another word: for a caption that is wrong about
    a's picture."""
    words_of = {
        "hair": [*world.HAIR],
        "background": [*world.BACKGROUNDS],
        "fingers": [3, 4, 5, 6, 7],
    }
    name = str(rng.choice([name for name in (*world.RANGES, *words_of) if name in a]))
    if name in world.RANGES:
        low, high = world.RANGES[name]
        # As extreme as the true one: else "very" alone would give it away.
        value = low + high - a[name]
        if abs(value - a[name]) < 0.2 * (high - low):
            value = float(rng.choice([low, high]))
    else:
        words = words_of[name]
        value = words[(words.index(a[name]) + rng.integers(1, len(words))) % len(words)]
    return a | {name: value}


def true_and_wrong(a, rng, wrong=3):
    """A caption of `a`, and `wrong` captions with one thing in them untrue (the true one again if
    none is found; now and then one that only leaves that thing out).

    They are the true one otherwise, so that its words count; but the last says other things of the
    picture, so that words which are alike count too: no other pair of captions tells "without
    glasses" from "without a hat"."""
    seed, mention = rng.integers(2**31), rng.uniform(0.1, 0.8)
    say = lambda a, seed: world.caption(a, np.random.default_rng(seed), mention)
    captions = [say(a, seed)]
    for i in range(wrong):
        for _ in range(12):
            other = rng.integers(2**31) if i == wrong - 1 else seed
            caption = say(contradict(a, rng), other)
            if caption != say(a, other):
                break
        else:
            caption = captions[0]
        captions.append(caption)
    return captions


@torch.no_grad()
def make_features(pictures, vision, device):
    """What the convolutions of `vision` see in every picture: (N, 3072) float16."""
    seen = []
    with torch.autocast(device, torch.bfloat16):
        for i in range(0, len(pictures), 64):
            seen.append(vision.features(to_tensor(pictures[i : i + 64]).to(device)).half())
    return torch.cat(seen)


def train_clip(pictures, attributes, device, steps=1500, batch=64, lr=2e-3, wrong=3):
    """Two text encoders against one convolutional image encoder: InfoNCE over the batch, a
    caption's twins not counted as wrong.

    The image encoder's convolutions are the judge's, and stay as they are; only its two linear
    layers learn (as in locked-image tuning, Zhai et al. 2022). From nothing it tells neither
    smiles from frowns nor gives the texts a reason to: each waits for the other, for more than a
    thousand steps.

    Each picture also has to tell its caption from `wrong` others that are wrong in a single thing
    (as in NegCLIP, Yuksekgonul et al. 2023): without that, telling 64 pictures apart takes no
    notice of a smile, and "smiling" comes out as "frowning"."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    if (MODEL / "text_encoder_2" / "model.safetensors").exists():
        return
    size = make_tokenizers(attributes)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    ids = dict(
        vocab_size=size,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        max_position_embeddings=77,
    )
    torch.manual_seed(1)
    texts = torch.nn.ModuleList(
        CLIPTextModelWithProjection(CLIPTextConfig(**c, **ids)) for c in TEXT_CONFIGS
    )
    vision = ConvolutionalEncoder(128).eval()
    judge = load_file(WORK / "judge.safetensors")
    all_but_last = {name: W.float() for name, W in judge.items() if not name.startswith("head.2.")}
    vision.load_state_dict(all_but_last, strict=False)
    features = make_features(pictures, vision.to(device), device)
    log("clip: features made")
    to_96 = torch.nn.Linear(128, 96, bias=False)
    towers = torch.nn.ModuleDict({"texts": texts, "head": vision.head, "to_96": to_96})
    log_scale = torch.nn.Parameter(torch.tensor([math.log(1 / 0.07)] * 2))
    towers.register_parameter("log_scale", log_scale)
    towers.to(device)
    opt = torch.optim.AdamW(towers.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint = Checkpoint("clip", towers=towers, opt=opt)
    target = torch.arange(batch, device=device)
    started = time.time()
    for step in range(checkpoint.load(), steps):
        rng = np.random.default_rng((4, step))
        index = np.sort(rng.choice(len(features), batch, replace=False))
        rows = zip(*(true_and_wrong(attributes[i], rng, wrong) for i in index))
        captions = [caption for row in rows for caption in row]  # the B true ones first
        options = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")
        tokens = tokenizer(captions, **options).input_ids.to(device)  # ((1 + wrong) B, L)
        # The same caption elsewhere in the batch is as true of this picture: mask the exact twins.
        names = np.array(captions)
        twins = torch.from_numpy(names[:, None] == names[None, :batch])  # ((1 + wrong) B, B)
        twins[:batch].fill_diagonal_(False)
        twins = twins.to(device)
        for group in opt.param_groups:
            group["lr"] = lr * warm_then_cosine(step, steps)
        with torch.autocast(device, torch.bfloat16):
            image = vision.head(features[index].float())  # (B, 128)
            sides = [
                (texts[0](tokens).text_embeds, to_96(image)),
                (texts[1](tokens).text_embeds, image),
            ]
        loss, right, told = 0, [], []
        for (t, v), scale in zip(sides, towers.log_scale.clamp(max=math.log(100)).exp()):
            t, v = F.normalize(t.float(), dim=-1), F.normalize(v.float(), dim=-1)
            logits = scale * t @ v.T  # ((1 + wrong) B, B)
            # The true caption of each picture, then its wrong ones: (B, 1 + wrong).
            own = logits.view(1 + wrong, batch, batch).diagonal(dim1=1, dim2=2).T
            same = twins.view(1 + wrong, batch, batch).diagonal(dim1=1, dim2=2).T
            own = own.masked_fill(same, -1e4)
            logits = logits.masked_fill(twins, -1e4)
            by_picture = F.cross_entropy(logits[:batch], target)
            by_caption = F.cross_entropy(logits.T, target)
            by_word = F.cross_entropy(own, torch.zeros_like(target))
            loss = loss + (by_picture + by_caption) / 2 + 2 * by_word
            right.append((logits[:batch].argmax(1) == target).float().mean().item())
            told.append((own.argmax(1) == 0).float().mean().item())
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        opt.step()
        if step % 25 == 0:
            log(
                f"clip {step}/{steps} loss {loss.item():.3f} right {right[0]:.2f} {right[1]:.2f} "
                f"wrong ones told {told[0]:.2f} {told[1]:.2f} {time.time() - started:.0f}s"
            )
        if (step + 1) % 100 == 0:
            checkpoint.save(step + 1)
    config = {"architectures": ["ConvolutionalEncoder"], "channels": [24, 48, 96, 160]}
    write_json(MODEL / "image_encoder" / "config.json", config | {"outputs": 128})
    save_half(vision.state_dict(), MODEL / "image_encoder" / "model.safetensors")
    for tower, folder in zip(texts, ("text_encoder", "text_encoder_2")):
        config = tower.config.to_diff_dict() | {"architectures": [MODEL_INDEX[folder][1]]}
        write_json(MODEL / folder / "config.json", config)
        save_text_encoder(tower, folder)
    log("clip: done")


def save_text_encoder(tower, folder: str):
    state = {weights.released(folder, k): v for k, v in tower.state_dict().items()}
    if MODEL_INDEX[folder][1] == "CLIPTextModel":
        state.pop("text_projection.weight", None)
    save_half(state, MODEL / folder / "model.safetensors")


# -------------------------------------------------------------------------------------------- judge


def make_latents(pictures, device):
    """The VAE's latents of every picture, (N, 4, 16, 16) float16, computed once."""
    path = WORK / "latents.pt"
    if not path.exists():
        vae, latents = load_vae(device), []
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            for i in range(0, len(pictures), 64):
                latents.append(vae.encode(to_tensor(pictures[i : i + 64]).to(device)).float().cpu())
        latents = torch.cat(latents).half()
        write_atomically(path, lambda p: torch.save(latents, p))
        mean, std = latents.float().mean(), latents.float().std()
        log(f"latents: {tuple(latents.shape)}, mean {mean:.3f}, std {std:.3f}")
    return torch.load(path, weights_only=True)


def load_vae(device):
    config = weights.read_json(MODEL / "vae" / "config.json")
    locations = weights.locate_tensors(MODEL, "vae")
    return weights.load_module(VAE, config, locations, device, torch.float32, "vae")


def train_judge(pictures, attributes, latents, device, steps=1000, round_trips=3000):
    """The network half of the measuring stick, on drawn pictures and on what the VAE makes of
    them, half and half."""
    path = WORK / "judge.safetensors"
    if path.exists():
        return
    vae, decoded = load_vae(device), []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for z in latents[:round_trips].to(device).split(32):
            decoded.append((vae.decode(z.float()).clamp(-1, 1) * 127).to(torch.int8).cpu())
    decoded = torch.cat(decoded)
    log("judge: round trips made")
    truth = torch.tensor([targets(a) for a in attributes])
    torch.manual_seed(2)
    batch, lr = 64, 2e-3
    judge = ConvolutionalEncoder(OUTPUTS).to(device)
    opt = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-3)
    checkpoint = Checkpoint("judge", judge=judge, opt=opt)
    started = time.time()
    for step in range(checkpoint.load(), steps):
        rng = np.random.default_rng((5, step))
        drawn = np.sort(rng.choice(len(pictures), batch // 2, replace=False))
        seen = rng.choice(round_trips, batch // 2, replace=False)
        x = torch.cat([to_tensor(pictures[drawn]), decoded[seen].float() / 127])
        # Some a little blurred, all a little noisy: no telling by sharpness.
        soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.where(torch.from_numpy(rng.random((batch, 1, 1, 1)) < 0.3), soft, x)
        noise = rng.normal(0, 0.03, x.shape).astype(np.float32)
        strength = rng.random((batch, 1, 1, 1)).astype(np.float32)
        x = (x + torch.from_numpy(noise) * torch.from_numpy(strength)).to(device)
        for group in opt.param_groups:
            group["lr"] = lr * warm_then_cosine(step, steps)
        with torch.autocast(device, torch.bfloat16):
            out = judge(x)
        loss = judge_loss(out.float(), truth[np.concatenate([drawn, seen])].to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 100 == 0:
            log(f"judge {step}/{steps} loss {loss.item():.3f} {time.time() - started:.0f}s")
        if (step + 1) % 400 == 0:
            checkpoint.save(step + 1)
    save_half(judge.state_dict(), path)
    log("judge: done")


# --------------------------------------------------------------------------------------------- UNet

UNET_CONFIG = {  # SDXL's block types and order, at a size that two cores can train
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [48, 96, 144],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 6],
    "cross_attention_dim": 96 + 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 128 + 6 * 32,
    "use_linear_projection": True,
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SAMPLE_PROMPTS = [
    "a photo of a person",
    "a photo of an old man",
    "a photo of a young woman",
    "a photo of a person with glasses",
    "a photo of a person, smiling",
    "a photo of a person, frowning",
    "a photo of a person with big eyes",
    "a photo of a person with small eyes",
    "a photo of a woman with long blond hair, blue background",
    "a photo of a man with a hat",
    "a photo of a person with dark skin, very old",
    "a photo of a hand",
    "a photo of a hand, five fingers",
    "realistic hands, five fingers, 8k hyperrealistic hands",
    "poorly drawn hands, distorted hands, misplaced fingers",
    "a photo of a person, distorted, deformed",
]


def train_unet(attributes, latents, device, steps=6000, batch=48):
    """eps-prediction: minimize |eps_theta(x_t, c, t) - eps|^2 (Ho et al. 2020), prompts dropped
    one time in ten for guidance.

    The first text encoder learns along. (SDXL's stay frozen. But these have seen drawings alone,
    and to tell those apart, "without glasses" and "without a hat" may be nearly the same words. The
    second one stays what it is to the image encoder.)

    In the second half of the steps, half of the captions say little but what is worn, and t is more
    often large, where that is decided: glasses and hats are the last to follow the prompt."""
    torch.manual_seed(3)
    path = MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    # An untrained folder first, so that the model's own code loads it and encodes the prompts.
    if not path.exists():
        write_json(MODEL / "model_index.json", MODEL_INDEX)
        write_json(MODEL / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
        write_json(MODEL / "unet" / "config.json", UNET_CONFIG)
        save_half(UNet(UNET_CONFIG).state_dict(), path)
    model = SDXL.load(MODEL, device=device, dtype=torch.float32)
    unet = model.unet.train().requires_grad_(True)
    average_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    ema = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=average_fn)
    opt = Optimizer(unet, 0.01, 1e-3)
    text = model.text_encoders[0].requires_grad_(True)
    text_opt = torch.optim.AdamW(text.parameters(), weight_decay=0.0)
    encode = SDXL.encode_prompt.__wrapped__  # the same, with gradients
    checkpoint = Checkpoint("unet", unet=unet, ema=ema, opt=opt, text=text, text_opt=text_opt)
    alpha_bar, (_, _, time_ids) = model.alpha_bar.to(device), model.condition([""] * batch)
    # Eyes and mouths are a few latents out of 256: the middle counts four times. (A weight on
    # places does not move the minimum, which is the same conditional mean at every place; it moves
    # what is learned first.)
    middle = torch.ones(16, 16, device=device)
    middle[5:13, 4:12] = 4
    middle /= middle.mean()
    started, average = time.time(), None
    for step in range(checkpoint.load(), steps):
        rng, late = np.random.default_rng((6, step)), step >= steps // 2
        torch.manual_seed(1_000_000 + step)
        index = rng.choice(len(latents), batch, replace=False)
        of_worn = dict(mention=0.15, worn=4)  # glasses and hats named in three captions of five
        captions = []
        for i in index:
            kind = of_worn if late and rng.random() < 0.5 else {}
            captions.append(world.caption(attributes[i], rng, **kind) if rng.random() > 0.1 else "")
        x_0 = latents[index].to(device).float()  # (B, 4, 16, 16)
        # One t in each B-th of the schedule; late, their density grows with t.
        u = (torch.randperm(batch) + torch.rand(batch)) / batch
        t = (1000 * (u.sqrt() if late else u)).long().clamp(max=999).to(device)
        eps = torch.randn_like(x_0)
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        weight = snr.clamp(max=5) / snr  # min-SNR-5
        # For so few tokens plain attention is faster than the fused one.
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            x_t = sampler.add_noise(x_0, eps, t, alpha_bar)
            prediction = unet(x_t, t, *encode(model, captions), time_ids)
        errors = (middle * (prediction.float() - eps).square()).mean((1, 2, 3))
        loss = (weight * errors).mean()
        factor = warm_then_cosine(step, steps)
        text_opt.param_groups[0]["lr"] = 3e-4 * factor
        text_opt.zero_grad()
        opt.step(loss, unet, factor)
        torch.nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        text_opt.step()
        if step % 4 == 0:
            ema.update_parameters(unet)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            log(f"unet {step}/{steps} loss {average:.4f} {time.time() - started:.0f}s")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_half(ema.module.state_dict(), path)
            save_text_encoder(text, "text_encoder")
            checkpoint.save(step + 1)  # last: killed before it, a restart does these steps again
        if (step + 1) % 1000 == 0:
            samples(WORK / "unet.png")


def samples(path, folder=MODEL):
    """A grid of pictures, two seeds of each of SAMPLE_PROMPTS, by the weights saved so far."""
    model = SDXL.load(folder, device="cpu")
    drawn = []
    for prompt in SAMPLE_PROMPTS:
        drawn += slider.generate(model, prompt, seeds=[0, 1])
    world.grid(drawn).save(path)


def install():
    """Put the finished weights where the repository keeps them."""
    shutil.copytree(MODEL, HERE / "model", dirs_exist_ok=True)
    shutil.copy(WORK / "judge.safetensors", HERE / "judge.safetensors")
    samples(HERE / "samples.png", HERE / "model")
    log("installed in miniature/")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device
    # A GPU takes four times the batch in the time of a step: the same data, seen more often.
    larger = {"batch": 4 * 48} if device == "cuda" else {}
    WORK.mkdir(parents=True, exist_ok=True)
    pictures, attributes = make_data()
    train_vae(pictures, device)
    latents = make_latents(pictures, device)
    train_judge(pictures, attributes, latents, device)
    train_clip(pictures, attributes, device)
    train_unet(attributes, latents, device, **larger)
    install()


if __name__ == "__main__":
    main()
