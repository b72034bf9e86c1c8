"""The appendix: sliders on real pictures.  python -m experiments.inversion

Pictures of the drawn world that no training saw, inverted by each method of invert.py at guidance 5 and drawn again: how close
(PSNR; the VAE's own round trip is the ceiling), for how many network evaluations. Then sliders on the inverted pictures. With
--model, --image names the pictures (a folder; names are their prompts).
"""

from pathlib import Path

import numpy as np

import invert
import sampler
import slider
from experiments.common import Lab
from extras import metrics
from miniature import effect, world
from support import cli, images

GUIDANCE, STEPS = 5.0, 30
SCALES = [-2.0, -1.0, 0.0, 1.0, 2.0]
START = 0.3
EDITS = ["age", "smile", "eye size"]


def held_out(n: int, seed: int):
    """n faces of the world, drawn and described."""
    rng = np.random.default_rng([2311, 12092, seed])
    faces = [world.sample(rng, kind="face", malformed=0) for _ in range(n)]
    return [world.draw(a) for a in faces], [world.caption(a, rng) for a in faces]


def main():
    lab = Lab(
        __doc__,
        "inversion",
        lambda p: p.add_argument(
            "--image", metavar="DIR", help="another model: pictures named by their prompts"
        ),
        count=32,
        dtype="float32",
    )
    model = lab.model
    if lab.args.image:
        files = sorted(
            f for f in Path(lab.args.image).iterdir() if f.suffix.lower() in images.ENDINGS
        )
        originals, prompts = (
            [images.crop_and_resize(images.read_image(f), *lab.size) for f in files],
            [f.stem for f in files],
        )
    else:
        originals, prompts = held_out(lab.args.pictures, lab.seed)
    settings = dict(alpha_bar=model.alpha_bar, steps=STEPS, guidance=GUIDANCE)
    parts = [slice(i, i + 16) for i in range(0, len(originals), 16)]
    z, cond, empty = (
        model.encode(originals),
        model.condition(prompts, lab.size),
        model.condition([""], lab.size),
    )
    roundtrip = model.decode(z)
    lab.once("VAE alone", lambda: {"psnr": metrics.interval(metrics.psnr(originals, roundtrip))})

    def inverted(method):
        for part in parts:
            yield (
                part,
                invert.invert(
                    model.unet,
                    z[part],
                    tuple(c[part] for c in cond),
                    empty,
                    method=method,
                    **settings,
                ),
            )

    shown, found = {"original": originals, "VAE": roundtrip}, {}
    for method in reversed(invert.METHODS):

        def measure():
            drawn, n = [], 0
            for part, inversion in inverted(method):
                found[method, part.start] = inversion
                n += inversion.evaluations
                drawn += model.decode(
                    sampler.sample(
                        model.unet,
                        inversion.x_T,
                        tuple(c[part] for c in cond),
                        inversion.uncond,
                        **settings,
                    )
                )
            shown[method] = drawn
            return {
                "psnr": metrics.interval(metrics.psnr(originals, drawn)),
                "lpips": metrics.interval(metrics.lpips(lab.judges, originals, drawn)),
                "evaluations": n / len(originals),
            }

        lab.once(method, measure)

    for method in ("null-text", "negative-prompt"):
        for concept in EDITS:

            def edit():
                one = lab.text_slider(concept)
                if (method, 0) not in found:
                    found.update(
                        {(method, part.start): inversion for part, inversion in inverted(method)}
                    )
                columns = [[] for _ in SCALES]
                for i, prompt in enumerate(prompts):
                    inversion, row = found[method, i // 16 * 16], slice(i % 16, i % 16 + 1)
                    uncond = [tuple(c[row] for c in u) for u in inversion.uncond]
                    drawn = slider.sweep(
                        model,
                        prompt,
                        [i],
                        [[(one, s)] for s in SCALES],
                        start_from=lambda _: inversion.x_T[row],
                        uncond=uncond,
                        steps=STEPS,
                        guidance=GUIDANCE,
                        start=START,
                        size=lab.size,
                    )
                    for column, here in zip(columns, drawn):
                        column += here
                if method == "null-text":
                    rows = [[o, *(c[i] for c in columns)] for i, o in enumerate(originals[:6])]
                    images.save_image(
                        images.contact_sheet(
                            rows, ["original", *map(images.scale_label, SCALES)], [""] * len(rows)
                        ),
                        lab.path.with_name(f"{lab.path.stem}_{concept.replace(' ', '_')}.png"),
                    )
                result = {
                    "lpips at 0": metrics.interval(
                        metrics.lpips(lab.judges, originals, columns[SCALES.index(0.0)])
                    )
                }
                if lab.small:
                    result |= effect.summary(
                        effect.table(columns), lab.all_concepts[concept][-1], SCALES
                    )
                return result

            lab.once(f"{concept} by {method}", edit)
    if len(shown) > 2:
        lab.sheet(list(shown.values()), list(shown), rows=6)


if __name__ == "__main__":
    cli.run(main)
