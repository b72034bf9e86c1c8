"""Table 2 and Figure 4: visual sliders.

    python -m experiments.visual_sliders

Eye size, of which words say little, from 16 pairs of drawn faces (eye size 0.6 and 1.6, all else
the same), against a text slider, a plain LoRA trained on the big-eyed half alone (B), and the
paper's noise target. Eye size is measured exactly: the width of the eyes in pixels. On another
model the pairs are read from --neg and --pos."""

from pathlib import Path

import torch

import train_pairs
from experiments.common import Lab
from extras import metrics
from miniature import effect, measure
from miniature import pairs as drawn_pairs
from miniature.world import RANGES
from support import cli, images, training

SCALES = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
PROMPT = "a photo of a person"


def add_options(p):
    p.add_argument("--neg", metavar="DIR")
    p.add_argument("--pos", metavar="DIR")


def measured(lab, drawn) -> dict:
    """Of a column of pictures for each of SCALES."""
    before = drawn[SCALES.index(0.0)]
    found = {"lpips": [lab.lpips(before, after)["mean"] for after in drawn]}
    if not lab.small:
        return found
    table = effect.table(drawn)
    found |= effect.summary(table, "eye_size")
    widths = [[measure.eye_pixels(picture) for picture in column] for column in drawn]
    found["pixels"] = [metrics.interval(column) for column in widths]
    found["malformed"] = (table["malformed"] > 0.5).mean(1).tolist()
    return found


def main():
    lab = Lab(__doc__, "visual_sliders", add_options)
    if lab.args.pos:
        files = images.match_by_name([Path(lab.args.neg), Path(lab.args.pos)])
        groups = [images.read_group(pair, lab.size) for pair in files]
    else:
        groups = drawn_pairs.draw("eye_size", RANGES["eye_size"], 16, lab.seed)
    latents = torch.stack([lab.model.encode(group) for group in groups])  # (n, 2, 4, h, w)
    cond, recipe = lab.model.condition([PROMPT], lab.size), training.recipe(lab.model.unet)

    def by_pairs(name, folders, scales, target):
        """A slider from the pictures of `folders` (0: neg, 1: pos), each at its scale."""
        scales = torch.tensor(scales, device=lab.model.device)

        def collect(z, seed):
            settings = dict(noises=32, batch=32, target=target, seed=seed)
            return train_pairs.collect(lab.model, z, scales, cond, **settings)

        def teach():
            seen, unseen = latents[2:, folders], latents[:2, folders]
            return collect(seen, 2 * lab.seed + 1), collect(unseen, 2 * lab.seed + 2)

        return lab.load_or_train(f"eyes_{name}_seed{lab.seed}", teach, recipe, 4, lab.seed)

    sliders = {
        "visual slider": by_pairs("pairs", [0, 1], [-1.0, 1.0], "shared"),
        "with the noise target": by_pairs("noise", [0, 1], [-1.0, 1.0], "noise"),
        "LoRA on B alone": by_pairs("B", [1], [1.0], "noise"),
    }
    if lab.small:
        sliders["text slider"] = lab.text_slider("eye size")
    shown = []
    for name, slider in sliders.items():
        draw = lambda scales: lab.draw([[(slider, scale)] for scale in scales])
        lab.once(name, lambda: measured(lab, draw(SCALES)))
        shown.append(draw([-2.0, 2.0]))
    (plain,) = lab.draw([[]])
    columns = [shown[0][0], plain, shown[0][1], shown[2][1]]
    names = ["slider -2", "plain", "slider +2", "B alone +2"]
    if lab.small:
        columns.append(shown[3][1])
        names.append("text +2")
    lab.sheet(columns, names)


if __name__ == "__main__":
    cli.run(main)
