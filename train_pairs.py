"""Train a visual slider from pictures:  python train_pairs.py --neg small_eyes/ --pos big_eyes/ --prompt "a photo of a person"

For what words do not say well: pairs of pictures, matched by file name, that differ in one thing only. With A a picture
of the negative and B of the positive folder, theta the frozen model and alpha Delta W the slider at scale alpha,

    L  =  || eps_{theta, -alpha Delta W}(x_t^A, t) - eps ||^2  +  || eps_{theta, +alpha Delta W}(x_t^B, t) - eps ||^2

with the same noise eps and noise level t for A and B (the paper's loss for image pairs; --target noise). Most of that eps
is nothing that the slider could or should learn: the model's error in denoising just these pictures, which is there at
scale 0 as well. The default takes instead what the frozen model's own predictions for A and B have in common,

    eps_bar  =  ( eps_theta(x_t^A, t) + eps_theta(x_t^B, t) ) / 2

for eps on both sides: then only the difference between A and B is left to learn. (To first order, the slider that
minimises the one loss minimises the other: see `shared_prediction`.) More than two folders, at scales of their own, are
given by --at; eps_bar is then what a straight line through the predictions says at scale 0.
"""

import time
from pathlib import Path

import torch
from tqdm import tqdm

import cli
import parallel
import pictures
import sampler
import student
import training
import unfinished


def shared_prediction(eps_0, scales):
    """eps_bar: the least-squares line over `scales` (k,) through predictions eps_0 (n, k, 4, h, w), at 0: (n, 1, 4, h, w).

    Why: near scale 0 a slider's effect is s * D(x_t), and D(x_t^A) is nearly D(x_t^B). The paper's loss is then smallest
    where s * D fits eps - eps_0 over the scales s, and whatever of that is the same at every s, as eps is, drops out for
    scales that sum to 0: the same D fits eps_bar - eps_0. But eps_bar leaves D nothing else to be tempted by.
    """
    off = scales - scales.mean()
    weights = 1 / len(scales) - scales.mean() * off / off.square().sum()  # (k,): sum to 1, and weights . scales = 0
    return (weights.view(1, -1, 1, 1, 1) * eps_0.float()).sum(1, keepdim=True)


@torch.no_grad()
def collect(model, latents, scales, cond, *, noises: int, seed: int, batch: int, target: str = "shared", kept=unfinished.NOTHING) -> student.Targets:
    """The teacher. Noises each pair's latents (n, k, 4, h, w) `noises` times, at levels spread over the whole schedule,
    alike within a pair, and notes what the frozen model predicts. Returns student.Targets of n * noises * k samples.

    scales: (k,). cond: one row. target: "shared" for eps_bar, "noise" for eps, as the paper has it. kept: where what is predicted outlives a stop.
    """
    n, k, T = *latents.shape[:2], len(model.alpha_bar)
    offsets = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    t = (((torch.arange(noises) + offsets[:, None]) / noises) * T).long().flatten().to(model.device)  # (n * noises,)
    eps = sampler.noise(range(seed * 100_000, seed * 100_000 + n * noises), latents.shape[2:], model.device, model.dtype)
    rows = torch.arange(n, device=model.device).repeat_interleave(noises)
    x_t = sampler.add_noise(latents[rows].flatten(0, 1), eps.repeat_interleave(k, 0), t.repeat_interleave(k), model.alpha_bar)
    samples = parallel.mine(torch.arange(len(x_t), device=model.device))
    predicted = lambda part: {"eps_0": model.unet(x_t[part], t[part // k], *sampler.rows(cond, len(part)))}
    parts = [
        kept.part(f"seed{seed}_teacher{i}", lambda: predicted(part))["eps_0"].to(model.device)
        for i, part in enumerate(tqdm(samples.split(batch), unit="batch", desc="teacher"))
    ]
    eps_0 = parallel.gather(torch.cat(parts), len(x_t)).unflatten(0, (-1, k))  # (n * noises, k, 4, h, w)
    goal = (eps[:, None].float() if target == "noise" else shared_prediction(eps_0, scales)).expand(eps_0.shape)
    t = t.repeat_interleave(k)
    return student.Targets(x_t, t, scales.repeat(n * noises), torch.zeros_like(t), eps_0.flatten(0, 1), goal.flatten(0, 1), cond)


def folders(args) -> tuple[list[float], list[Path]]:
    """The scales and folders that --neg, --pos and --at name, in the order of the scales. ValueError unless they can be fitted."""
    try:
        given = [(float(scale), Path(folder)) for scale, folder in args.at]
    except ValueError:
        raise ValueError(f"--at wants a number and a folder, not {' '.join(args.at[0])!r}") from None
    given += [(scale, Path(folder)) for scale, folder in ((-1.0, args.neg), (1.0, args.pos)) if folder]
    scales = [scale for scale, _ in given]
    if len(given) < 2 or len(set(scales)) < len(scales):
        raise ValueError("two folders at least, each at a scale of its own, are needed: --neg DIR --pos DIR, or --at SCALE DIR for each")
    if len({folder.resolve() for _, folder in given}) < len(given):
        raise ValueError("one folder is named twice: the ends of a slider differ")
    given.sort()
    return [scale for scale, _ in given], [folder for _, folder in given]


def parse_args():
    p = cli.parser(__doc__)
    p.add_argument("--neg", metavar="DIR", help="pictures of the slider's negative end (scale -1)")
    p.add_argument("--pos", metavar="DIR", help="pictures of its positive end (scale 1), of the same names")
    p.add_argument("--at", nargs=2, action="append", default=[], metavar=("SCALE", "DIR"), help="pictures at another strength; may be repeated")
    p.add_argument("--prompt", default="", help="what the pictures show (default: nothing, the empty prompt)")
    p.add_argument("--target", choices=["shared", "noise"], default="shared", help="what both ends are taught to predict (default: %(default)s)")
    p.add_argument("--noises", type=int, default=32, help="noisings of each pair (default: %(default)s)")
    training.add_options(p)
    training.add_watching(p)
    return cli.parse(p)


def main():
    args = parse_args()
    training.check_numbers(args, "noises")
    scales, where = folders(args)
    groups = pictures.matched(where)
    kept = unfinished.begin(args, cli.output(args.out, ".safetensors"))
    started = time.time()
    model = cli.load_model(args)
    size, slider = training.start(args, model, training.recipe(model.unet)), training.new_slider(args, model)

    print(f"{len(groups)} {'pairs' if len(scales) == 2 else f'groups of {len(scales)}'}: " + ", ".join(f"{f} at {s:+g}" for s, f in zip(scales, where)))
    latents = torch.stack([model.latents(pictures.read_matched(files, size[0])) for files in groups])  # (n, k, 4, h, w)
    cond, uncond = model.condition([args.prompt], size), model.condition([""], size)
    model.release(vae=not args.preview)
    aside = len(groups) // 8  # pairs the slider never sees, for the meter; of very few, only noises that it never sees
    seen, unseen = latents[aside:], latents[:aside] if aside else latents
    parts = (seen, args.noises, args.target), (unseen, max(1, -(-16 // len(unseen))), "shared")  # for training, and for the meter
    evaluations = [len(z) * len(scales) * noises for z, noises, _ in parts]
    plan = training.cost(args, sum(evaluations), evaluations[1])
    if args.dry_run:
        return training.dry_run(args, model, slider, cond, plan)
    at = torch.tensor(scales, device=model.device)
    train, held_out = (
        collect(model, z, at, cond, noises=noises, seed=2 * args.seed + 1 + i, batch=4 * args.batch, target=target, kept=kept)
        for i, (z, noises, target) in enumerate(parts)
    )
    difference = (held_out.wanted.norm() / held_out.eps_0.float().norm()).item()
    about = {"kind": "visual slider", "pairs": len(groups)}
    # Of what the model sees in a pair, a good part is its own and not the concept's: 30%, cosine 0.5 is a good slider on the miniature.
    training.finish(args, model, slider, train, held_out, difference, about, cond, uncond, started, kept, enough=(0.12, 0.4))


if __name__ == "__main__":
    cli.run(main, unfinished.HINT)
