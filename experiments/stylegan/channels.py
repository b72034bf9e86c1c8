"""Which style channel moves what?

    python -m experiments.stylegan.channels  # some minutes

Every channel of the style space, one at a time, is moved by --by standard deviations either way in
a few faces, and the measuring stick reads the pictures. The channels that move one attribute alone
are looked at again with faces of their own, so that what is reported is not what happened to look
best, and written to experiments/stylegan/channels.json.

Beside the measuring stick's attributes stands the colour of the shirt, which no caption of the
drawn world has a word for."""

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from experiments.stylegan.draw import enlarged, load
from experiments.stylegan.generator import Generator, Z
from miniature import effect
from support import cli
from support.options import default_help

FOUND = Path(__file__).parent / "channels.json"
SHIRT = (40, 220)  # the range of each of its colours (world.sample)


def read(drawn) -> dict[str, np.ndarray]:
    """The measuring stick's attributes, and the mean red, green and blue of the shirt: {attribute:
    array (N,)}."""
    shirt = np.stack([np.asarray(p)[120:, 48:80].reshape(-1, 3).mean(0) for p in drawn])
    colours = {f"shirt {name}": shirt[:, i] for i, name in enumerate(("red", "green", "blue"))}
    return effect.attributes(drawn) | colours


def span(name: str) -> float:
    return SHIRT[1] - SHIRT[0] if name.startswith("shirt") else effect.span(name)


class Faces:
    """count faces of G, their styles and noise held fixed, drawn again with a channel moved."""

    def __init__(self, G: Generator, count: int, seed: int, truncation: float = 0.7):
        random = torch.Generator().manual_seed(seed)
        self.G, self.styles = G, G.styles(G.w(torch.randn(count, Z, generator=random), truncation))
        self.noise = G.noise(count, random)
        many = G.styles(G.w(torch.randn(4096, Z, generator=random)))
        self.sigma = [s.std(0) for s in many]  # of each channel of each layer

    @torch.no_grad()
    def drawn(self, layer: int = 0, channel: int = 0, by: float = 0.0):
        """Pictures with that channel moved by `by` standard deviations."""
        styles = [s.clone() for s in self.styles]
        styles[layer][:, channel] += by * self.sigma[layer][channel]
        return enlarged(self.G.synthesis(styles, self.noise))


def moves(faces: Faces, layer: int, channel: int, by: float) -> dict[str, float]:
    """{attribute: its mean change from -by to +by standard deviations, as a share of its range}."""
    low, high = (read(faces.drawn(layer, channel, sign * by)) for sign in (-1, 1))
    return {name: float((high[name] - low[name]).mean()) / span(name) for name in low}


def most_moved_other(found: dict[str, float], attribute: str) -> dict:
    """{"other", "other_moved"}, of attributes that are no words of the same one."""
    others = {name: abs(moved) for name, moved in effect.others(found, attribute).items()}
    other = max(others, key=others.get)
    return {"other": other, "other_moved": others[other]}


def summary(found: dict[str, float]) -> dict:
    """What moves most, and what else does: {"attribute", "moved" (signed), "other",
    "other_moved"}."""
    most = max(found, key=lambda name: abs(found[name]))
    return {"attribute": most, "moved": found[most]} | most_moved_other(found, most)


def main():
    p = cli.plain_parser(__doc__)
    by = default_help("standard deviations, either way")
    p.add_argument("--by", type=float, default=5.0, help=by)
    numbers = [
        ("faces", 12, "faces that every channel is tried on"),
        ("again", 48, "other faces for the best channels"),
        ("best", 40, "channels looked at again"),
    ]
    for name, default, what in numbers:
        p.add_argument(f"--{name}", type=int, default=default, help=default_help(what))
    p.add_argument("--out", default=str(FOUND), help="default: %(default)s")
    args = p.parse_args()
    G, out = load(), Path(args.out)
    faces, others = Faces(G, args.faces, seed=10), Faces(G, args.again, seed=11)

    def look(faces, places):
        rows = []
        for layer, channel in tqdm(places, unit="channel"):
            place = {"layer": layer, "channel": channel}
            rows.append(summary(moves(faces, layer, channel, args.by)) | place)
        return sorted(rows, key=lambda r: abs(r["moved"]) - 2 * r["other_moved"], reverse=True)

    every = [(layer, i) for layer, s in enumerate(faces.styles) for i in range(s.shape[1])]
    best = look(faces, every)[: args.best]
    best = look(others, [(row["layer"], row["channel"]) for row in best])
    cli.write_text(out, json.dumps({"by": args.by, "channels": len(every), "best": best}, indent=1))
    for row in best:
        place = f"layer {row['layer']:2} channel {row['channel']:3}"
        moved = f"{row['attribute']:16} {row['moved']:+6.0%}"
        print(f"{place}  {moved}   then {row['other']:16} {row['other_moved']:5.0%}")


if __name__ == "__main__":
    cli.run(main)
