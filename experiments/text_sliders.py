"""Table 1: text sliders against prompting, the training-free reference and full fine-tuning.

    python -m experiments.text_sliders

Four concepts. All methods edit the same seeds, whose prompts (miniature/effect.py's eight, less
those that name the attribute) no training used:
* slider: rank 4, at scales 1 and 2, on from 30% of the denoising;
* prompt: the words of the positive end are added to the prompt;
* eq. (8) itself while sampling, at twice the eta that the sliders were trained with, from the same
  30% on;
* full fine-tuning of the layers that the slider changes, by the same loss on the same targets, at
  scale 2."""

import functools

from experiments.common import Lab
from miniature import effect
from support import cli
from train_text import ends_difference


def main():
    lab = Lab(__doc__, "text_sliders")
    plain = functools.cache(lambda prompts: lab.draw([[]], prompts)[0])
    full = dict(full=True, lr=lab.recipe["lr"] / 400)
    for concept, (_, pos, _, _, _) in lab.concepts.items():
        prompts = tuple(lab.prompts_for(concept))
        before = plain(prompts)

        def by_slider(scale, **kind):
            slider = lab.text_slider(concept, **kind)
            return lab.draw([[(slider, scale)]], prompts)[0]

        def by_prompt():
            return lab.draw([[]], [f"{prompt}, {pos}" for prompt in prompts])[0]

        def by_eq_8():
            _, ends, _ = lab.encode(concept)
            delta = lambda x_t, t: ends_difference(lab.model.unet, x_t, t, ends)
            return lab.draw([[]], prompts, delta=delta, etas=[2 * lab.recipe["eta"]])[0]

        methods = {
            "slider, scale 1": lambda: by_slider(1.0),
            "slider, scale 2": lambda: by_slider(2.0),
            "prompt": by_prompt,
            "eq. (8)": by_eq_8,
            "full fine-tuning": lambda: by_slider(2.0, **full),
        }
        for method, draw in methods.items():
            lab.once(f"{concept}: {method}", lambda: lab.edit(concept, before, draw()))
    concepts = list(lab.concepts)[:4]
    sliders = [lab.text_slider(concept) for concept in concepts]
    columns = [[(slider, 2.0 * (slider is on)) for slider in sliders] for on in (None, *sliders)]
    free = [p for p in lab.prompts if all(p in lab.prompts_for(concept) for concept in concepts)]
    lab.sheet(effect.pictures(lab.model, columns, lab.seeds[:4], free), ["plain", *concepts])


if __name__ == "__main__":
    cli.run(main)
