"""The appendix: sliders on real pictures.

    python -m experiments.inversion

Pictures of the drawn world that no training saw, inverted by each method of invert.py at guidance
5 and drawn again: how close (PSNR; the VAE's own round trip is the ceiling), for how many network
evaluations. Then sliders on the inverted pictures. With --model, --image names the pictures (a
folder; names are their prompts)."""

import functools
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
BATCH = 16  # pictures inverted at once


def held_out(n: int, seed: int):
    """n faces of the world, drawn and described."""
    rng = np.random.default_rng([2311, 12092, seed])
    faces = [world.sample(rng, kind="face", malformed=0) for _ in range(n)]
    return [world.draw(face) for face in faces], [world.caption(face, rng) for face in faces]


def read_folder(folder: Path, size):
    """The pictures in a folder, each cropped to `size`, and their names."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in images.ENDINGS)
    pictures = [images.crop_and_resize(images.read_image(f), *size) for f in files]
    return pictures, [f.stem for f in files]


def add_options(p):
    image = "another model: pictures named by their prompts"
    p.add_argument("--image", metavar="DIR", help=image)


def main():
    lab = Lab(__doc__, "inversion", add_options, count=32, dtype="float32")
    model = lab.model
    if lab.args.image:
        originals, prompts = read_folder(Path(lab.args.image), lab.size)
    else:
        originals, prompts = held_out(lab.args.pictures, lab.seed)
    settings = dict(alpha_bar=model.alpha_bar, steps=STEPS, guidance=GUIDANCE)
    parts = [slice(i, i + BATCH) for i in range(0, len(originals), BATCH)]
    z, empty = model.encode(originals), model.condition([""], lab.size)
    cond = model.condition(prompts, lab.size)
    cond_parts = [tuple(c[part] for c in cond) for part in parts]
    roundtrip = model.decode(z)
    lab.once("VAE alone", lambda: {"psnr": metrics.interval(metrics.psnr(originals, roundtrip))})

    @functools.cache
    def inverted(method) -> list:
        """An invert.Inversion for each of `parts`."""
        how = dict(method=method, **settings)
        pairs = zip(parts, cond_parts)
        return [invert.invert(model.unet, z[part], c, empty, **how) for part, c in pairs]

    @functools.cache
    def drawn(method) -> list:
        """The inverted pictures drawn again, without a slider."""
        pictures = []
        for c, inversion in zip(cond_parts, inverted(method)):
            x_T, uncond = inversion.x_T, inversion.uncond
            pictures += model.decode(sampler.sample(model.unet, x_T, c, uncond, **settings))
        return pictures

    methods = list(reversed(invert.METHODS))
    some_are_new = any(method not in lab.results for method in methods)
    for method in methods:

        def measure():
            evaluations = sum(inversion.evaluations for inversion in inverted(method))
            return {
                "psnr": metrics.interval(metrics.psnr(originals, drawn(method))),
                "lpips": lab.lpips(originals, drawn(method)),
                "evaluations": evaluations / len(originals),
            }

        lab.once(method, measure)
    if some_are_new:
        columns = [originals, roundtrip, *map(drawn, methods)]
        lab.sheet(columns, ["original", "VAE", *methods], rows=6)

    def edit_all(method, one) -> list[list]:
        """The inverted pictures with the slider `one`: a list for each of SCALES."""
        columns, by_scale = [[] for _ in SCALES], [[(one, scale)] for scale in SCALES]
        for i, prompt in enumerate(prompts):
            inversion, row = inverted(method)[i // BATCH], slice(i % BATCH, i % BATCH + 1)
            inverse = dict(
                start_from=lambda _: inversion.x_T[row],
                uncond=[tuple(c[row] for c in uncond) for uncond in inversion.uncond],
            )
            again = dict(steps=STEPS, guidance=GUIDANCE, start=START, size=lab.size)
            drawn = slider.sweep(model, prompt, [i], by_scale, **inverse, **again)
            for column, pictures in zip(columns, drawn):
                column += pictures
        return columns

    for method in ("null-text", "negative-prompt"):
        for concept in EDITS:

            def measure_edit():
                columns = edit_all(method, lab.text_slider(concept))
                if method == "null-text":
                    rows = [list(row) for row in zip(originals[:6], *columns)]
                    names = ["original", *map(images.scale_label, SCALES)]
                    lab.save_sheet(rows, names, [""] * len(rows), concept.replace(" ", "_"))
                result = {"lpips at 0": lab.lpips(originals, columns[SCALES.index(0.0)])}
                if lab.small:
                    attribute = lab.all_concepts[concept].attribute
                    result |= effect.summary(effect.table(columns), attribute)
                return result

            lab.once(f"{concept} by {method}", measure_edit)


if __name__ == "__main__":
    cli.run(main)
