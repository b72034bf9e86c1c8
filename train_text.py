"""Train a text slider:  python train_text.py --pos "a photo of a person, very old" --neg "a photo of a person, very young"

The paper's eq. (8). With theta the frozen model, theta* the model with the slider, and P the preserved concepts,

    eps_theta*(x_t, c_t, t)  <-  eps_theta(x_t, c_t, t)
                                 + eta * mean_{p in P} ( eps_theta(x_t, (c+, p), t) - eps_theta(x_t, (c-, p), t) )

(The paper writes a sum over P; the mean keeps eta's meaning whatever the size of P, and is what its code does on
average, which draws one p for each step.) x_t comes from partially denoising noise with the frozen model. So nothing on
the right depends on what is trained: the teacher below collects it once, the student (student.py) fits it.
"""

import itertools
import time

import torch
from tqdm import tqdm

import cli
import sampler
import student
import training


def encode(model, targets: list[str], pos: str, neg: str, preserve: list[str], size: tuple[int, int]):
    """Every prompt of eq. (8), once: the conditioning of c_t (m rows), of (c+, p) for each p then (c-, p) for each p
    (2|P| rows; 2 where P is empty), and of the empty prompt (1 row)."""
    ends = [with_concept(end, p) for end in (pos, neg) for p in preserve or [""]]
    return tuple(model.condition(prompts, size) for prompts in (targets, ends, [""]))


@torch.no_grad()
def collect(model, prompts, *, eta: float, trajectories: int, per_trajectory: int, denoising_steps: int, guidance: float,
            size: tuple[int, int], seed: int, batch: int) -> student.Targets:
    """The teacher. Walks `trajectories` noises down with the frozen model, guided toward the target prompts in turn,
    and keeps `per_trajectory` of the x_t on each way, evenly spread and from another offset each, with the right-hand
    side of eq. (8) there. Returns student.Targets of trajectories * per_trajectory groups: the target at scale +1 is
    eq. (8)'s; at -1, where the paper leaves the slider untrained, its mirror image, eps_0 - eta * mean(...).

    prompts: from `encode`. No more than `batch` samples go through the UNet at once (twice that with guidance).
    """
    unet, device = model.unet, model.device
    cond, cond_ends, uncond = prompts
    n_ends, n_targets = len(cond_ends[0]), len(cond[0])
    offsets = torch.rand(trajectories, generator=torch.Generator().manual_seed(seed))
    # Step indices kept on each trajectory: (trajectories, per_trajectory)
    keep = ((torch.arange(per_trajectory) + offsets[:, None]) * denoising_steps / per_trajectory).long()
    kept = []

    def look(x, t, which):
        """At x (n, 4, h, w): every frozen prediction that eq. (8) wants, of c_t and of both ends with every p."""
        n, k = len(x), 1 + n_ends
        every = [torch.cat([c[which, None], e[None].expand(n, *e.shape)], 1).flatten(0, 1) for c, e in zip(cond, cond_ends)]
        xs = x.repeat_interleave(k, 0)  # (n * k, 4, h, w)
        out = torch.cat([unet(xs[part], torch.full((len(part),), t, device=device), *(c[part] for c in every))
                         for part in torch.arange(n * k, device=device).split(batch)])
        out = out.view(n, k, *x.shape[1:])  # (n, 1 + 2|P|, 4, h, w)
        eps_pos, eps_neg = out[:, 1:].chunk(2, 1)  # (n, |P|, 4, h, w) each
        delta = eta * (eps_pos - eps_neg).float().mean(1)  # float32: a small difference of large numbers
        kept.append((x, torch.full((n,), t, device=device), which, out[:, 0], delta))

    with tqdm(total=-(-trajectories // batch) * denoising_steps, unit="step", desc="teacher") as bar:
        for walk in torch.arange(trajectories).split(batch):
            which = (walk % n_targets).to(device)  # each trajectory's target prompt

            def on_step(i, t, x_t, eps):
                rows = (keep[walk] == i).any(1).nonzero()[:, 0].to(device)
                if len(rows):
                    look(x_t[rows], t, which[rows])
                bar.update()

            x_T = sampler.noise((seed * 1000 + walk).tolist(), model.latent_shape(size), device, model.dtype)
            sampler.sample(unet, x_T, tuple(c[which] for c in cond), uncond, alpha_bar=model.alpha_bar, steps=denoising_steps,
                           guidance=guidance, on_step=on_step)
    x_t, t, which, eps_0, delta = (torch.cat(part) for part in zip(*kept))
    scales = torch.tensor([1.0, -1.0], device=device)
    both = lambda x: x[:, None].expand(-1, 2, *x.shape[1:])  # (n, 2, 4, h, w): the same x_t at either end
    target = eps_0[:, None].float() + scales.view(1, 2, 1, 1, 1) * delta[:, None]
    return student.Targets(scales, both(x_t), t, which, both(eps_0), target, cond)


def with_concept(prompt: str, concept: str) -> str:
    """(c, p) as one prompt: 'a photo of an old person' and 'with glasses' -> 'a photo of an old person, with glasses'."""
    return f"{prompt}, {concept}" if concept else prompt


def combinations(groups: list[str]) -> list[str]:
    """P from the --preserve options: each is a list of alternatives; of several, one from each in every combination.
    ["man, woman", "with a hat"] -> ["man, with a hat", "woman, with a hat"]. [] -> []."""
    groups = [[c.strip() for c in text.split(",") if c.strip()] for text in groups]
    return [", ".join(p) for p in itertools.product(*(g for g in groups if g)) if p]


def shared_part(pos: str, neg: str) -> str:
    """What two prompts share before their first comma: the target prompt when none is given. ValueError if nothing."""
    first, other = pos.split(",")[0].strip(), neg.split(",")[0].strip()
    if first != other or pos == neg:
        raise ValueError("--prompt is needed: what should the slider act on? (it can be left out only if --pos and --neg "
                         'differ after a comma, as in "a photo of a person, very old")')
    return first


def parse_args():
    p = cli.parser(__doc__)
    p.add_argument("--pos", required=True, help="prompt of the slider's positive end, c+")
    p.add_argument("--neg", required=True, help="prompt of its negative end, c-")
    p.add_argument("--prompt", action="append", help="target prompt c_t; may be repeated (default: what --pos and --neg share before a comma)")
    p.add_argument("--preserve", action="append", default=[], help='concepts P that must stay, "with a hat, without a hat"; '
                   "repeat it, and every combination of one from each is in P")
    p.add_argument("--eta", type=float, help="strength of the teacher's change (default: 0.5; for a UNet of SDXL's size 4)")
    p.add_argument("--positive-only", action="store_true", help="eq. (8) as printed: train scale +1 alone, not both ends")
    p.add_argument("--trajectories", type=int, default=16, help="noises that the teacher denoises (default: %(default)s)")
    p.add_argument("--per-trajectory", type=int, default=16, help="x_t kept from each (default: %(default)s)")
    p.add_argument("--denoising-steps", type=int, default=50, help="default: %(default)s")
    p.add_argument("--guidance", type=float, default=3.0, help="while denoising (default: %(default)s)")
    training.add_options(p)
    return cli.parse(p)


def recipe(unet) -> dict:
    return training.recipe(unet) | {"eta": 0.5 if training.is_small(unet) else 4.0}


def main():
    args = parse_args()
    for name in ("pos", "neg"):
        if not getattr(args, name).strip():
            raise ValueError(f"--{name} is empty: give the words of this end of the slider")
    training.check_numbers(args, "eta", "trajectories", "per_trajectory", "denoising_steps")
    prompts = args.prompt or [shared_part(args.pos, args.neg)]
    preserve = combinations(args.preserve)
    cli.check_output(args.out)
    started = time.time()
    model = cli.load_model(args, vae=bool(args.preview))  # words alone: no picture is ever decoded but for previews
    size, slider = training.start(args, model, recipe(model.unet))

    print(f"target: {' | '.join(prompts)}\npositive: {args.pos}\nnegative: {args.neg}\npreserved: {' | '.join(preserve) or 'nothing'}")
    encoded = encode(model, prompts, args.pos, args.neg, preserve, size)
    model.release(vae=not args.preview)
    teach = lambda n, seed: collect(model, encoded, eta=args.eta, trajectories=n, seed=seed, per_trajectory=args.per_trajectory,
                                    denoising_steps=args.denoising_steps, guidance=args.guidance, size=size, batch=4 * args.batch)
    train, held_out = teach(args.trajectories, 2 * args.seed + 1), teach(max(1, args.trajectories // 4), 2 * args.seed + 2)
    if args.positive_only:
        train = train.only(train.scales > 0)
    difference = (train.wanted.norm() / args.eta / train.eps_0.float().norm()).item()
    about = {"kind": "text slider", "prompts": prompts, "preserved": preserve}
    training.finish(args, model, slider, train, held_out, difference, about, encoded[0], encoded[2], started)


if __name__ == "__main__":
    cli.run(main)
