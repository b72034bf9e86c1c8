"""What weights of low precision keep of a slider that is added to them:

    python -m bench.rounding

For every linear and convolution layer of the miniature's UNet, random low-rank changes of a given
size (Frobenius norm, in units of W's) are added in float32 and rounded once, as --merge and
`python -m extras.tools bake` do it. "kept" is the share of the change that is made, "cosine" how
far it is still that change; the rest is noise. The last rows add seven changes of 0.05% each."""

import torch

from formats import slider_files
from sdxl import SDXL
from support import cli
from support.merge import DTYPES, Rounding

SIZES = (0.005, 0.002, 0.001, 0.0005)
SEVEN = 7
RANK = 4


def random_change(W, size: float, generator) -> torch.Tensor:
    """A change of rank RANK and of norm size * |W|, in W's shape."""
    A = torch.randn(RANK, W[0].numel(), generator=generator)
    B = torch.randn(len(W), RANK, generator=generator)
    change = (B @ A).view(W.shape)
    return change * (size * W.float().norm() / change.norm())


def measure(weights, dtype, size: float, count: int = 1, one_by_one: bool = False):
    """(share, cosine) of the sum of `count` changes, over all layers."""
    total = torch.zeros(3, dtype=torch.float64)
    for i, W in enumerate(weights):
        g = torch.Generator().manual_seed(i)
        W = W.to(dtype)
        changes = [random_change(W, size, g) for _ in range(count)]
        wanted, made = sum(changes), W
        for change in changes if one_by_one else [wanted]:
            made = Rounding().add(made, change)
        real = (made.float() - W.float()).flatten().double()
        wanted = wanted.flatten().double()
        total += torch.stack([real @ wanted, wanted @ wanted, real @ real])
    dot, wanted, made = total.tolist()
    return dot / wanted, dot / (wanted * made) ** 0.5


def main():
    p = cli.plain_parser(__doc__)
    p.parse_args()
    unet = SDXL.load(device="cpu", dtype=torch.float32, vae=False).unet
    weights = [layer.weight for _, layer in slider_files.layers_by_kohya_name(unet).values()]
    rows = [(f"{size:.2%}", dict(size=size)) for size in SIZES]
    seven = dict(size=SIZES[-1], count=SEVEN)
    rows.append((f"{SEVEN} of {SIZES[-1]:.2%}, at once", seven))
    rows.append((f"{SEVEN} of {SIZES[-1]:.2%}, one by one", seven | dict(one_by_one=True)))
    print("| size of the change, in |W| | " + " | ".join(DTYPES) + " |\n" + "|---" * 4 + "|")
    for name, settings in rows:
        found = [measure(weights, dtype, **settings) for dtype in DTYPES.values()]
        cells = [f"{share:.1%} (cosine {cosine:.3f})" for share, cosine in found]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with torch.no_grad():
        cli.run(main)
