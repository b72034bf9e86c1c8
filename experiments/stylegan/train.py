"""Train the generator on the drawn world's faces:

    python -m experiments.stylegan.train  # half an hour on one core

As the decoder of a variational autoencoder (Kingma and Welling 2014):

    L  =  | x - G(z) |  +  | edges x - edges G(z) |  +  beta KL( q(z | x) || N(0, 1) ),
    z ~ q(z | x) = N(E(x))

and not against a discriminator: the generator is StyleGAN2's, the training is not. What was tried
first, on one core: StyleGAN2's own discriminator with R1 at 0.5 (64,000 pictures: it won, the
generator drew noise) and at 10 (32,000: blurs with holes for eyes), and a projected one (Sauer et
al. 2021; 16,000: no face). A drawn world has few causes and no texture, so an autoencoder is sharp
enough, and needs no balance. What the experiment asks for, a style space whose channels have no
names, comes with the generator.

Kill it at any time and start it again: it goes on from the last checkpoint in --work, where its
log and its samples are too. At the end the generator's running average is written to
experiments/stylegan/generator.safetensors."""

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from experiments.stylegan.draw import WEIGHTS, drawn, enlarged, faces, load, to_unit
from experiments.stylegan.generator import SIZE, Encoder, Generator
from extras import metrics
from formats import write_atomically
from miniature.judges import miniature_judges
from miniature.train import edges
from support import cli, images
from support.checkpoint import Checkpoint, deferred_interrupt
from support.options import default_help

NHWC = dict(memory_format=torch.channels_last)


def loss_of(E, G, x, beta: float):
    """(the loss, the divergence in nats a picture) of pictures x (B, 3, 64, 64)."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = E(x)
        w = G.w(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
        seen = G.synthesis(G.styles(w), G.noise(len(x)))
    G.w_mean.lerp_(w.detach().float().mean(0), 0.005)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    # Eyes and mouth are a few pixels of many: the middle counts five times. (That does not move the
    # minimum where the fit is perfect.)
    weight = torch.ones(SIZE, SIZE)
    weight[20:52, 16:48] = 5
    off = (seen - x) * weight / weight.mean()
    return sum(e.abs().mean() for e in (off, *edges(off))) + beta * divergence, divergence


class Training:
    """Encoder, generator, the generator's running average, and their optimizer."""

    def __init__(self, lr: float, steps: int):
        torch.manual_seed(0)
        self.E, self.G = Encoder().to(**NHWC), Generator().to(**NHWC)
        self.average = copy.deepcopy(self.G).requires_grad_(False)
        self.rates, self.steps = (lr, lr / 5), steps
        groups = [{"params": net.parameters()} for net in (self.G, self.E)]
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.99))
        networks = dict(E=self.E, G=self.G, average=self.average)
        self.parts = networks | dict(optimizer=self.optimizer)

    def step(self, i: int, x, beta: float):
        """One step, number i, on pictures x. FloatingPointError if training diverges."""
        loss, divergence = loss_of(self.E, self.G, x, beta)
        if not loss.isfinite():
            again = f"start again with a lower --lr than {self.rates[0]:g}"
            raise FloatingPointError(f"training diverged at step {i}: {again}")
        self.optimizer.zero_grad()
        loss.backward()
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            warm = rate * min(1.0, (i + 1) / 100)
            group["lr"] = warm * 0.5 * (1 + math.cos(math.pi * i / self.steps))
        self.optimizer.step()
        tensors = lambda net: [*net.parameters(), *net.buffers()]
        with torch.no_grad():
            for a, g in zip(tensors(self.average), tensors(self.G)):
                a.lerp_(g, max(0.005, 1 / (i + 1)))
        return loss.item(), divergence.item()


def parse_args():
    p = cli.plain_parser(__doc__)
    p.add_argument("--steps", type=int, default=9000, help=default_help("of --batch pictures"))
    p.add_argument("--batch", type=int, default=32)
    learn_from = default_help("drawn ones to learn from")
    p.add_argument("--faces", type=int, default=16_000, help=learn_from)
    p.add_argument("--beta", type=float, default=3e-4, help="default: %(default)s")
    p.add_argument("--lr", type=float, default=0.012, help="default: %(default)s")
    work = default_help("folder of checkpoint, log and samples")
    p.add_argument("--work", default="out/stylegan", help=work)
    p.add_argument("--out", default=str(WEIGHTS), help="default: %(default)s")
    return p.parse_args()


def main():
    args = parse_args()
    work, checkpoint, out = Path(args.work), Checkpoint(Path(args.work)), cli.output_file(args.out)
    real = checkpoint.remember("faces", lambda: {"x": faces(args.faces, 1)})["x"]
    judges, unseen = miniature_judges(), enlarged(to_unit(faces(1000, 2)))
    training = Training(args.lr, args.steps)
    state = checkpoint.load()
    for name, part in training.parts.items() if state else ():
        part.load_state_dict(state[name])
    first, started, losses = state["step"] if state else 0, time.time(), [0.0, 0.0]

    def log(line):
        print(line, flush=True)
        with open(work / "log.txt", "a") as f:
            f.write(line + "\n")

    with deferred_interrupt() as stop:
        for i in range(first, args.steps):
            rows = np.random.default_rng([3, i]).choice(len(real), args.batch, replace=False)
            torch.manual_seed(i)
            x = to_unit(real[torch.from_numpy(rows)]).to(**NHWC)
            values = training.step(i, x, args.beta)
            losses = [0.99 * a + 0.01 * b for a, b in zip(losses, values)]
            step, last = i + 1, i + 1 == args.steps
            if step % 100 == 0:
                means = f"loss {losses[0]:.4f}  KL {losses[1]:.1f}"
                log(f"{step}/{args.steps}  {means}  {time.time() - started:.0f} s")
            if step % 1000 == 0 or last:
                made = drawn(training.average, 1000, 4)
                rows = [made[j : j + 8] for j in range(0, 32, 8)]
                sheet = images.contact_sheet(rows, [""] * 8, [""] * 4)
                images.save_image(sheet, work / "samples.png")
                log(f"{step}  FID {metrics.fid(judges, unseen, made):.2f} to 1,000 unseen faces")
            if step % 250 == 0 or last or stop():
                parts = {name: part.state_dict() for name, part in training.parts.items()}
                checkpoint.save({"step": step, **parts})
            if stop():
                on = "the same command goes on from there"
                raise KeyboardInterrupt(f"stopped after step {step}; {on}")
    weights = {k: v.half().contiguous() for k, v in training.average.state_dict().items()}
    write_atomically(out, lambda path: save_file(weights, path))
    print(f"{out}: {sum(v.numel() for v in load(out).parameters()):,} parameters")


if __name__ == "__main__":
    cli.run(main)
