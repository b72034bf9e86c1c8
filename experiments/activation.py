"""Delayed activation, and eta at training against alpha at inference.

    python -m experiments.activation

* The age slider at scale 2, switched on after 0 to 80% of the denoising: what it does, and what of
  the picture stays.
* Sliders trained at 0.5 to 4 times the default eta, drawn at scales that make eta times scale the
  same: is alpha at inference the same knob as eta at training?"""

import functools

from experiments.common import Lab
from support import cli

STARTS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
ETAS, PRODUCTS = [0.5, 1.0, 2.0, 4.0], [1.0, 2.0]


def main():
    lab = Lab(__doc__, "activation")
    (before,) = lab.draw([[]])
    age, shown = lab.text_slider("age"), {"plain": before}
    draw = functools.cache(lambda start: lab.draw([[(age, 2.0, start)]])[0])
    for start in STARTS:
        lab.once(f"start {start}", lambda: lab.edit("age", before, draw(start)))
        if start in (0.0, 0.2, 0.4, 0.6):
            shown[f"start {start}"] = draw(start)
    for factor in ETAS:
        for product in PRODUCTS:
            scale = product / factor

            def measure():
                slider = lab.text_slider("age", eta=factor * lab.recipe["eta"])
                (after,) = lab.draw([[(slider, scale)]])
                return lab.edit("age", before, after)

            lab.once(f"eta {factor:g} times the default, scale {scale:g}", measure)
    lab.sheet(list(shown.values()), list(shown))


if __name__ == "__main__":
    cli.run(main)
