"""Find sliders that nobody named:  python train_space.py --prompt "a photo of a person" --sliders 8 --samples 512

SliderSpace (Gandikota et al. 2025). What does a model vary when the prompt stays the same? It draws many pictures; their CLIP
features f, of unit length, spread around a mean, and the principal directions v_1 ... v_k of that spread are what varies most.
(By default they are first turned, within their span, to independent ones, spread.turned; --principal leaves them as they are.)
For each a slider of rank 1 is trained, so that what it changes in a picture's features points along its direction:

    L  =  1 - cos( f(x_0 with slider i) - f(x_0), v_i )         x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

x_0 is the picture that eps predicts from x_t, decoded by the VAE; the gradient goes back through CLIP, VAE and UNet. x_t and
f(x_0) come from the frozen model alone, so a teacher collects them once, on the way to the very pictures whose spread is looked
at; the student (student.loop) trains all sliders together, another one in each sample of a batch.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
import lora
import parallel
import pictures
import sampler
import spread
import student
import training
import unfinished
from sdxl_unet import checkpointing
from unfinished import Unfinished

SCALES = [-2.0, -1.0, 0.0, 1.0, 2.0]
START = 0.0  # share of the denoising after which the sliders are on: much of what varies is decided early, the background first of all
HELD_OUT = 8  # pictures whose x_t only the meter sees


# ---------------------------------------------------------------------------------------------- teacher


@dataclass
class Samples:
    """n pictures that the frozen model drew, with m of the x_t on the way to each."""

    x_0: torch.Tensor  # (n, 4, h, w)
    x_t: torch.Tensor  # (n, m, 4, h, w)
    t: torch.Tensor  # (n, m)
    prompt: torch.Tensor  # (n,): row of the prompts

    def first(self, n: int) -> "Samples":
        return Samples(self.x_0[:n], self.x_t[:n], self.t[:n], self.prompt[:n])


@torch.no_grad()
def collect(
    model, cond, uncond, kept: Unfinished, *, samples: int, per_sample: int, size, seed: int, batch: int, steps, guidance: float, start: float
) -> Samples:
    """Draw `samples` pictures, the prompts (rows of cond) in turn, keeping `per_sample` x_t of each, evenly spread over the steps
    in which sliders are on. Each batch is kept in `kept` once it is done: a run that was stopped goes on."""
    first, count = sampler.steps_before(start, steps), len(sampler.timesteps(steps))
    keep = [first + int(i * (count - first) / per_sample) for i in range(per_sample)]  # the first of them too: backgrounds are decided there
    if len(set(keep)) < per_sample:
        raise ValueError(f"--per-sample {per_sample}: sliders are on in only {count - first} of the {count} denoising steps")

    def way(seeds, prompt):
        kept = []

        def on_step(j, t, x_t, eps_c):
            if j in keep:
                kept.append((x_t, torch.full((len(x_t),), t)))

        x_T = sampler.noise(seeds, model.latent_shape(size), model.device, model.dtype)
        x_0 = sampler.sample(
            model.unet, x_T, tuple(c[prompt.to(model.device)] for c in cond), uncond, alpha_bar=model.alpha_bar, steps=steps, guidance=guidance, on_step=on_step
        )
        x_t, t = (torch.stack(part, 1) for part in zip(*kept))  # (b, m, 4, h, w), (b, m)
        return {"x_0": x_0, "x_t": x_t, "t": t, "prompt": prompt}

    parts, every = [], torch.arange(samples).split(batch)
    for some in tqdm(parallel.mine(every), unit="batch", desc="samples"):
        seeds = (seed * 1_000_000 + some).tolist()
        parts.append(kept.part(f"{seeds[0]}-{seeds[-1]}", lambda: way(seeds, some % len(cond[0]))))
    parts = parallel.gather(parts, len(every))
    return Samples(*(torch.cat([p[name] for p in parts]).to(model.device) for name in ("x_0", "x_t", "t", "prompt")))


@torch.no_grad()
def of_all(n: int, batch: int, make, desc: str):
    """make(rows) of the rows 0 ... n - 1, a batch at a time, of several processes each its share: (n, ...)."""
    return parallel.gather(torch.cat([make(rows) for rows in tqdm(parallel.mine(torch.arange(n)).split(batch), unit="batch", desc=desc)]), n)


# ---------------------------------------------------------------------------------------------- student


class Space:
    """k sliders of rank r as one lora.Slider of rank k r, and what they are trained on: row number -> (x_t, direction, sign). The last
    HELD_OUT pictures' x_t are the meter's alone."""

    def __init__(self, model, clip, samples: Samples, cond, uncond, v, *, rank: int, guidance: float, batch: int):
        self.model, self.clip, self.cond, self.uncond, self.v, self.rank, self.guidance = model, clip, cond, uncond, v, rank, guidance
        self.x_t, self.t = samples.x_t.flatten(0, 1), samples.t.flatten(0, 1)  # (N, 4, h, w), (N,)
        self.prompt = samples.prompt.repeat_interleave(samples.x_t.shape[1])
        self.k, self.m = len(v), samples.x_t.shape[1]
        self.n = len(self.x_t) - HELD_OUT * self.m  # x_t to train on
        self.f_0 = of_all(len(self.x_t), batch, lambda rows: spread.features(model, clip, self.predicted(rows)), "teacher")  # (N, d)

    def __len__(self):
        return 2 * self.k * self.n  # every x_t with every direction, either way

    def predicted(self, rows):
        """The latents x_0 (b, 4, h, w) that the UNet, as it is now, predicts from x_t[rows]."""
        x_t, t = self.x_t[rows], self.t[rows]
        c = tuple(part[self.prompt[rows]] for part in self.cond)
        eps, _ = sampler.guided_eps(self.model.unet, x_t, t, c, sampler.rows(self.uncond, len(x_t)), self.guidance)
        return sampler.implied_x_0(sampler.precise(x_t), sampler.precise(eps), self.model.alpha_bar.to(x_t.device)[t].view(-1, 1, 1, 1))

    def change(self, slider, x, i, sign):
        """What slider i (b,), turned by sign (b,), changes in the features of x_t number x (b,): (b, d); where it should go: (b, d)."""
        each = torch.zeros(len(x), self.k, device=self.x_t.device)
        each[torch.arange(len(x)), i] = sign.to(each)
        each = each.repeat_interleave(self.rank, 1)
        slider.scale = each if self.guidance == 1 else torch.cat([each, each])
        f = spread.features(self.model, self.clip, self.predicted(x))
        return f - self.f_0[x], sign.to(f)[:, None] * self.v[i]

    def loss(self, slider, rows):
        x, i, way = rows % self.n, rows // self.n % self.k, rows // self.n // self.k
        # An untrained slider changes nothing but by rounding, whose direction the first steps would follow: hence the floor under lengths.
        return 1 - F.cosine_similarity(*self.change(slider, x, i, 1.0 - 2.0 * way), dim=-1, eps=1e-3)

    @torch.no_grad()
    def meter(self, slider, batch: int) -> dict:
        """On the x_t held out: the mean cosine of each slider's change with its direction; share: the mean way along it, in units
        of the features' own length."""
        x = torch.tensor([self.n + i * self.m + i % self.m for i in range(HELD_OUT)])  # one x_t of each picture, of all levels alike
        every = torch.cartesian_prod(torch.tensor([1, -1]), torch.arange(self.k), x)  # (2 k HELD_OUT, 3)
        with slider.at(0.0):
            change, goal = (torch.cat(part) for part in zip(*(self.change(slider, x, i, sign) for sign, i, x in (part.T for part in every.split(batch)))))
        cosine = F.cosine_similarity(change, goal, dim=-1).view(2, self.k, HELD_OUT).mean((0, 2))
        return {"cosine": cosine.mean().item(), "cosines": cosine.tolist(), "share": (change * goal).sum(-1).mean().item()}


def split(bank: lora.Slider, layers, k: int, rank: int, alpha: float) -> list[lora.Slider]:
    """The k sliders that `bank` is made of."""
    out = []
    for i in range(k):
        one, rows = lora.Slider(layers, rank, alpha), slice(i * rank, (i + 1) * rank)
        for (_, part), (_, low) in zip(bank.named_children(), one.named_children()):
            low.lora_down.weight.data, low.lora_up.weight.data = part.lora_down.weight.detach()[rows].clone(), part.lora_up.weight.detach()[:, rows].clone()
        out.append(one.requires_grad_(False))
    return out


def learn(
    model,
    clip,
    samples: Samples,
    cond,
    uncond,
    v,
    *,
    layers,
    rank: int,
    alpha: float,
    guidance: float,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    kept=unfinished.NOTHING,
) -> tuple[list[lora.Slider], dict]:
    """A slider of `rank` for each direction v (k, d), all trained together, and the final meter."""
    space = Space(model, clip, samples, cond, uncond, v, rank=rank, guidance=guidance, batch=4 * batch)
    torch.manual_seed(seed)
    bank = lora.Slider(layers, rank * len(v), alpha * len(v)).to(model.device).attach(model.unet)  # alpha / rank of each is what was asked for
    reading = student.loop(
        bank,
        len(space),
        lambda rows: space.loss(bank, rows),
        lambda: space.meter(bank, 4 * batch),
        steps=steps,
        batch=batch,
        lr=lr,
        seed=seed,
        meter_every=training.METER_EVERY,
        kept=kept,
    )
    bank.detach()
    return split(bank, layers, len(v), rank, alpha), reading


@torch.no_grad()
def calibrate(model, clip, slider, v, sigma: float, cond, uncond, *, size, batch: int, seeds: int = 4, **settings) -> bool:
    """Make the slider so strong that scale 2 moves drawn pictures by one standard deviation sigma along v, or as far as it goes along v at
    all: what the loss leaves open is how far. False, and the slider as it was, if drawn pictures do not move along v at any scale."""
    tried = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    x_T = sampler.noise(range(seeds), model.latent_shape(size), model.device, model.dtype)
    columns = [[(slider, sign * s)] for sign in (-1, 1) for s in tried]
    drawn = dict(sampler.sweep(model.unet, x_T, cond, uncond, columns, alpha_bar=model.alpha_bar, batch=batch, **settings))
    f = torch.stack([spread.features(model, clip, drawn[i]).mean(0) for i in range(len(columns))]).view(2, len(tried), -1)
    change = f[1] - f[0]  # (scales, d), from one end to the other
    along = F.cosine_similarity(change, v[None], dim=1) > 0.3  # beyond, pictures break down
    way = [0.0, *torch.where(along, (change @ v) / 2, 0.0).tolist()]
    if max(way) == 0:
        return False
    factor = float(np.interp(sigma, np.maximum.accumulate(way), [0.0, *tried])) / 2
    if max(way) < sigma:
        factor = tried[way.index(max(way)) - 1] / 2
    for _, part in slider.named_children():
        part.alpha *= factor
        part.factor *= factor
    return True


# ---------------------------------------------------------------------------------------------- command line


# Defaults: what was measured to work on the miniature; of SDXL's size the published recipe's (rank 1, cross-attention alone).
SMALL = dict(layers="noxattn", rank=1, alpha=4.0, lr=2e-3, batch=8, steps=150)
LARGE = dict(layers="xattn", rank=1, alpha=1.0, lr=2e-3, batch=3, steps=3000)


def parse_args():
    p = cli.parser(__doc__)
    p.add_argument("--prompt", action="append", required=True, help="what is varied; may be repeated: samples take them in turn")
    p.add_argument("--sliders", type=int, default=8, help="directions, a slider each (default: %(default)s)")
    p.add_argument("--samples", type=int, default=512, help="pictures whose spread is looked at (default: %(default)s)")
    p.add_argument("--train-samples", type=int, default=128, help="of them, pictures whose x_t are trained on (default: %(default)s)")
    p.add_argument("--per-sample", type=int, default=5, help="x_t kept from each (default: %(default)s)")
    p.add_argument("--clip", help="CLIP, a folder or Hub id (default: the miniature's own, for the miniature)")
    p.add_argument("--principal", action="store_true", help="principal directions as they are, as the paper has it, not turned to independent ones")
    p.add_argument("--words", help="file of words, one a line, to name directions with (default: the miniature's words; a short list)")
    p.add_argument(
        "--denoising-steps", type=cli.steps, default=20, help="their number (default: %(default)s), or the levels of a distilled model: 999,749,499,249"
    )
    p.add_argument("--guidance", type=cli.guidance, default=5.0, help="while drawing; 1 for a distilled model (default: %(default)s)")
    p.add_argument("--train-guidance", type=cli.guidance, default=1.0, help="in the predicted x_0 (default: %(default)s)")
    p.add_argument(
        "--start",
        type=cli.share,
        default=START,
        help="share of the denoising after which the sliders are on, in training too; 0 for a distilled model (default: %(default)s)",
    )
    p.add_argument("--raw-scale", action="store_true", help="leave the sliders as strong as they come: scale 2 is then no standard deviation")
    training.add_options(p, SMALL, LARGE, out="space", what="folder to write")
    p.set_defaults(dry_run=False)
    return p.parse_args()


def main():
    args = parse_args()
    training.check_numbers(args, "sliders", "samples", "train_samples", "per_sample")
    if min(args.samples, args.train_samples) <= HELD_OUT:
        raise ValueError(f"--train-samples {min(args.samples, args.train_samples)}: more than {HELD_OUT} are needed, {HELD_OUT} of them for the meter alone")
    if args.samples <= args.sliders:
        raise ValueError(f"--samples {args.samples}: more pictures than --sliders {args.sliders} are needed")
    out, started = Path(args.out), time.time()
    kept = unfinished.begin(args, cli.output(out / "space.json"))
    model = cli.load_model(args)
    clip, encode = spread.towers(args, model)
    size = training.start(args, model, training.recipe(model.unet, SMALL, LARGE))
    checkpointing(model.vae, args.checkpointing)
    cond, uncond = model.condition(args.prompt, size), model.condition([""], size)
    words = [w.strip() for w in Path(args.words).read_text().splitlines() if w.strip()] if args.words else spread.words_of(model)
    batch = 4 * args.batch

    settings = dict(steps=args.denoising_steps, guidance=args.guidance, start=args.start)
    drawn = {k: getattr(args, k) for k in ("model", "base", "merge", "dtype", "prompt", "per_sample", "denoising_steps", "guidance", "start", "size", "seed")}
    samples = collect(
        model,
        cond,
        uncond,
        unfinished.same(out / "samples", drawn),
        samples=args.samples,
        per_sample=args.per_sample,
        size=size,
        seed=args.seed,
        batch=batch,
        **settings,
    )
    f = of_all(args.samples, batch, lambda rows: spread.features(model, clip, samples.x_0[rows]), "features")
    v, sigma, share = spread.directions(f, args.sliders, not args.principal)
    hints = spread.names(encode, args.prompt[0], words, v)
    print(f"{args.sliders} directions hold {share.sum():.0%} of the variance of {args.samples} pictures' features")

    model.release(vae=False)
    layers = lora.target_layers(model.unet, args.layers, not args.no_conv)
    made, reading = learn(
        model,
        clip,
        samples.first(args.train_samples),
        cond,
        uncond,
        v,
        layers=layers,
        rank=args.rank,
        alpha=args.alpha,
        guidance=args.train_guidance,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        kept=kept,
    )
    if not parallel.is_first():
        return
    found, one_prompt = [], tuple(c[:1] for c in cond)
    for i, slider in enumerate(made):
        sigma_i = sigma[i].item()
        if not args.raw_scale and not calibrate(model, clip, slider, v[i], sigma_i, one_prompt, uncond, size=size, batch=batch, **settings):
            print(f"WARNING: {i + 1}: drawn pictures do not move along this direction, at no scale. What it stands for may be decided before --start.")
        about = {
            "kind": "space slider",
            "prompt": args.prompt,
            "direction": i + 1,
            "share": share[i].item(),
            "sigma": sigma_i,
            "cosine": reading["cosines"][i],
            "words": hints[i],
            "settings": training.settings(args),
        }
        lora.save(out / f"{i + 1}.safetensors", slider, about | {"v": v[i].tolist()})
        found.append(about)
        print(f"{i + 1}: {share[i]:.1%} of the variance, cosine {reading['cosines'][i]:.2f}; words, as a hint: {'; '.join(hints[i])}")
    cli.write_text(out / "space.json", json.dumps(found, indent=1))
    kept.remove()
    drawn_sheet(model, out, one_prompt, uncond, size, args, batch, settings)
    levels = ",".join(map(str, np.atleast_1d(args.denoising_steps)))
    print(
        f"{out}: {args.sliders} sliders and sheet.png, after {time.time() - started:.0f} s; peak memory {training.peak_memory(model.device) / 2**30:.1f} GiB; "
        f"slider.py --prompt ... --slider {out} --each --start {args.start:g} --guidance {args.guidance:g} --steps {levels}{cli.model_words(args)} draws with them"
    )


def drawn_sheet(model, out: Path, cond, uncond, size, args, batch, settings):
    """sheet.png: a row for each direction, the same seed at SCALES."""
    x_T = sampler.noise([0], model.latent_shape(size), model.device, model.dtype)
    rows = []
    for i in range(args.sliders):
        one = lora.load(out / f"{i + 1}.safetensors", model.unet)
        columns = dict(sampler.sweep(model.unet, x_T, cond, uncond, [[(one, s)] for s in SCALES], alpha_bar=model.alpha_bar, batch=batch, **settings))
        rows.append([model.pictures(columns[j])[0] for j in range(len(SCALES))])
    pictures.save(pictures.sheet(rows, [pictures.label(s) for s in SCALES], [str(i + 1) for i in range(args.sliders)]), out / "sheet.png")


if __name__ == "__main__":
    cli.run(main, unfinished.HINT)
