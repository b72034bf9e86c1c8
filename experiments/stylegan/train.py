"""Train the generator on the drawn world's faces:  python -m experiments.stylegan.train   (an hour and a half on one core)

    D:  E softplus(D(G(z))) + E softplus(-D(x))   +   gamma / 2 E |grad_x D(x)|^2     (Goodfellow et al. 2014; R1: Mescheder et al. 2018)
    G:  E softplus(-D(G(z)))                                                          (the non-saturating loss)

The penalty R1 is computed at every 16th step only, sixteenfold (StyleGAN2, "lazy regularization"); nine batches in ten mix two styles.
StyleGAN2's path-length regularisation is left out: it smooths w for inversion, which nothing here needs.

Kill it at any time and start it again: it goes on from the last checkpoint in --work, where its log and its samples are too. At the
end the generator's running average is written to experiments/stylegan/generator.safetensors.
"""

import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import cli
import evaluate
import pictures
from experiments.stylegan.generator import SIZE, Discriminator, Generator, Z
from formats import written
from miniature import world
from miniature.judges import miniature_judges
from unfinished import Unfinished, stoppable

WEIGHTS = Path(__file__).parent / "generator.safetensors"
GAMMA, EVERY, AVERAGE_OVER = 10.0, 16, 10_000  # R1's weight, how often; pictures after which a weight's part in the average has halved


def faces(count: int, seed: int) -> torch.Tensor:
    """Drawn faces (count, 3, 64, 64), bytes."""
    drawn = [world.draw(world.sample(np.random.default_rng([seed, i]), kind="face", malformed=0)).resize((SIZE, SIZE), Image.BOX) for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def enlarged(x) -> list[Image.Image]:
    """Pictures (B, 3, 64, 64) in [-1, 1] at the world's own size."""
    bytes_ = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a).resize((world.SIZE, world.SIZE), Image.BICUBIC) for a in bytes_]


@torch.no_grad()
def drawn(G, count: int, seed: int, truncation: float = 1.0) -> list[Image.Image]:
    random = torch.Generator().manual_seed(seed)
    return [
        p
        for n in [64] * (count // 64) + [count % 64] * bool(count % 64)
        for p in enlarged(G.synthesis(G.styles(G.w(torch.randn(n, Z, generator=random), truncation)), G.noise(n, random)))
    ]


def d_loss(G, D, real, z, styles_of, penalty: bool):
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            fake = G.synthesis(styles_of(z), G.noise(len(real)))
        loss = F.softplus(D(fake)).mean() + F.softplus(-D(real)).mean()
    if penalty:  # in float32: it is differentiated twice
        x = real.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
        loss = loss + EVERY * GAMMA / 2 * gradient.square().sum((1, 2, 3)).mean()
    return loss


def g_loss(G, D, z, styles_of):
    with torch.autocast("cpu", torch.bfloat16):
        return F.softplus(-D(G.synthesis(styles_of(z), G.noise(len(z))))).mean()


def mixed(G, rng):
    """z (B, 64) -> styles; nine times in ten, styles of two z, crossing over at a random layer."""

    def styles_of(z):
        w = G.w(z)
        G.w_mean.lerp_(w.detach().mean(0), 0.005)
        if rng.random() < 0.1:
            return G.styles(w)
        return G.styles(w, G.w(torch.randn_like(z)), int(rng.integers(1, len(G.convs))))

    return styles_of


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("--steps", type=int, default=10_000, help="of --batch pictures (default: %(default)s)")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--faces", type=int, default=16_000, help="drawn ones to learn from (default: %(default)s)")
    p.add_argument("--lr", type=float, default=0.002, help="default: %(default)s")
    p.add_argument("--work", default="out/stylegan", help="folder of checkpoint, log and samples (default: %(default)s)")
    p.add_argument("--out", default=str(WEIGHTS), help="default: %(default)s")
    args = p.parse_args()
    work, kept, out = Path(args.work), Unfinished(Path(args.work)), cli.output(args.out)
    real = kept.part("faces", lambda: {"x": faces(args.faces, 1)})["x"]
    judges, unseen = miniature_judges(), enlarged(faces(1000, 2).float() / 127.5 - 1)

    torch.manual_seed(0)
    G, D = Generator().to(memory_format=torch.channels_last), Discriminator().to(memory_format=torch.channels_last)
    average = copy.deepcopy(G).requires_grad_(False)
    slower = lambda every: dict(lr=args.lr * every / (every + 1), betas=(0.0, 0.99 ** (every / (every + 1))))  # a step of R1 in every 16 is one more
    opt_G, opt_D = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(0.0, 0.99)), torch.optim.Adam(D.parameters(), **slower(EVERY))
    parts = {"G": G, "D": D, "average": average, "opt_G": opt_G, "opt_D": opt_D}
    state = kept.load()
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    first, started, losses = state["step"] if state else 0, time.time(), [0.0, 0.0]

    def log(line):
        print(line, flush=True)
        with open(work / "log.txt", "a") as f:
            f.write(line + "\n")

    with stoppable() as stop:
        for step in range(first, args.steps):
            rng = np.random.default_rng([3, step])
            torch.manual_seed(step)
            x = (real[torch.from_numpy(rng.choice(len(real), args.batch, replace=False))].float() / 127.5 - 1).to(memory_format=torch.channels_last)
            styles_of = mixed(G, rng)
            for opt, loss_of in (
                (opt_D, lambda: d_loss(G, D, x, torch.randn(args.batch, Z), styles_of, step % EVERY == 0)),
                (opt_G, lambda: g_loss(G, D, torch.randn(args.batch, Z), styles_of)),
            ):
                D.requires_grad_(opt is opt_D)
                loss = loss_of()
                if not loss.isfinite():
                    raise FloatingPointError(f"training diverged at step {step}: delete nothing, start again with a lower --lr than {args.lr:g}")
                opt.zero_grad()
                loss.backward()
                opt.step()
                losses[opt is opt_G] += 0.01 * (loss.item() - losses[opt is opt_G])
            seen = (step + 1) * args.batch
            keep = 0.5 ** (args.batch / min(AVERAGE_OVER, 0.05 * seen))  # a short average at first: the beginning is soon forgotten
            with torch.no_grad():
                for a, g in zip([*average.parameters(), *average.buffers()], [*G.parameters(), *G.buffers()]):
                    a.lerp_(g, 1 - keep)
            if (step + 1) % 100 == 0:
                log(f"{step + 1}/{args.steps}  D {losses[0]:.3f}  G {losses[1]:.3f}  {time.time() - started:.0f} s")
            last = step + 1 == args.steps
            if (step + 1) % 500 == 0 or last:
                made = drawn(average, 1000, 4)
                pictures.save(pictures.sheet([made[i : i + 8] for i in range(0, 32, 8)], [""] * 8, [""] * 4), work / "samples.png")
                log(f"{step + 1}  FID {evaluate.fid(judges, unseen, made):.2f} to 1,000 unseen faces")
            if (step + 1) % 250 == 0 or last or stop():
                kept.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}})
            if stop():
                raise KeyboardInterrupt(f"stopped after step {step + 1}; the same command goes on from there")
    written(out, lambda path: save_file({k: v.half().contiguous() for k, v in average.state_dict().items()}, path))
    print(f"{out}: {sum(v.numel() for v in average.parameters()):,} parameters")


def load(path=WEIGHTS) -> Generator:
    G = Generator()
    G.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return G.eval().requires_grad_(False)


if __name__ == "__main__":
    cli.run(main)
