"""Figures 8 and 9: sliders that repair a model's own mistakes.

    python -m experiments.repair

One slider toward well-made faces, one toward well-made hands with the paper's prompts as they
stand. The same seeds from plain prompts with and without each: how many faces and hands are
malformed, or have not five fingers (Wilson's intervals), FID to well-made pictures, what else
moved, and how many pictures keep who they show. On another model (--model) there is no measuring
stick: the pairs of pictures go to the preference study (experiments/preference.py), FID to the
folder --good."""

import functools
from pathlib import Path

import numpy as np

from experiments.common import Lab, moved
from extras import metrics
from miniature import world
from miniature.measure import measure, wrong
from support import cli, images

SCALE = 2.0
START = {"faces": 0.3, "hands": 0.15}  # a finger too many is there early in the denoising
SCALES = [0.0, 1.0, 2.0, 3.0]
PLAIN = {  # what is repaired -> plain prompts, of which no training used but the first
    "faces": ["a photo of a person", "a portrait of a person", "a picture of a man", "a woman"],
    "hands": ["a hand", "a photo of a hand", "an open hand", "a picture of a person's hand"],
}
PLAIN_SDXL = {
    "faces": [
        "image of a person, 8k, realistic",
        "a photo of a man in a street",
        "a portrait of a woman",
        "a photo of three friends",
    ],
    "hands": [
        "a photo of a hand",
        "a person waving",
        "hands holding an apple",
        "a woman with her hand on her chin",
    ],
}
# Who is shown, in words and yes/no.
IDENTITY = {
    "faces": ["sex", "hair", "background", "glasses", "hat", "hair_length"],
    "hands": ["background"],  # of the other attributes a hand has skin alone
}
OF_HANDS = ("background", "skin", "face")


def same_identity(before: dict, after: dict, names: list[str]) -> float:
    """Share of pictures in which none of `names` changes."""

    def same(name):
        a, b = before[name], after[name]
        is_word = a.dtype.kind == "U"
        return a == b if is_word else (a > 0.5) == (b > 0.5)

    return float(np.mean(np.logical_and.reduce([same(name) for name in names])))


def well_made(lab, what: str) -> list | None:
    """What FID is measured to: drawn pictures of the world, none malformed; on another model those
    in --good, or None."""
    if lab.small:
        rng = np.random.default_rng([88, lab.seed])
        faces_or_hands = dict(kind=what[:-1], malformed=0)
        return [world.draw(world.sample(rng, **faces_or_hands)) for _ in lab.seeds]
    if lab.args.good:
        return [images.read_image(file) for file in sorted(Path(lab.args.good).iterdir())]
    return None


def measured(lab, what: str, good, before, after) -> dict:
    found = {"fid": metrics.fid(lab.judges, after, good)} if good else {}
    found["lpips"] = lab.lpips(before, after)
    if not lab.small:
        return found
    a, b = measure(before), measure(after)
    wrong_before, wrong_after = wrong(a, what[:-1]), wrong(b, what[:-1])
    found |= {
        "wrong": metrics.wilson(int(wrong_after.sum()), len(after)),
        "mended": int((wrong_before & ~wrong_after).sum()),
        "broken": int((~wrong_before & wrong_after).sum()),
        "kept": same_identity(a, b, IDENTITY[what]),
    }
    others = moved(before, after, "malformed", OF_HANDS if what == "hands" else ())
    return found | {name: value for name, value in others.items() if "other" in name}


def save_pairs(lab, what: str, before, after):
    """The pictures for the preference study; not in the repository."""
    folder = Path(lab.args.sliders) / f"repair_seed{lab.seed}" / what
    for name, pictures in (("without", before), ("with", after)):
        for seed, picture in zip(lab.seeds, pictures):
            images.save_image(picture, folder / name / f"{seed}.png")


def save_sheet(lab, what: str, before, after):
    """Twelve wrong pictures, whatever became of them; then four good ones."""
    bad = np.flatnonzero(wrong(measure(before), what[:-1])) if lab.small else np.arange(16)
    good = [i for i in range(len(before)) if i not in bad]
    chosen = [*bad[:12], *good[:4]]
    rows = []
    for part in (chosen[:8], chosen[8:]):
        rows += [[pictures[i] for i in part] for pictures in (before, after)]
    lab.save_sheet(rows, [""] * len(rows[0]), ["without", "with"] * 2, what)


def add_options(p):
    good = "another model: well-made pictures, for FID"
    p.add_argument("--good", metavar="DIR", help=good)


def main():
    lab = Lab(__doc__, "repair", add_options, count=256)
    for what, prompts in (PLAIN if lab.small else PLAIN_SDXL).items():
        slider, good = lab.text_slider(what), well_made(lab, what)
        columns = [[(slider, scale, START[what])] for scale in SCALES]
        drawn = functools.cache(lambda: lab.draw(columns, prompts))
        for i, scale in enumerate(SCALES):
            measure_scale = lambda: measured(lab, what, good, drawn()[0], drawn()[i])
            lab.once(f"{what}: scale {scale:g}", measure_scale)
        before, after = drawn()[0], drawn()[SCALES.index(SCALE)]
        save_pairs(lab, what, before, after)
        save_sheet(lab, what, before, after)


if __name__ == "__main__":
    cli.run(main)
