"""Train a visual slider from pictures:

    python train_pairs.py --neg small_eyes/ --pos big_eyes/ --prompt "a photo of a person"

For what words do not say well: pairs of pictures, matched by file name, that differ in one thing.
With A a picture of the negative and B of the positive folder, and eps_{theta, s} the frozen model
with the slider at scale s (the paper's alpha), the paper's loss is (--target noise)

    L  =  || eps_{theta, -1}(x_t^A, t) - eps ||^2
        + || eps_{theta, +1}(x_t^B, t) - eps ||^2

with the same noise eps and noise level t for A and B. Most of this loss has nothing to do with the
concept: it is the frozen model's own error on these pictures, which it makes at scale 0 too. So by
default (--target shared) eps is replaced, on both sides, by the mean of the frozen predictions,

    eps_bar  =  ( eps_theta(x_t^A, t) + eps_theta(x_t^B, t) ) / 2

and only the difference between A and B is left to learn. To first order both losses have the same
minimum (`shared_prediction`). With more than two folders, each at a scale of its own (--at),
eps_bar is the value at scale 0 of a straight line fitted to the predictions by least squares.
"""

import time

import torch

import sampler
from student import Targets
from support import cli, cost, images, options, training
from support.batches import in_batches
from support.checkpoint import RESUME_HINT, open_checkpoint


def shared_prediction(eps_0, scales):
    """eps_bar (n, 1, 4, h, w): the value at scale 0 of the least-squares line over `scales` (k,)
    through the frozen predictions eps_0 (n, k, 4, h, w).

    Why: near scale 0 a slider adds s * D(x_t), and D(x_t^A) is nearly D(x_t^B). The paper's loss
    fits s * D to eps - eps_0 over the scales s. Where these sum to 0, the best D does not depend on
    what is the same at every s, so eps_bar can stand in for eps. But eps - eps_bar is most of the
    paper's loss, and a slider of low rank, which is not quite s * D, would spend itself on it.
    """
    centred = scales - scales.mean()  # weights: of the predictions in the line's value at 0
    weights = 1 / len(scales) - scales.mean() * centred / centred.square().sum()  # (k,)
    return (weights.view(1, -1, 1, 1, 1) * eps_0.float()).sum(1, keepdim=True)


@torch.no_grad()
def collect(
    model,
    latents,
    scales,
    cond,
    *,
    noises: int,
    seed: int,
    batch: int,
    target: str = "shared",
    remember=None,
) -> Targets:
    """The teacher. Noises each pair's latents (n, k, 4, h, w) `noises` times, at levels spread
    over the whole schedule, alike within a pair. Returns n * noises * k samples.

    scales: (k,). cond: one row. target: "shared" for eps_bar; "noise" for eps, as the paper has it.
    batch, remember: as in support/batches.py."""
    n, k = latents.shape[:2]  # n pairs of k = 2 pictures, or groups of more
    T, device, N = len(model.alpha_bar), model.device, n * noises
    offsets = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    t = ((torch.arange(noises) + offsets[:, None]) / noises * T).long().flatten().to(device)  # (N,)
    seeds = range(seed * 100_000, seed * 100_000 + N)
    eps = sampler.noise(seeds, latents.shape[2:], device, model.dtype)  # (N, 4, h, w)
    pair = torch.arange(n, device=device).repeat_interleave(noises)
    x_0 = latents[pair].flatten(0, 1)  # (N * k, 4, h, w): the scales of a pair side by side
    t_k = t.repeat_interleave(k)
    x_t = sampler.add_noise(x_0, eps.repeat_interleave(k, 0), t_k, model.alpha_bar)

    def predict(rows):
        c = sampler.expand(cond, len(rows))
        return {"eps_0": model.unet(x_t[rows], t_k[rows], *c)}

    common = dict(remember=remember, name=f"seed{seed}_teacher", desc="teacher", device=device)
    eps_0 = in_batches(predict, len(x_t), batch, **common)["eps_0"].unflatten(0, (N, k))
    goal = eps[:, None].float() if target == "noise" else shared_prediction(eps_0, scales)
    return Targets(
        x_t=x_t,
        t=t_k,
        scale=scales.repeat(N),
        prompt=torch.zeros_like(t_k),
        eps_0=eps_0.flatten(0, 1),
        target=goal.expand(eps_0.shape).flatten(0, 1),
        cond=cond,
    )


def main():
    args = options.pair_slider(__doc__)
    scales, folders = options.scales_and_folders(args)
    groups = images.match_by_name(folders)
    checkpoint = open_checkpoint(args, cli.output_file(args.out, ".safetensors"), groups)
    started = time.time()
    model = cli.load_model(args)
    args.size = args.size or training.size_of_pairs(model, groups)
    size = training.prepare(args, model, training.recipe(model.unet))
    slider = training.new_slider(args, model)  # not attached yet: the teacher is the bare UNet

    kind = "pairs" if len(scales) == 2 else f"groups of {len(scales)}"
    print(f"{len(groups)} {kind}:", ", ".join(f"{f} at {s:+g}" for s, f in zip(scales, folders)))
    latents = torch.stack([model.encode(images.read_group(files, size)) for files in groups])
    cond, uncond = model.condition([args.prompt], size), model.condition([""], size)
    model.release(vae=not args.preview)

    # Some pairs are the meter's alone; of very few pairs, only noises that the slider never sees.
    n_held_out = len(groups) // 8
    seen, held_out = latents[n_held_out:], latents[:n_held_out] if n_held_out else latents
    held_out_noises = -(-16 // len(held_out))  # 16 / len(held_out), rounded up
    n_meter = len(held_out) * len(scales) * held_out_noises
    n_teacher = len(seen) * len(scales) * args.noises + n_meter
    plan = cost.estimate(args, n_teacher, n_meter)
    if args.dry_run:
        return cost.dry_run(args, model, slider, cond, plan)

    at, seed = torch.tensor(scales, device=model.device), 2 * args.seed + 1
    at_once = training.samples_at_once(args, model, size, checkpoint)
    settings = dict(batch=at_once, remember=checkpoint.remember)
    trained_on = dict(noises=args.noises, seed=seed, target=args.target)  # meter: always eps_bar
    train = collect(model, seen, at, cond, **trained_on, **settings)
    unseen = collect(model, held_out, at, cond, noises=held_out_noises, seed=seed + 1, **settings)

    slider.attach(model.unet)
    reading = training.fit(args, model, slider, train, unseen, cond, uncond, checkpoint)
    about = {"kind": "visual slider", "pairs": len(groups)}
    about["difference"] = (unseen.delta.norm() / unseen.eps_0.float().norm()).item()
    # A good part of what the model sees in a pair is its own and not the concept's: a share of 30%
    # with a cosine of 0.5 is a good slider on the miniature.
    training.finish(args, model, slider, reading, about, cond, uncond, started, enough=(0.12, 0.4))
    checkpoint.remove()


if __name__ == "__main__":
    cli.run(main, RESUME_HINT)
