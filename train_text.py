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
import warnings

import torch
from tqdm import tqdm

import cli
import parallel
import sampler
import student
import training
import unfinished


def encode(model, targets: list[str], pos: str, neg: str, preserve: list[str], size: tuple[int, int]):
    """Every prompt of eq. (8), once: the conditioning of c_t (m rows), of (c+, p) for each p then (c-, p) for each p
    (2|P| rows; 2 where P is empty), and of the empty prompt (1 row)."""
    ends = [with_concept(end, p) for end in (pos, neg) for p in preserve or [""]]
    return tuple(model.condition(prompts, size) for prompts in (targets, ends, [""]))


@torch.no_grad()
def collect(
    model,
    prompts,
    *,
    eta: float,
    trajectories: int,
    per_trajectory: int,
    size: tuple[int, int],
    seed: int,
    batch: int,
    denoising_steps: int = 20,
    guidance: float = 3.0,
    kept=unfinished.NOTHING,
) -> student.Targets:
    """The teacher. Walks `trajectories` noises down with the frozen model, guided toward the target prompts in turn,
    and keeps `per_trajectory` of the x_t on each way, evenly spread and from another offset each, with the right-hand
    side of eq. (8) there. Returns student.Targets of 2 * trajectories * per_trajectory samples: each x_t at scale +1 with
    eq. (8)'s target, and at -1, where the paper leaves the slider untrained, with its mirror image, eps_0 - eta * mean(...).

    prompts: from `encode`. kept: where what is collected outlives a stop. About `batch` samples go through the UNet at once
    (twice as many with guidance).
    """
    cond, ends, uncond = prompts
    device, every = model.device, torch.arange(trajectories)
    prompt = every % len(cond[0])  # each trajectory's target prompt: (trajectories,)
    offsets = torch.rand(trajectories, generator=torch.Generator().manual_seed(seed))
    # Step indices kept on each trajectory: (trajectories, per_trajectory)
    keep = ((torch.arange(per_trajectory) + offsets[:, None]) * denoising_steps / per_trajectory).long()

    def way(some):
        """The way down: x_t, t, and the prediction for c_t, which is made there in any case, of `some` trajectories."""
        found = {int(j): [] for j in some}  # trajectory -> triples (x_t, t, eps_0), in the order of the way

        def on_step(i, t, x_t, eps_c):
            for row in (keep[some] == i).any(1).nonzero()[:, 0].tolist():
                found[int(some[row])].append((x_t[row], torch.tensor(t, device=device), eps_c[row]))
            bar.update()

        with tqdm(total=denoising_steps, unit="step", desc="trajectories") as bar:
            x_T = sampler.noise((seed * 1000 + some).tolist(), model.latent_shape(size), device, model.dtype)
            sampler.sample(
                model.unet,
                x_T,
                tuple(c[prompt[some].to(device)] for c in cond),
                uncond,
                alpha_bar=model.alpha_bar,
                steps=denoising_steps,
                guidance=guidance,
                on_step=on_step,
            )
        return dict(zip(("x_t", "t", "eps_0"), (torch.stack(part) for part in zip(*itertools.chain(*found.values())))))

    ways = [kept.part(f"seed{seed}_way{int(some[0])}", lambda: way(some)) for some in parallel.mine(every).split(batch)]
    x_t, t, eps_0 = (torch.cat([w[name] for w in ways]).to(device) for name in ("x_t", "t", "eps_0"))  # (n, 4, h, w), (n,), (n, 4, h, w)

    # What eq. (8) adds to eps_0 there: (n, 4, h, w)
    parts = tqdm(torch.arange(len(t), device=device).split(max(1, batch // len(ends[0]))), unit="batch", desc="both ends")
    ends_there = lambda rows: {"difference": sampler.ends_difference(model.unet, x_t[rows], t[rows], ends)}
    delta = eta * torch.cat([kept.part(f"seed{seed}_ends{int(rows[0])}", lambda: ends_there(rows))["difference"].to(device) for rows in parts])

    whole = lambda x: parallel.gather(x.unflatten(0, (-1, per_trajectory)), trajectories).flatten(0, 1)
    x_t, t, eps_0, delta = whole(x_t), whole(t), whole(eps_0), whole(delta)
    prompt, one = prompt.repeat_interleave(per_trajectory).to(device), torch.ones(len(t), device=device)
    twice = lambda x: torch.cat([x, x])
    target = torch.cat([eps_0 + delta, eps_0 - delta])  # eq. (8), and its mirror image
    return student.Targets(twice(x_t), twice(t), torch.cat([one, -one]), twice(prompt), twice(eps_0), target, cond)


def teach(model, prompts, *, seed: int, trajectories: int = 16, per_trajectory: int = 4, **settings):
    """What a training needs: (targets to train on, unseen ones for the meter). prompts, settings: as in `collect`."""
    return tuple(
        collect(model, prompts, trajectories=n, per_trajectory=per, seed=2 * seed + 1 + i, **settings)
        for i, (n, per) in enumerate(parts(trajectories, per_trajectory))
    )


def parts(trajectories: int, per_trajectory: int):
    """(trajectories, x_t kept from each), for training and for the meter."""
    return (trajectories, per_trajectory), (max(-(-trajectories // 4), parallel.processes()), per_trajectory)


def evaluations(trajectories: int, per_trajectory: int, denoising_steps: int, guidance: float, n_ends: int) -> int:
    """UNet evaluations, one a sample, that `teach` takes with n_ends = 2|P| (2 where P is empty)."""
    return sum(n * (denoising_steps * (1 if guidance == 1 else 2) + per * n_ends) for n, per in parts(trajectories, per_trajectory))


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
    if first != other:
        raise ValueError(
            "--prompt is needed: what should the slider act on? (it can be left out only if --pos and --neg "
            'differ after a comma, as in "a photo of a person, very old")'
        )
    return first


def parse_args():
    p = cli.parser(__doc__)
    p.add_argument("--pos", required=True, help="prompt of the slider's positive end, c+")
    p.add_argument("--neg", required=True, help="prompt of its negative end, c-")
    p.add_argument("--prompt", action="append", help="target prompt c_t; may be repeated (default: what --pos and --neg share before a comma)")
    p.add_argument(
        "--preserve",
        action="append",
        default=[],
        help='concepts P that must stay, "with a hat, without a hat"; repeat it, and every combination of one from each is in P',
    )
    p.add_argument("--eta", type=cli.number, help="strength of the teacher's change (default: 0.5; for a UNet of SDXL's size 4)")
    p.add_argument("--positive-only", action="store_true", help="eq. (8) as printed: train scale +1 alone, not both ends")
    p.add_argument("--trajectories", type=int, default=16, help="noises that the teacher denoises (default: %(default)s)")
    p.add_argument("--per-trajectory", type=int, default=4, help="x_t kept from each (default: %(default)s)")
    p.add_argument("--denoising-steps", type=int, default=20, help="default: %(default)s")
    p.add_argument("--guidance", type=cli.guidance, default=3.0, help="while denoising (default: %(default)s)")
    training.add_options(p)
    training.add_watching(p)
    return cli.parse(p)


def recipe(unet) -> dict:
    return training.recipe(unet) | {"eta": 0.5 if training.is_small(unet) else 4.0}


def main():
    args = parse_args()
    for name, words in [("pos", args.pos), ("neg", args.neg), *(("prompt", words) for words in args.prompt or [])]:
        if not words.strip():
            raise ValueError(f"--{name} is empty: give the words of this {'prompt' if name == 'prompt' else 'end of the slider'}")
    if args.pos.strip() == args.neg.strip():
        raise ValueError("--pos and --neg are the same: a slider needs two ends")
    training.check_numbers(args, "eta", "guidance", "trajectories", "per_trajectory", "denoising_steps")
    if args.per_trajectory > args.denoising_steps:
        raise ValueError(f"--per-trajectory {args.per_trajectory}: a trajectory of --denoising-steps {args.denoising_steps} has no more x_t than that")
    if args.trajectories < parallel.processes():
        raise ValueError(f"--trajectories must be at least {parallel.processes()}, one for each process")
    prompts = args.prompt or [shared_part(args.pos, args.neg)]
    preserve = combinations(args.preserve)
    for group in args.preserve:
        if len(combinations([group])) == 1:
            warnings.warn(
                f"--preserve {group!r} is one alternative alone: name its absence, or what else there is, too: 'with a hat, without a hat'", stacklevel=2
            )
    kept = unfinished.begin(args, cli.output(args.out, ".safetensors"))
    started = time.time()
    model = cli.load_model(args, vae=bool(args.preview))  # words alone: no picture is ever decoded but for previews
    size, slider = training.start(args, model, recipe(model.unet)), training.new_slider(args, model)

    print(f"target: {' | '.join(prompts)}\npositive: {args.pos}\nnegative: {args.neg}\npreserved: {' | '.join(preserve) or 'nothing'}")
    encoded = encode(model, prompts, args.pos, args.neg, preserve, size)
    model.release(vae=not args.preview)
    teacher = evaluations(args.trajectories, args.per_trajectory, args.denoising_steps, args.guidance, len(encoded[1][0]))
    n_held_out, per_held_out = parts(args.trajectories, args.per_trajectory)[1]
    plan = training.cost(args, teacher, held_out=2 * n_held_out * per_held_out)
    if args.dry_run:
        return training.dry_run(args, model, slider, encoded[0], plan)
    train, held_out = teach(
        model,
        encoded,
        eta=args.eta,
        trajectories=args.trajectories,
        per_trajectory=args.per_trajectory,
        guidance=args.guidance,
        denoising_steps=args.denoising_steps,
        size=size,
        seed=args.seed,
        batch=4 * args.batch,
        kept=kept,
    )
    if args.positive_only:
        train = train[train.scale > 0]
    difference = (train.wanted.norm() / args.eta / train.eps_0.float().norm()).item()
    about = {"kind": "text slider", "prompts": prompts, "preserved": preserve}
    training.finish(args, model, slider, train, held_out, difference, about, encoded[0], encoded[2], started, kept)


if __name__ == "__main__":
    cli.run(main, unfinished.HINT)
