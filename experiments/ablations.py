"""Section 7: does low rank, and does preserving, keep an edit to its one attribute?

    python -m experiments.ablations

The age slider, which the miniature's world entangles with glasses and hats, trained with ranks 1
to 48 and in full, and with P empty and not. Compared at the scale at which each moves age by the
same amount (0.25 of its range, found by interpolation between scales), since a weaker slider
disturbs less whatever its kind. Sky and rust have no P: on SDXL age is used too."""

import numpy as np

from experiments.common import Lab
from support import cli

RANKS = [1, 2, 4, 16, 48]  # 48: the full rank of its narrowest layers
AMOUNT = 0.25
SCALES = [0.5, 1.0, 2.0, 3.0]


def at_amount(rows: list[dict], scales, amount: float) -> dict:
    """Every measure at the scale where `moved` is `amount`, on straight lines between scales; from
    0 at scale 0."""
    moved = [row["moved"]["mean"] for row in rows]
    furthest = np.maximum.accumulate([0.0, *moved])
    scale = float(np.interp(amount, furthest, [0.0, *scales]))
    at = lambda values: float(np.interp(scale, [0.0, *scales], [0.0, *values]))
    return {
        "scale": scale,
        "reached": at(moved),
        "lpips": at([row["lpips"]["mean"] for row in rows]),
        "clip_change": at([row["clip_change"]["mean"] for row in rows]),
        "worst_other_moved": at([row["worst_other_moved"] for row in rows]),
        "mean_other_moved": at([row["mean_other_moved"] for row in rows]),
    }


def main():
    lab = Lab(__doc__, "ablations")
    (before,) = lab.draw([[]])
    full = dict(full=True, lr=lab.recipe["lr"] / 400)
    kinds = {f"rank {rank}": dict(rank=rank) for rank in RANKS} | {"full": full}
    kinds |= {"rank 4, P empty": dict(preserve=[]), "full, P empty": full | dict(preserve=[])}
    for name, kind in kinds.items():

        def measure():
            slider = lab.text_slider("age", **kind)
            drawn = lab.draw([[(slider, scale)] for scale in SCALES])
            return [lab.edit("age", before, after) for after in drawn]

        rows = lab.once(name, measure)
        if lab.small:
            lab.once(f"{name}, age moved by {AMOUNT}", lambda: at_amount(rows, SCALES, AMOUNT))
    shown = {"plain": before}
    for name in ("rank 4", "rank 4, P empty"):
        (shown[name],) = lab.draw([[(lab.text_slider("age", **kinds[name]), 2.0)]])
    lab.sheet(list(shown.values()), list(shown))


if __name__ == "__main__":
    cli.run(main)
