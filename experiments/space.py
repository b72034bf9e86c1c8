"""SliderSpace: eight sliders from "a photo of a person", what they move, and directions at random
as a control.

    python -m experiments.space

Three sets of directions in the same span: principal ones, as in the paper; the same turned to
independent ones (train_space.independent_rotation); and the same turned at random, as a control.

* Effect: the features of held-out seeds at scales -2 to 2, along each slider's own direction; the
  effect of a slider is the mean change of the features from -2 to 2. Its cosine with its own
  direction, and between the effects of different sliders.
* Attributes (the miniature): which one each slider moves most, and the next.
* Diversity: mean distance of pictures, each with all independent sliders at random scales, against
  plain ones; malformed faces in both."""

import numpy as np
import torch
import torch.nn.functional as F

from experiments.common import Lab
from experiments.space_sliders import BATCH, PROMPT, K, SpaceSliders
from miniature import effect
from support import cli, clip, images
from train_space import SCALES

KINDS = ("independent", "principal", "random")


@torch.no_grad()
def features(space: SpaceSliders, drawn):
    """Unit-length features of N pictures: (N, d), on the CPU."""
    arrays = [torch.from_numpy(np.array(p)).permute(2, 0, 1).float() for p in drawn]
    parts = (torch.stack(arrays) / 127.5 - 1).split(BATCH)
    seen = [space.encoder(part.to(space.model.device)).float().cpu() for part in parts]
    return F.normalize(torch.cat(seen), dim=-1)


def measure(space: SpaceSliders, kind: str) -> dict:
    """Of one set: a row for each slider, and what sums them up."""
    sliders = space.load_or_train(kind)
    v, _, share = space.directions(kind)
    v = v.cpu()
    hints = clip.name_directions(space.encode, PROMPT, clip.words_of(space.model), v)
    rows, changes = [], []
    for i, slider in enumerate(sliders):
        drawn = space.draw(space.lab.seeds, [[(slider, scale)] for scale in SCALES])
        f = [features(space, column) for column in drawn]
        changes.append((f[-1] - f[0]).mean(0))
        along = [float((x @ v[i]).mean()) for x in f]
        row = {
            "along": along,
            "monotonic": bool((np.diff(along) > 0).all()),
            "cosine": float(F.cosine_similarity(changes[i], v[i], dim=0)),
            "words": hints[i],
        }
        if share is not None:
            row["share"] = float(share[i])
        rows.append(row | (most_moved(drawn) if space.lab.small else {}))
    unit = F.normalize(torch.stack(changes), dim=-1)
    of_two_sliders = ~torch.eye(K, dtype=bool)
    return {
        "sliders": rows,
        "mean_cosine": float(np.mean([row["cosine"] for row in rows])),
        "between": float((unit @ unit.T)[of_two_sliders].abs().mean()),
        "seconds": float(sliders[0].metadata["seconds"]),  # of the training, whenever it was
    }


def most_moved(columns) -> dict:
    """The attribute that moves most over the columns of pictures, and the next one that is no word
    of the same."""
    moves = {name: effect.moved(rows, name) for name, rows in effect.table(columns).items()}
    first = max(moves, key=moves.get)
    second = max(effect.others(moves, first), key=moves.get)
    most = {"attribute": first, "moved": moves[first]}
    return most | {"next": second, "next_moved": moves[second]}


def diversity(space: SpaceSliders) -> dict:
    """Of plain pictures, and of the same seeds with every independent slider at a random scale."""
    lab, sliders = space.lab, space.load_or_train("independent")
    rng = np.random.default_rng(lab.seed)
    seeds = range(lab.seeds[0], lab.seeds[0] + 4 * len(lab.seeds))
    (plain,), varied = space.draw(seeds, [[]]), []
    for seed in seeds:
        column = [(slider, float(rng.uniform(-2, 2))) for slider in sliders]
        varied += space.draw([seed], [column])[0]
    lab.save_sheet([plain[:8], varied[:8]], [""] * 8, ["plain", "random"], "diversity")
    found = {}
    for name, drawn in (("plain", plain), ("random sliders", varied)):
        distance = float(torch.pdist(lab.judges.inception(drawn)).mean())
        malformed = effect.attributes(drawn)["malformed"] > 0.5 if lab.small else None
        share = float(malformed.mean()) if lab.small else None
        found[name] = {"distance": distance, "malformed": share}
    return found


def save_sheet(space: SpaceSliders, kind: str, results: dict):
    """The first seed: a row for each slider, a column for each scale."""
    rows, names = [], []
    for i, slider in enumerate(space.load_or_train(kind)):
        drawn = space.draw(space.lab.seeds[:1], [[(slider, scale)] for scale in SCALES])
        rows.append([column[0] for column in drawn])
        attribute = results["sliders"][i].get("attribute", str(i + 1))
        names.append(attribute.replace("_", " "))
    space.lab.save_sheet(rows, [images.scale_label(scale) for scale in SCALES], names, kind)


def main():
    add_options = lambda p: p.add_argument("--clip", help="as in train_space.py")
    lab = Lab(__doc__, "space", add_options, count=12, dtype="float32")
    space = SpaceSliders(lab)
    found = {kind: lab.once(kind, lambda: measure(space, kind)) for kind in KINDS}
    lab.once("diversity", lambda: diversity(space))
    for kind, results in found.items():
        save_sheet(space, kind, results)


if __name__ == "__main__":
    cli.run(main)
