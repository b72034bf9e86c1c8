"""Train the generator on the drawn world's faces:  python -m experiments.stylegan.train   (half an hour on one core)

As the decoder of a variational autoencoder (Kingma and Welling 2014):

    L  =  | x - G(z) |  +  | edges x - edges G(z) |  +  beta KL( q(z | x) || N(0, 1) )            z ~ q(z | x) = N(E(x))

and not against a discriminator: the generator is StyleGAN2's, the training is not. What was tried first, on one core: StyleGAN2's own
discriminator with R1 at 0.5 (64,000 pictures: it won, the generator drew noise) and at 10 (32,000: blurs with holes for eyes), and a
projected one (Sauer et al. 2021; 16,000: no face). A drawn world has few causes and no texture, so an autoencoder is sharp enough, and
needs no balance. What the experiment asks for, a style space whose channels have no names, comes with the generator.

Kill it at any time and start it again: it goes on from the last checkpoint in --work, where its log and its samples are too. At the
end the generator's running average is written to experiments/stylegan/generator.safetensors.
"""

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from experiments.stylegan.generator import SIZE, Encoder, Generator, Z
from extras import metrics
from formats import write_atomically
from miniature import world
from miniature.judges import miniature_judges
from miniature.train import edges
from support import cli, images
from support.checkpoint import Checkpoint, deferred_interrupt

WEIGHTS = Path(__file__).parent / "generator.safetensors"


def faces(count: int, seed: int) -> torch.Tensor:
    """Drawn faces (count, 3, 64, 64), bytes."""
    drawn = [
        world.draw(world.sample(np.random.default_rng([seed, i]), kind="face", malformed=0)).resize(
            (SIZE, SIZE), Image.BOX
        )
        for i in range(count)
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def enlarged(x) -> list[Image.Image]:
    """Pictures (B, 3, 64, 64) in [-1, 1] at the world's own size."""
    bytes_ = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a).resize((world.SIZE, world.SIZE), Image.BICUBIC) for a in bytes_]


@torch.no_grad()
def drawn(G, count: int, seed: int, truncation: float = 1.0) -> list[Image.Image]:
    """Pictures that the generator makes of noise."""
    random = torch.Generator().manual_seed(seed)
    parts = [64] * (count // 64) + [count % 64] * bool(count % 64)
    return [
        p
        for n in parts
        for p in enlarged(
            G.synthesis(
                G.styles(G.w(torch.randn(n, Z, generator=random), truncation)), G.noise(n, random)
            )
        )
    ]


def loss_of(E, G, x, beta: float):
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = E(x)
        w = G.w(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
        seen = G.synthesis(G.styles(w), G.noise(len(x)))
    G.w_mean.lerp_(w.detach().float().mean(0), 0.005)
    divergence = (
        0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    )  # nats a picture
    # Eyes and mouth are a few pixels of many: the middle counts five times. (That doesn't move the minimum where the fit is perfect.)
    weight = torch.ones(SIZE, SIZE)
    weight[20:52, 16:48] = 5
    off = (seen - x) * weight / weight.mean()
    return sum(e.abs().mean() for e in (off, *edges(off))) + beta * divergence, divergence


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument(
        "--steps", type=int, default=9000, help="of --batch pictures (default: %(default)s)"
    )
    p.add_argument("--batch", type=int, default=32)
    p.add_argument(
        "--faces", type=int, default=16_000, help="drawn ones to learn from (default: %(default)s)"
    )
    p.add_argument("--beta", type=float, default=3e-4, help="default: %(default)s")
    p.add_argument("--lr", type=float, default=0.012, help="default: %(default)s")
    p.add_argument(
        "--work",
        default="out/stylegan",
        help="folder of checkpoint, log and samples (default: %(default)s)",
    )
    p.add_argument("--out", default=str(WEIGHTS), help="default: %(default)s")
    args = p.parse_args()
    work, kept, out = Path(args.work), Checkpoint(Path(args.work)), cli.output_file(args.out)
    real = kept.part("faces", lambda: {"x": faces(args.faces, 1)})["x"]
    judges, unseen = miniature_judges(), enlarged(faces(1000, 2).float() / 127.5 - 1)

    torch.manual_seed(0)
    E, G = (
        Encoder().to(memory_format=torch.channels_last),
        Generator().to(memory_format=torch.channels_last),
    )
    average = copy.deepcopy(G).requires_grad_(False)
    opt = torch.optim.Adam(
        [{"params": G.parameters(), "lr": args.lr}, {"params": E.parameters(), "lr": args.lr / 5}],
        betas=(0.9, 0.99),
    )
    parts = {"E": E, "G": G, "average": average, "opt": opt}
    state = kept.load()
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    first, started, losses = state["step"] if state else 0, time.time(), [0.0, 0.0]
    rates = args.lr, args.lr / 5

    def log(line):
        print(line, flush=True)
        with open(work / "log.txt", "a") as f:
            f.write(line + "\n")

    with deferred_interrupt() as stop:
        for step in range(first, args.steps):
            rows = np.random.default_rng([3, step]).choice(len(real), args.batch, replace=False)
            torch.manual_seed(step)
            x = (real[torch.from_numpy(rows)].float() / 127.5 - 1).to(
                memory_format=torch.channels_last
            )
            loss, divergence = loss_of(E, G, x, args.beta)
            if not loss.isfinite():
                raise FloatingPointError(
                    f"training diverged at step {step}: start again with a lower --lr than {args.lr:g}"
                )
            opt.zero_grad()
            loss.backward()
            for group, rate in zip(opt.param_groups, rates):
                group["lr"] = (
                    rate
                    * min(1.0, (step + 1) / 100)
                    * 0.5
                    * (1 + math.cos(math.pi * step / args.steps))
                )
            opt.step()
            losses = [0.99 * a + 0.01 * b.item() for a, b in zip(losses, (loss, divergence))]
            with torch.no_grad():
                for a, g in zip(
                    [*average.parameters(), *average.buffers()], [*G.parameters(), *G.buffers()]
                ):
                    a.lerp_(g, max(0.005, 1 / (step + 1)))
            if (step + 1) % 100 == 0:
                log(
                    f"{step + 1}/{args.steps}  loss {losses[0]:.4f}  KL {losses[1]:.1f}  {time.time() - started:.0f} s"
                )
            last = step + 1 == args.steps
            if (step + 1) % 1000 == 0 or last:
                made = drawn(average, 1000, 4)
                images.save_image(
                    images.contact_sheet(
                        [made[i : i + 8] for i in range(0, 32, 8)], [""] * 8, [""] * 4
                    ),
                    work / "samples.png",
                )
                log(
                    f"{step + 1}  FID {metrics.fid(judges, unseen, made):.2f} to 1,000 unseen faces"
                )
            if (step + 1) % 250 == 0 or last or stop():
                kept.save(
                    {"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}
                )
            if stop():
                raise KeyboardInterrupt(
                    f"stopped after step {step + 1}; the same command goes on from there"
                )
    write_atomically(
        out,
        lambda path: save_file(
            {k: v.half().contiguous() for k, v in average.state_dict().items()}, path
        ),
    )
    print(f"{out}: {sum(v.numel() for v in average.parameters()):,} parameters")


def load(path=WEIGHTS) -> Generator:
    G = Generator()
    G.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return G.eval().requires_grad_(False)


if __name__ == "__main__":
    cli.run(main)
