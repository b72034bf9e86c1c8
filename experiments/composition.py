"""Figures 6 and 7: two sliders as a grid, and up to 50 at once: what remains of each?  python -m experiments.composition

Sliders of ten attributes, trained with five seeds each (half the usual steps, half the x_t). For n from 1 to 50 the first n of them, in turn
one of each attribute, are drawn together at scale 1 / (how many there are of their attribute). What remains of an attribute is
its change with all n at once, as a share of its change with its own sliders alone.
"""

import numpy as np

import cli
import evaluate
import lora
import pictures
import train_text
from experiments.common import Lab, moved
from miniature.compose import PERSON, SLIDERS

COUNTS = [1, 2, 5, 10, 20, 30, 40, 50]


def main():
    lab = Lab(__doc__, "composition", count=24)
    recipe = lab.recipe | {"steps": lab.recipe["steps"] // 2}

    def train(i):
        """The i-th of 50: attribute and training seed in turn."""
        attribute, seed = list(SLIDERS)[i % 10], i // 10
        pos, neg, preserve = SLIDERS[attribute]
        encode = lambda: train_text.encode(lab.model, [PERSON], f"{PERSON}, {pos}", f"{PERSON}, {neg}", train_text.combinations(preserve), lab.size)
        teach = lambda: train_text.teach(lab.model, encode(), trajectories=8, eta=recipe["eta"], size=lab.size, seed=10 * lab.seed + seed, batch=4 * recipe["batch"])
        return attribute, lab.kept(f"many_{attribute.replace(' ', '-')}_{10 * lab.seed + seed}", teach, recipe, lora.Slider, 4)

    sliders = [train(i) for i in range(COUNTS[-1])]
    before, = lab.draw([[]])

    def alone(attribute, k):
        """How far the first k sliders of one attribute move it, at scale 1 / k each."""
        drawn = lambda: lab.draw([[(s, 1.0 / k) for name, s in sliders if name == attribute][:k]])[0]
        return lab.once(f"alone: {attribute}, {k}", lambda: moved(before, drawn(), attribute)["moved"]["mean"])

    for n in COUNTS:
        of = {a: sum(name == a for name, _ in sliders[:n]) for a, _ in sliders[:n]}  # attribute -> how many
        own = {a: alone(a, k) for a, k in of.items()}

        def measure():
            together, = lab.draw([[(s, 1.0 / of[a]) for a, s in sliders[:n]]])
            remains = {a: moved(before, together, a)["moved"]["mean"] / own[a] for a in of}
            return {"remains": remains, "mean": float(np.mean(list(remains.values()))), "malformed": moved(before, together, "age")["malformed"],
                    "lpips": evaluate.interval(evaluate.lpips(lab.judges, before, together))}
        lab.once(f"{n} sliders", measure)

    # Figure 6: the first seed, age across, smile down.
    (_, age), (_, smile) = sliders[0], sliders[1]
    scales, seeds = [-2.0, -1.0, 0.0, 1.0, 2.0], lab.seeds
    lab.seeds = seeds[:1]
    grid = lab.draw([[(age, a), (smile, b)] for b in scales for a in scales], ["a portrait of a person"])
    names = [pictures.label(s) for s in scales]
    pictures.save(pictures.sheet([[column[0] for column in grid[5 * i:5 * i + 5]] for i in range(5)], names, names), lab.path.with_name(lab.path.stem + "_grid.png"))
    # Figure 7: more and more at once.
    lab.seeds = seeds[:4]
    shown = [lab.draw([[(s, 0.5) for _, s in sliders[:n]]])[0] for n in (0, 1, 2, 5, 10)]
    lab.sheet(shown, [f"{n} sliders" for n in (0, 1, 2, 5, 10)])


if __name__ == "__main__":
    cli.run(main)
