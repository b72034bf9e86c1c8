"""Draw pairs for train_pairs.py: the same faces with one attribute changed.

    python -m miniature.pairs --attribute eye_size --values 0.6,1.6 --count 16 --out pairs

writes pairs/0.6 and pairs/1.6.
"""

from pathlib import Path

import numpy as np

from miniature import world
from support import cli, images


def draw(attribute: str, values, count: int, seed: int = 0):
    """`count` lists of pictures: a face with each of the values of its attribute."""
    rngs = [np.random.default_rng([seed, i]) for i in range(count)]
    faces = [world.sample(rng, kind="face", malformed=0) for rng in rngs]
    return [[world.draw(face | {attribute: value}) for value in values] for face in faces]


def main():
    p = cli.plain_parser(__doc__)
    attributes = [name for name in world.RANGES if name != "malformed"]
    p.add_argument("--attribute", default="eye_size", choices=attributes)
    values = "one folder for each (default: 0.6,1.6)"
    p.add_argument("--values", type=cli.numbers, default=[0.6, 1.6], help=values)
    p.add_argument("--count", type=int, default=16, help="faces (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="pairs", help="folder to write to (default: %(default)s)")
    args = p.parse_args()
    low, high = world.RANGES[args.attribute]
    if not all(low <= v <= high for v in args.values):
        raise ValueError(f"--values: {args.attribute} goes from {low:g} to {high:g}")
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, not {args.count}")
    for i, group in enumerate(draw(args.attribute, args.values, args.count, args.seed)):
        for value, picture in zip(args.values, group):
            images.save_image(picture, Path(args.out) / f"{value:g}" / f"{i:03}.png")
    values = ", ".join(f"{value:g}" for value in args.values)
    print(f"{args.out}: {args.count} faces with {args.attribute} at {values}")


if __name__ == "__main__":
    cli.run(main)
