"""Find sliders that nobody named:

    python train_space.py --prompt "a photo of a person" --sliders 8 --samples 512

SliderSpace (Gandikota et al. 2025). What does a model vary when the prompt stays the same? It
draws many pictures. Their CLIP features f, of unit length, spread around a mean, and the principal
directions v_1 ... v_k of that spread are what varies most. (By default they are first turned,
within their span, to independent ones: `independent_rotation`.) For each a slider of rank 1 is
trained, so that what it changes in a picture's features points along its direction:

    L  =  1 - cos( f(x_0 with slider i) - f(x_0), v_i ),
    x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

x_0 is the picture that eps predicts from x_t, decoded by the VAE; the gradient goes back through
CLIP, VAE and UNet. x_t and f(x_0) come from the frozen model alone, so a teacher collects them
once, on the way to the very pictures whose spread is looked at. The student (student.fit) trains
all sliders together, another one in each sample of a batch."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import lora
import sampler
from support import cli, clip, cost, distributed, images, inversions, options, probe, training
from support.batches import SPACE, in_batches
from support.checkpoint import RESUME_HINT, open_checkpoint, resume_or_new
from support.sweep import sweep

SCALES = [-2.0, -1.0, 0.0, 1.0, 2.0]  # of the sheet that is drawn at the end
START = 0.0  # --start: much of what varies is decided early, the background first of all
HELD_OUT = 8  # pictures whose x_t only the meter sees

# Defaults: what was measured to work on the miniature; for SDXL's size the published recipe's.
SMALL = dict(layers="noxattn", rank=1, alpha=4.0, lr=2e-3, batch=8, steps=150)
LARGE = dict(layers="xattn", rank=1, alpha=1.0, lr=2e-3, batch=3, steps=3000)


# --------------------------------------------------------------------------------------- teacher


@dataclass
class Samples:
    """n pictures that the frozen model drew, with m of the x_t on the way to each."""

    x_0: torch.Tensor  # (n, 4, h, w)
    x_t: torch.Tensor  # (n, m, 4, h, w)
    t: torch.Tensor  # (n, m)
    prompt: torch.Tensor  # (n,) row of the prompts

    def first(self, n: int) -> "Samples":
        return Samples(self.x_0[:n], self.x_t[:n], self.t[:n], self.prompt[:n])


@torch.no_grad()
def collect(
    model,
    cond,
    uncond,
    *,
    samples: int,
    per_sample: int,
    size,
    seed: int,
    batch: int,
    steps,
    guidance: float,
    start: float,
    remember=None,
) -> Samples:
    """Draw `samples` pictures, the prompts (rows of cond) in turn, and keep `per_sample` x_t of
    each, evenly spread over the steps in which sliders are on. batch, remember: as in
    support/batches.py. ValueError for more x_t than there are such steps."""
    first, count = sampler.steps_before(start, steps), len(sampler.timesteps(steps))
    keep = [first + int(i * (count - first) / per_sample) for i in range(per_sample)]  # which steps
    if len(set(keep)) < per_sample:
        on = f"sliders are on in only {count - first} of the {count} denoising steps"
        raise ValueError(f"--per-sample {per_sample}: {on}")

    def draw(rows):
        kept, prompt = [], rows % len(cond[0])

        def on_step(i, t, x_t, eps_c):
            if i in keep:
                kept.append((x_t, torch.full((len(x_t),), t)))

        shape, seeds = model.latent_shape(size), (seed * 1_000_000 + rows).tolist()
        x_T = sampler.noise(seeds, shape, model.device, model.dtype)
        c = tuple(part[prompt.to(model.device)] for part in cond)
        settings = dict(alpha_bar=model.alpha_bar, steps=steps, guidance=guidance)
        x_0 = sampler.sample(model.unet, x_T, c, uncond, on_step=on_step, **settings)
        x_t, t = (torch.stack(part, 1) for part in zip(*kept))  # (b, m, 4, h, w), (b, m)
        return {"x_0": x_0, "x_t": x_t, "t": t, "prompt": prompt}

    common = dict(remember=remember, desc="samples", device=model.device)
    return Samples(**in_batches(draw, samples, batch, **common))


def directions(f, k: int, independent: bool = False):
    """Directions in which features f (n, d) spread: v (k, d), of unit length; their standard
    deviations (k,); their shares of the whole variance (k,). Each points where its skewness is
    positive, so that a rerun has no other signs.

    The k principal directions, as the paper has it. With `independent` they are turned, within
    their span, to those along which the pictures vary independently; no longer orthogonal."""
    centred = (f - f.mean(0)).cpu().double()  # not every device has float64
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    sigma_v = S[:k, None] / (len(f) - 1) ** 0.5 * Vh[:k]  # (k, d), rows sigma_i v_i
    if independent:  # centred @ pinv: the pictures' coordinates (n, k), whitened
        sigma_v = independent_rotation(centred @ torch.linalg.pinv(sigma_v)) @ sigma_v
        sigma_v = sigma_v[sigma_v.norm(dim=1).argsort(descending=True)]
    skewness = (centred @ torch.linalg.pinv(sigma_v)).pow(3).sum(0)
    sigma_v = sigma_v * torch.sign(skewness)[:, None]
    sigma = sigma_v.norm(dim=1)
    share = sigma.square() * (len(f) - 1) / S.square().sum()
    return tuple(x.float().to(f.device) for x in (sigma_v / sigma[:, None], sigma, share))


def independent_rotation(z, rounds: int = 200):
    """The rotation R (k, k) that makes each column of z R^T as unlike a normal distribution as it
    can be, for z (n, k) of unit variance and uncorrelated: independent component analysis, FastICA
    with the kurtosis (Hyvarinen 1999, eq. (20)).

    Why: PCA cannot tell apart directions of like variance, and returns any mixture of them, such as
    "smiling with dark skin". A mixture of independent causes is nearer to normal than they are."""
    k, g = z.shape[1], torch.Generator().manual_seed(0)
    R, _ = torch.linalg.qr(torch.randn(k, k, generator=g, dtype=z.dtype))
    for _ in range(rounds):
        steps = ((z @ R.T) ** 3).T @ z / len(z) - 3 * R  # rows toward a larger |kurtosis|
        U, _, Vh = torch.linalg.svd(steps)
        R = U @ Vh  # the nearest orthogonal matrix ("symmetric decorrelation")
    return R


# --------------------------------------------------------------------------------------- student


class Space:
    """The loss and the meter of SliderSpace. `bank`: k sliders of rank r as one lora.Slider of rank
    k r. A row is an x_t, a direction and a sign; the last HELD_OUT pictures are the meter's."""

    def __init__(self, model, encoder, samples, cond, uncond, v, *, rank, guidance, batch):
        self.model, self.encoder, self.cond, self.uncond = model, encoder, cond, uncond
        self.v, self.rank, self.guidance = v, rank, guidance
        self.k, self.m = len(v), samples.x_t.shape[1]
        self.x_t, self.t = samples.x_t.flatten(0, 1), samples.t.flatten(0, 1)  # (N, 4, h, w), (N,)
        self.prompt = samples.prompt.repeat_interleave(self.m)
        self.alpha_bar = model.alpha_bar.to(self.x_t.device)
        self.n = len(self.x_t) - HELD_OUT * self.m  # x_t to train on
        with torch.no_grad():
            see = lambda rows: {"f": clip.features(model, encoder, self.predict_x_0(rows))}
            self.f_0 = in_batches(see, len(self.x_t), batch, desc="teacher")["f"]  # (N, d)

    def __len__(self):
        return 2 * self.k * self.n  # every x_t with every direction, either way

    def predict_x_0(self, rows):
        """The latents x_0 (b, 4, h, w) that the UNet, as it is now, predicts from x_t[rows]."""
        x_t, t = self.x_t[rows], self.t[rows]
        c = tuple(part[self.prompt[rows]] for part in self.cond)
        u = sampler.expand(self.uncond, len(x_t))
        eps, _ = sampler.guided_eps(self.model.unet, x_t, t, c, u, self.guidance)
        a_t = self.alpha_bar[t].view(-1, 1, 1, 1)
        x_t, eps = sampler.at_least_float32(x_t), sampler.at_least_float32(eps)
        return sampler.implied_x_0(x_t, eps, a_t)

    def change(self, bank, sign, i, row):
        """What slider i (b,), at scale sign (b,), changes in the features of x_t[row], row (b,):
        (b, d); and where it should go: (b, d)."""
        i, sign = i.to(self.v.device), sign.to(self.v)
        scale = (i[:, None] == torch.arange(self.k, device=i.device)) * sign[:, None]  # (b, k)
        scale = scale.repeat_interleave(self.rank, 1)  # (b, k r): one for each rank
        bank.scale = scale if self.guidance == 1 else torch.cat([scale, scale])
        f = clip.features(self.model, self.encoder, self.predict_x_0(row))
        return f - self.f_0[row], sign[:, None] * self.v[i]

    def loss(self, bank, rows):
        """1 - cos(f - f_0, +-v_i), (b,), for rows (b,) = (negative * k + i) * n + x_row."""
        x_row, i, negative = rows % self.n, rows // self.n % self.k, rows // self.n // self.k
        made, wanted = self.change(bank, 1.0 - 2.0 * negative, i, x_row)
        # An untrained slider changes nothing but by rounding. The floor under lengths keeps the
        # first steps from following it.
        return 1 - F.cosine_similarity(made, wanted, dim=-1, eps=1e-3)

    @torch.no_grad()
    def meter(self, bank, batch: int) -> dict:
        """On one x_t of each held-out picture, steps in turn: the mean cosine of each slider's
        change with its direction; "share", how far it goes along it; features have length 1."""
        x_rows = torch.tensor([self.n + p * self.m + p % self.m for p in range(HELD_OUT)])
        every = torch.cartesian_prod(torch.tensor([1, -1]), torch.arange(self.k), x_rows)
        with bank.at(0.0):  # every: rows (sign, i, x_row)
            pairs = [self.change(bank, *rows.T) for rows in every.split(batch)]
        made, wanted = (torch.cat(part) for part in zip(*pairs))
        cosine = F.cosine_similarity(made, wanted, dim=-1).view(2, self.k, HELD_OUT).mean((0, 2))
        share = (made * wanted).sum(-1).mean().item()
        return {"cosine": cosine.mean().item(), "cosines": cosine.tolist(), "share": share}


def learn(
    model, encoder, samples, cond, uncond, v, *, layers, rank, alpha, guidance, batch, **settings
) -> tuple[list[lora.Slider], dict]:
    """A slider of `rank` for each direction v (k, d), all trained together, and the final meter.
    settings: steps, lr, seed, checkpoint of training.train."""
    k, common = len(v), dict(rank=rank, guidance=guidance, batch=4 * batch)
    space = Space(model, encoder, samples, cond, uncond, v, **common)
    torch.manual_seed(settings["seed"])
    # (alpha k) / (rank k) = alpha / rank: in the bank each slider has the factor it was asked for.
    bank = lora.Slider(layers, rank * k, alpha * k).to(model.device).attach(model.unet)
    loss, meter = lambda rows: space.loss(bank, rows), lambda: space.meter(bank, 4 * batch)
    reading = training.train(bank, loss, len(space), meter, batch=batch, **settings)
    bank.detach()
    return split(bank, layers, k, rank, alpha), reading


def split(bank: lora.Slider, layers, k: int, rank: int, alpha: float) -> list[lora.Slider]:
    """The k sliders that `bank` is made of."""
    sliders = [lora.Slider(layers, rank, alpha) for _ in range(k)]
    for i, slider in enumerate(sliders):
        rows = slice(i * rank, (i + 1) * rank)
        for part, one in zip(bank.children(), slider.children()):
            one.lora_down.weight.data = part.lora_down.weight.detach()[rows].clone()
            one.lora_up.weight.data = part.lora_up.weight.detach()[:, rows].clone()
    return [slider.requires_grad_(False) for slider in sliders]


@torch.no_grad()
def calibrate(model, encoder, slider, v, sigma: float, cond, uncond, *, size, seeds=4, **settings):
    """How far a slider goes is what the loss leaves open. Make it so strong that scale 2 moves
    drawn pictures by one standard deviation sigma along v, or as far as it goes along v at all.
    False, and the slider as it was, if pictures do not move along v at any scale. settings:
    `sweep`'s."""
    tried = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    x_T = sampler.noise(range(seeds), model.latent_shape(size), model.device, model.dtype)
    columns = [[(slider, sign * s)] for sign in (-1, 1) for s in tried]
    drawn = sweep(model.unet, x_T, cond, uncond, columns, alpha_bar=model.alpha_bar, **settings)
    f = {i: clip.features(model, encoder, x_0).mean(0) for i, x_0 in drawn}
    negative, positive = torch.stack([f[i] for i in sorted(f)]).view(2, len(tried), -1)
    change = positive - negative  # (scales, d)
    intact = F.cosine_similarity(change, v[None], dim=1) > 0.3  # beyond, pictures break down
    moved = [0.0, *torch.where(intact, (change @ v) / 2, 0.0).tolist()]  # / 2: -s to s is twice s
    if max(moved) == 0:
        return False
    scale = float(np.interp(sigma, np.maximum.accumulate(moved), [0.0, *tried]))  # moves by sigma
    if max(moved) < sigma:
        scale = tried[moved.index(max(moved)) - 1]  # moves farthest
    for part in slider.children():  # what `scale` did, scale 2 is to do
        part.alpha *= scale / 2
    return True


# ---------------------------------------------------------------------------------- command line


def main():
    args = options.space(__doc__, SMALL, LARGE, START, HELD_OUT)
    out, started = Path(args.out), time.time()
    checkpoint = open_checkpoint(args, cli.output_file(out / "space.json"))
    model = cli.load_model(args)
    encoder, encode = clip.towers(args.clip, model)
    size = training.prepare(args, model, training.recipe(model.unet, SMALL, LARGE), SPACE)
    training.set_checkpointing(model.vae, args.checkpointing)
    layers = training.layers_of_bank(args, model)
    cond, uncond = model.condition(args.prompt, size), model.condition([""], size)
    words = clip.words_of(model, args.words)

    # The samples outlive the training: other directions can be learned from them.
    names = "denoising_steps dtype guidance merge model per_sample prediction prompt seed size"
    drawn_with = {name: getattr(args, name) for name in [*names.split(), "start"]}
    drawn_with["weights"] = inversions.cache_key(model, cond[0])
    kept = resume_or_new(out / "samples", drawn_with)
    batch = 4 * args.batch
    steps = sampler.timesteps(args.denoising_steps, spacing=model.spacing)
    drawing = dict(steps=steps, guidance=args.guidance, start=args.start, batch=batch)
    settings = dict(samples=args.samples, per_sample=args.per_sample, seed=args.seed)
    samples = collect(model, cond, uncond, size=size, remember=kept.remember, **settings, **drawing)
    with torch.no_grad():
        see = lambda rows: {"f": clip.features(model, encoder, samples.x_0[rows])}
        f = in_batches(see, args.samples, batch, desc="features")["f"]  # (samples, d)
    v, sigma, share = directions(f, args.sliders, not args.principal)
    hints = clip.name_directions(encode, args.prompt[0], words, v)
    print(f"{args.sliders} directions hold {share.sum():.0%} of the features' variance")

    model.release(vae=False)
    names = ("rank", "alpha", "steps", "batch", "lr", "seed")
    settings = {name: getattr(args, name) for name in names} | dict(guidance=args.train_guidance)
    settings |= dict(layers=layers, checkpoint=checkpoint)
    trained_on = samples.first(args.train_samples)
    made, reading = learn(model, encoder, trained_on, cond, uncond, v, **settings)
    if not distributed.is_main_process():
        return

    found, rows, one_prompt = [], [], tuple(c[:1] for c in cond)
    x_T = sampler.noise([0], model.latent_shape(size), model.device, model.dtype)
    for i, slider in enumerate(made):
        path, cosine, sigma_i = out / f"{i + 1}.safetensors", reading["cosines"][i], sigma[i].item()
        direction = (slider, v[i], sigma_i, one_prompt, uncond)
        if not args.raw_scale and not calibrate(model, encoder, *direction, size=size, **drawing):
            why = "What it stands for may be decided before --start."
            print(f"WARNING: {i + 1}: pictures do not move along it at any scale. {why}")
        about = {"kind": "space slider", "prompt": args.prompt, "direction": i + 1}
        about |= {"share": share[i].item(), "sigma": sigma_i, "cosine": cosine}
        about |= {"words": hints[i]} | training.provenance(args, model.prediction)
        lora.save(path, slider, about | {"v": v[i].tolist()})
        found.append(about)
        in_file = lora.load(path, model.unet)
        row = probe.draw_scales(model, in_file, one_prompt, uncond, x_T, SCALES, **drawing)
        rows.append([column[0] for column in row])
        described = f"cosine {cosine:.2f}; words, as a hint: {'; '.join(hints[i])}"
        print(f"{i + 1}: {share[i]:.1%} of the variance, {described}")
    training.remove_beyond(out, len(made))
    cli.write_text(out / "space.json", json.dumps(found, indent=1))
    names, numbers = [images.scale_label(s) for s in SCALES], [str(i + 1) for i in range(len(rows))]
    images.save_image(images.contact_sheet(rows, names, numbers), out / "sheet.png")
    checkpoint.remove()
    memory = f"peak memory {cost.peak_memory(model.device) / 2**30:.1f} GiB"
    print(f"{out}: {len(made)} sliders and sheet.png after {time.time() - started:.0f} s; {memory}")
    levels = ",".join(map(str, np.atleast_1d(args.denoising_steps)))
    how = f"--each --start {args.start:g} --guidance {args.guidance:g} --steps {levels}"
    print(f"To look: python slider.py --prompt ... --slider {out} {how}{cli.model_options(args)}")


if __name__ == "__main__":
    cli.run(main, RESUME_HINT)
