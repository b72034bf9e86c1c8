"""Figures 6 and 7: two sliders as a grid, and up to 50 at once: what remains of each?  python -m experiments.composition

50 sliders: of each concept in turn, with another training seed each time around (half the usual steps, half the x_t). The first
n of them are drawn together, each at scale 1 / (how many there are of its concept), on from 15% of the denoising. What remains is
the concepts' effects with all n at once, added up, as a share of the sum of each one's effect alone, with its own sliders:
how far the attribute moved by the measuring stick, on other models the change in CLIP score.
"""

from experiments.common import TEN, Lab, moved
from extras import evaluate
from support import cli, images

COUNTS = [1, 2, 5, 10, 20, 30, 40, 50]
START = 0.15  # sex and glasses are laid out early
PROMPTS = [
    "a photo of a person",
    "a picture of a person",
    "a portrait of a person",
    "a person",
]  # that name none of the attributes


def main():
    lab = Lab(__doc__, "composition", count=24)
    concepts = list(TEN if lab.small else lab.concepts)

    def train(i):
        concept = concepts[i % len(concepts)]
        return concept, lab.text_slider(
            concept,
            seed=10 * lab.seed + i // len(concepts),
            steps=lab.recipe["steps"] // 2,
            trajectories=8,
        )

    sliders, prompts = [train(i) for i in range(COUNTS[-1])], PROMPTS if lab.small else None
    draw = lambda pairs: lab.draw([[(s, scale, START) for s, scale in pairs]], prompts)[0]
    before = draw([])

    def effect(concept, after):
        target, pos, _, _, attribute = lab.all_concepts[concept]
        if lab.small:
            return moved(before, after, attribute)["moved"]["mean"]
        return float(evaluate.clip_change(lab.judges, before, after, f"{target}, {pos}").mean())

    def alone(concept, k):
        """The effect of the first k sliders of one concept, at scale 1 / k each."""
        mine = [(s, 1.0 / k) for name, s in sliders if name == concept][:k]
        return lab.once(f"alone: {concept}, {k}", lambda: effect(concept, draw(mine)))

    for n in COUNTS:
        of = {
            c: sum(name == c for name, _ in sliders[:n]) for c, _ in sliders[:n]
        }  # concept -> how many of it
        own = {c: alone(c, k) for c, k in of.items()}

        def measure():
            together = draw([(s, 1.0 / of[c]) for c, s in sliders[:n]])
            effects = {c: effect(c, together) for c in of}
            return {
                "alone": own,
                "together": effects,
                "remains": sum(effects.values()) / sum(own.values()),
                "lpips": evaluate.interval(evaluate.lpips(lab.judges, before, together)),
                "malformed": moved(before, together, "age")["malformed"] if lab.small else None,
            }

        lab.once(f"{n} sliders", measure)

    # Figure 6: the first seed, the first concept across, the second down. Figure 7: more and more at once.
    (_, first), (_, second) = sliders[0], sliders[1]
    scales, lab.seeds = [-2.0, -1.0, 0.0, 1.0, 2.0], lab.seeds[:4]
    shown = [draw([(s, 1.0) for _, s in sliders[:n]]) for n in (0, 1, 2, 5, 10)]
    lab.sheet(shown, [f"{n} sliders" for n in (0, 1, 2, 5, 10)])
    lab.seeds = lab.seeds[:1]
    grid = lab.draw(
        [[(first, a, START), (second, b, START)] for b in scales for a in scales], prompts
    )
    names = [images.scale_label(s) for s in scales]
    images.save_image(
        images.contact_sheet(
            [[column[0] for column in grid[5 * i : 5 * i + 5]] for i in range(5)], names, names
        ),
        lab.path.with_name(lab.path.stem + "_grid.png"),
    )


if __name__ == "__main__":
    cli.run(main)
