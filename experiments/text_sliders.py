"""Table 1: text sliders against prompting, the training-free reference and full fine-tuning.  python -m experiments.text_sliders

Four concepts. All methods edit the same seeds, whose prompts (miniature/effect.py's eight) no training used:
* slider: rank 4, at scales 1 and 2, on from 30% of the denoising;
* prompt: the words of the positive end are added to the prompt;
* eq. (8) itself while sampling, at twice the eta that the sliders were trained with, from the same 30% on;
* full fine-tuning of the layers that the slider changes, by the same loss on the same targets, at scale 2.
"""

import functools

from experiments.common import Lab
from support import cli


def main():
    lab = Lab(__doc__, "text_sliders")
    (before,) = lab.draw([[]])
    shown = [before]
    for concept, (_, pos, _, _, _) in lab.concepts.items():

        def by_slider(**kind):
            slider = lab.text_slider(concept, **kind)
            return lambda scale: lab.draw([[(slider, scale)]])[0]

        def by_eq_8():
            return lab.draw([[]], ends=lab.encode(concept)[1], etas=[2 * lab.recipe["eta"]])[0]

        at_2 = functools.cache(lambda: by_slider()(2.0))  # measured and shown
        ways = {
            "slider, scale 1": lambda: by_slider()(1.0),
            "slider, scale 2": at_2,
            "prompt": lambda: lab.draw([[]], [f"{p}, {pos}" for p in lab.prompts])[0],
            "eq. (8)": by_eq_8,
            "full fine-tuning": lambda: by_slider(full=True, lr=lab.recipe["lr"] / 400)(2.0),
        }
        for way, draw in ways.items():
            lab.once(f"{concept}: {way}", lambda: lab.edit(concept, before, draw()))
        if len(shown) < 5:
            shown.append(at_2())
    lab.sheet(shown, ["plain", *list(lab.concepts)[:4]])


if __name__ == "__main__":
    cli.run(main)
