"""Train a text slider:

    python train_text.py --pos "a photo of a person, very old" \\
        --neg "a photo of a person, very young"

The paper's eq. (8). With theta the frozen model, theta* the model with the slider, and P the
preserved concepts,

    eps_theta*(x_t, c_t, t)  <-  eps_theta(x_t, c_t, t)
        + eta * mean_{p in P} ( eps_theta(x_t, (c+, p), t) - eps_theta(x_t, (c-, p), t) )

(The paper writes a sum over P. The mean keeps eta's meaning whatever the size of P. Its code draws
one p for each step, and puts that p into c_t as well.) x_t comes from partially denoising noise
with the frozen model, so nothing on the right depends on what is trained: the teacher below
collects it once, and the student (student.py) fits it. (The paper's code denoises with the slider
on, so it has to walk from noise to x_t and predict the right-hand side anew for every step.)"""

import time

import torch
from tqdm import tqdm

import sampler
from student import Targets
from support import cli, cost, options, training
from support.batches import in_batches
from support.checkpoint import RESUME_HINT, open_checkpoint


def encode(model, target_prompts: list[str], pos: str, neg: str, preserve: list[str], size):
    """The prompts of eq. (8) as three conditionings, each a tuple (context, pooled, time_ids): c_t
    (m rows); the ends, (c+, p) for each p, then (c-, p) for each p (2|P| rows, 2 where P is
    empty); the empty prompt (1 row)."""
    ends = [f"{end}, {p}" if p else end for end in (pos, neg) for p in preserve or [""]]
    return tuple(model.condition(prompts, size) for prompts in (target_prompts, ends, [""]))


def ends_difference(unet, x_t, t, ends):
    """mean_{p in P} ( eps(x_t, (c+, p), t) - eps(x_t, (c-, p), t) ): (B, 4, h, w), float32.

    x_t (B, 4, h, w), t (B,). ends: from `encode`, 2|P| rows."""
    n, difference = len(ends[0]) // 2, 0.0  # n = |P|
    both_x_t, both_t = x_t.repeat(2, 1, 1, 1), t.repeat(2)  # once for c+, once for c-
    for p in range(n):  # one at a time: memory does not grow with |P|
        rows = [p] * len(x_t) + [n + p] * len(x_t)  # of `ends`: (c+, p) B times, (c-, p) B times
        eps = unet(both_x_t, both_t, *(part[rows] for part in ends)).float()  # (2 B, 4, h, w)
        eps_pos, eps_neg = eps.chunk(2)
        difference = difference + (eps_pos - eps_neg) / n
    return difference


def denoise(model, seeds, cond, uncond, keep, *, size, denoising_steps, guidance):
    """Where x_t comes from: b noises denoised by the frozen model, without any slider.

    cond: (b, ...) each. keep: (b, k), the steps at which x_t is kept. Returns x_t (b, k, 4, h, w),
    t (b, k) and eps_0 (b, k, 4, h, w), the prediction for c_t: guidance needs it in any case."""
    x_T = sampler.noise(seeds, model.latent_shape(size), model.device, model.dtype)
    visited = []
    bar = tqdm(total=denoising_steps, unit="step", desc="trajectories")

    def on_step(i, t, x_t, eps_c):
        visited.append((x_t, eps_c))
        bar.update()

    ts = sampler.timesteps(denoising_steps, spacing=model.spacing)
    settings = dict(alpha_bar=model.alpha_bar, steps=ts, guidance=guidance)
    sampler.sample(model.unet, x_T, cond, uncond, on_step=on_step, **settings)
    bar.close()
    x_t, eps_0 = (torch.stack(part, 1) for part in zip(*visited))  # (b, denoising_steps, 4, h, w)
    rows = torch.arange(len(keep))[:, None]
    return {"x_t": x_t[rows, keep], "t": torch.tensor(ts)[keep], "eps_0": eps_0[rows, keep]}


@torch.no_grad()
def collect(
    model,
    prompts,
    *,
    eta: float,
    trajectories: int,
    per_trajectory: int = 4,
    size: tuple[int, int],
    seed: int,
    batch: int,
    denoising_steps: int = 20,
    guidance: float = 3.0,
    remember=None,
) -> Targets:
    """The teacher: the right-hand side of eq. (8), at many x_t.

    Denoises `trajectories` noises and keeps `per_trajectory` evenly spaced x_t of each, beginning
    at a random step. Returns 2 * trajectories * per_trajectory samples: each x_t at scale +1 with
    eq. (8)'s target, and at -1, which the paper leaves untrained, with its mirror image.

    prompts: from `encode`. batch: samples through the UNet at once (twice that with guidance).
    remember: Checkpoint.remember, so that a stopped run goes on; None keeps nothing."""
    cond, ends, uncond = prompts
    device, k = model.device, per_trajectory
    prompt = (torch.arange(trajectories) % len(cond[0])).to(device)  # the target prompts in turn
    offsets = torch.rand(trajectories, generator=torch.Generator().manual_seed(seed))
    keep = ((torch.arange(k) + offsets[:, None]) * denoising_steps / k).long()  # (trajectories, k)
    settings = dict(size=size, denoising_steps=denoising_steps, guidance=guidance)

    def walk(rows):
        seeds, c_t = (seed * 1000 + rows).tolist(), tuple(part[prompt[rows]] for part in cond)
        return denoise(model, seeds, c_t, uncond, keep[rows], **settings)

    common = dict(remember=remember, device=device)
    walked = in_batches(walk, trajectories, batch, name=f"seed{seed}_trajectories", **common)
    x_t, t, eps_0 = (walked[key].flatten(0, 1) for key in ("x_t", "t", "eps_0"))  # (n, ...)

    def difference(rows):
        return {"difference": ends_difference(model.unet, x_t[rows], t[rows], ends)}

    common |= dict(name=f"seed{seed}_ends", desc="both ends")
    both_ends = in_batches(difference, len(t), max(1, batch // 2), **common)
    delta = eta * both_ends["difference"]  # (n, 4, h, w)
    one = torch.ones(len(t), device=device)
    twice = lambda x: torch.cat([x, x])
    return Targets(
        x_t=twice(x_t),
        t=twice(t),
        scale=torch.cat([one, -one]),
        prompt=twice(prompt.repeat_interleave(k)),
        eps_0=twice(eps_0),
        target=torch.cat([eps_0 + delta, eps_0 - delta]),  # eq. (8), and its mirror image
        cond=cond,
    )


def teach(model, prompts, *, seed: int, trajectories: int = 16, **settings):
    """(targets to train on, unseen ones for the meter). prompts, settings: as in `collect`."""
    n_train, n_meter = training.split_trajectories(trajectories)
    # Seeds of their own: the meter never sees a noise that is trained on.
    train = collect(model, prompts, trajectories=n_train, seed=2 * seed + 1, **settings)
    return train, collect(model, prompts, trajectories=n_meter, seed=2 * seed + 2, **settings)


def main():
    args = options.text_slider(__doc__)
    checkpoint = open_checkpoint(args, cli.output_file(args.out, ".safetensors"))
    started = time.time()
    model = cli.load_model(args, vae=bool(args.preview))  # only previews decode pictures
    size = training.prepare(args, model, training.text_recipe(model.unet))
    slider = training.new_slider(args, model)  # not attached yet: the teacher is the bare UNet

    targets, preserve = options.target_prompts(args), options.combinations(args.preserve)
    print(f"target: {' | '.join(targets)}\npositive: {args.pos}\nnegative: {args.neg}")
    print(f"preserved: {' | '.join(preserve) or 'nothing'}")
    prompts = encode(model, targets, args.pos, args.neg, preserve, size)
    cond, ends, uncond = prompts
    model.release(vae=not args.preview)
    plan = cost.text_slider(args, n_ends=len(ends[0]))
    if args.dry_run:
        return cost.dry_run(args, model, slider, cond, plan)

    names = ("eta", "trajectories", "per_trajectory", "guidance", "denoising_steps", "seed")
    settings = {name: getattr(args, name) for name in names}
    at_once = training.samples_at_once(args, model, size, checkpoint)
    settings |= dict(size=size, batch=at_once, remember=checkpoint.remember)
    train, held_out = teach(model, prompts, **settings)
    if args.positive_only:
        train = train[train.scale > 0]

    slider.attach(model.unet)  # training.fit: student.fit with a meter, previews and checkpoints
    reading = training.fit(args, model, slider, train, held_out, cond, uncond, checkpoint)
    about = {"kind": "text slider", "prompts": targets, "preserved": preserve}
    about["difference"] = (train.delta.norm() / args.eta / train.eps_0.float().norm()).item()
    training.finish(args, model, slider, reading, about, cond, uncond, started)
    checkpoint.remove()


if __name__ == "__main__":
    cli.run(main, RESUME_HINT)
