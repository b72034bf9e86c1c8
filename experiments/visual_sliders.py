"""Table 2 and Figure 4: visual sliders.  python -m experiments.visual_sliders

Eye size, of which words say little, from 16 pairs of drawn faces (eye size 0.6 and 1.6, all else the same), against a text
slider, a plain LoRA trained on the big-eyed half alone (B), and the paper's noise target. Eye size is measured exactly: the
width of the eyes in pixels. On another model the pairs are read from --neg and --pos.
"""

from pathlib import Path

import torch

import lora
import train_pairs
from experiments.common import Lab
from extras import metrics
from miniature import effect, measure
from miniature import pairs as drawn_pairs
from support import cli, images, training

SCALES = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
PROMPT = "a photo of a person"


def main():
    lab = Lab(
        __doc__,
        "visual_sliders",
        lambda p: (p.add_argument("--neg", metavar="DIR"), p.add_argument("--pos", metavar="DIR")),
    )
    if lab.args.pos:
        groups = [
            images.read_group(files, lab.size[0])
            for files in images.match_by_name([Path(lab.args.neg), Path(lab.args.pos)])
        ]
    else:
        groups = drawn_pairs.draw("eye_size", [0.6, 1.6], 16, lab.seed)
    latents = torch.stack([lab.model.encode(group) for group in groups])  # (n, 2, 4, h, w)
    cond, recipe = lab.model.condition([PROMPT], lab.size), training.recipe(lab.model.unet)

    def by_pairs(name, which, scales, target, **changes):
        settings = recipe | changes
        teach = lambda: [
            train_pairs.collect(
                lab.model,
                z,
                torch.tensor(scales, device=lab.model.device),
                cond,
                noises=32,
                seed=2 * lab.seed + i,
                batch=32,
                target=target,
            )
            for i, z in ((1, latents[2:, which]), (2, latents[:2, which]))
        ]
        return lab.kept(
            f"eyes_{name}_seed{lab.seed}", teach, settings, lora.Slider, 4, seed=lab.seed
        )

    sliders = {
        "visual slider": by_pairs("pairs", [0, 1], [-1.0, 1.0], "shared"),
        "with the noise target": by_pairs("noise", [0, 1], [-1.0, 1.0], "noise"),
        "LoRA on B alone": by_pairs("B", [1], [1.0], "noise"),
    }
    if lab.small:
        sliders["text slider"] = lab.text_slider("eye size")
    shown = []
    for name, slider in sliders.items():

        def measure_all():
            drawn = lab.draw([[(slider, s)] for s in SCALES])
            before = drawn[SCALES.index(0.0)]
            found = {
                "lpips": [
                    metrics.interval(metrics.lpips(lab.judges, before, after))["mean"]
                    for after in drawn
                ]
            }
            if lab.small:
                table = effect.table(drawn)
                found |= {
                    k: v
                    for k, v in effect.summary(table, "eye_size", SCALES).items()
                    if k not in ("attribute", "scales")
                }
                found["pixels"] = [
                    metrics.interval([measure.eye_pixels(p) for p in column]) for column in drawn
                ]
                found["malformed"] = (table["malformed"] > 0.5).mean(1).tolist()
            return found

        lab.once(name, measure_all)
        shown.append(lab.draw([[(slider, s)] for s in (-2.0, 2.0)]))
    (plain,) = lab.draw([[]])
    lab.sheet(
        [shown[0][0], plain, shown[0][1], shown[2][1], shown[-1][1]],
        ["slider -2", "plain", "slider +2", "B alone +2", "text +2"],
    )


if __name__ == "__main__":
    cli.run(main)
