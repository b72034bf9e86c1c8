"""Figures 8 and 9: sliders that repair a model's own mistakes.  python -m experiments.repair

One slider toward well-made faces, one toward well-made hands with the paper's prompts as they stand. The same seeds from plain
prompts with and without each: how many faces are malformed, how many hands have not five fingers (Wilson's intervals), FID to
well-made pictures, what else moved, and how many pictures keep who they show. On another model (--model) there is no measuring
stick: the pairs of pictures go to the preference study (experiments/preference.py), FID to the folder --good.
"""

import functools
from pathlib import Path

import numpy as np

from experiments.common import Lab, moved
from extras import metrics
from miniature import world
from miniature.measure import measure
from support import cli, images

SCALE = 2.0
START = {"faces": 0.3, "hands": 0.15}  # a finger too many is there early in the denoising
SCALES = [1.0, 2.0, 3.0]
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
KEPT = [
    "sex",
    "hair",
    "background",
    "glasses",
    "hat",
    "hair_length",
]  # who a face shows, in words and yes/no


def wrong(readings: dict, what: str) -> np.ndarray:
    """(N,) bool: a malformed face, or a hand without exactly five fingers; a picture of something else is wrong too."""
    if what == "faces":
        return (readings["malformed"] > 0.5) | (readings["kind"] != "face")
    return (readings["fingers"] != 5) | (readings["kind"] != "hand")


def kept(before: dict, after: dict) -> float:
    """Share of pictures that keep every one of KEPT."""
    same = (
        lambda name: before[name] == after[name]
        if before[name].dtype.kind == "U"
        else (before[name] > 0.5) == (after[name] > 0.5)
    )
    return float(np.mean(np.logical_and.reduce([same(name) for name in KEPT])))


def well_made(what: str, n: int, seed: int):
    """Drawn pictures of the world, none malformed: what FID is measured to."""
    rng = np.random.default_rng([88, seed])
    return [world.draw(world.sample(rng, kind=what[:-1], malformed=0)) for _ in range(n)]


def main():
    lab = Lab(
        __doc__,
        "repair",
        lambda p: p.add_argument(
            "--good", metavar="DIR", help="another model: well-made pictures, for FID"
        ),
        count=256,
    )
    for what, prompts in (PLAIN if lab.small else PLAIN_SDXL).items():
        slider = lab.text_slider(what)
        good = (
            well_made(what, len(lab.seeds), lab.seed)
            if lab.small
            else [images.read_image(f) for f in sorted(Path(lab.args.good).iterdir())]
            if lab.args.good
            else None
        )

        every = functools.cache(
            lambda: lab.draw([[(slider, s, START[what])] for s in (0.0, *SCALES)], prompts)
        )  # drawn if anything is still to be measured

        def measured(after):
            found = {"fid": metrics.fid(lab.judges, after, good)} if good else {}
            found["lpips"] = metrics.interval(metrics.lpips(lab.judges, every()[0], after))
            if lab.small:
                a, b = measure(every()[0]), measure(after)
                found |= {
                    "wrong": metrics.wilson(int(wrong(b, what).sum()), len(after)),
                    "mended": int((wrong(a, what) & ~wrong(b, what)).sum()),
                    "broken": int((~wrong(a, what) & wrong(b, what)).sum()),
                    "kept": kept(a, b),
                }
                found |= {
                    k: v for k, v in moved(every()[0], after, "malformed").items() if "other" in k
                }
            return found

        for i, scale in enumerate((0.0, *SCALES)):
            lab.once(f"{what}: scale {scale:g}", lambda: measured(every()[i]))

        before, after = every()[0], every()[1 + SCALES.index(SCALE)]
        for seed, one, other in zip(
            lab.seeds, before, after
        ):  # for the preference study; not in the repository
            images.save_image(
                one, Path(lab.args.sliders) / "repair" / what / "without" / f"{seed}.png"
            )
            images.save_image(
                other, Path(lab.args.sliders) / "repair" / what / "with" / f"{seed}.png"
            )
        bad = np.flatnonzero(wrong(measure(before), what)) if lab.small else np.arange(16)
        chosen = [
            *bad[:12],
            *[i for i in range(len(before)) if i not in bad][:4],
        ]  # wrong ones, whatever became of them; then good ones
        rows = [
            [before[i] for i in chosen[:8]],
            [after[i] for i in chosen[:8]],
            [before[i] for i in chosen[8:]],
            [after[i] for i in chosen[8:]],
        ]
        images.save_image(
            images.contact_sheet(rows, [""] * len(rows[0]), ["without", "with"] * 2),
            lab.path.with_name(f"{lab.path.stem}_{what}.png"),
        )


if __name__ == "__main__":
    cli.run(main)
