"""Figures 6 and 7: two sliders as a grid, and up to 50 at once: what remains of each?

    python -m experiments.composition

50 sliders: of each concept in turn, with another training seed each time around (half the usual
steps, half the x_t). The first n of them are drawn together, each at scale 1 / (how many there are
of its concept), on from 15% of the denoising. What remains is the concepts' effects with all n at
once, added up, as a share of the sum of each one's effect alone, with its own sliders: how far the
attribute moved by the measuring stick, on other models the change in CLIP score."""

from collections import Counter

from experiments.common import TEN, Lab, moved
from miniature.compose import NEUTRAL
from support import cli, images

COUNTS = [1, 2, 5, 10, 20, 30, 40, 50]
START = 0.15  # sex and glasses are laid out early


def main():
    lab = Lab(__doc__, "composition", count=24)
    concepts, prompts = list(TEN if lab.small else lab.concepts), NEUTRAL if lab.small else None
    shorter = dict(steps=lab.recipe["steps"] // 2, trajectories=8)
    sliders = []  # pairs (concept, slider)
    for i in range(COUNTS[-1]):
        concept, seed = concepts[i % len(concepts)], 10 * lab.seed + i // len(concepts)
        sliders.append((concept, lab.text_slider(concept, seed=seed, **shorter)))

    def draw(pairs):
        return lab.draw([[(slider, scale, START) for slider, scale in pairs]], prompts)[0]

    before = draw([])

    def effect(concept, after):
        if lab.small:
            attribute = lab.all_concepts[concept].attribute
            return moved(before, after, attribute)["moved"]["mean"]
        return float(lab.clip_change(concept, before, after).mean())

    def alone(concept, k):
        """The effect of the first k sliders of one concept, at scale 1 / k each."""
        pairs = [(slider, 1.0 / k) for name, slider in sliders if name == concept][:k]
        return lab.once(f"alone: {concept}, {k}", lambda: effect(concept, draw(pairs)))

    for n in COUNTS:
        counts = Counter(concept for concept, _ in sliders[:n])
        effects_alone = {concept: alone(concept, k) for concept, k in counts.items()}

        def measure():
            together = draw([(slider, 1.0 / counts[concept]) for concept, slider in sliders[:n]])
            effects = {concept: effect(concept, together) for concept in counts}
            return {
                "alone": effects_alone,
                "together": effects,
                "remains": sum(effects.values()) / sum(effects_alone.values()),
                "lpips": lab.lpips(before, together),
                "malformed": moved(before, together, "age")["malformed"] if lab.small else None,
            }

        lab.once(f"{n} sliders", measure)

    # Figure 7, more and more at once; then, of the first seed, Figure 6: the first concept across,
    # the second down.
    lab.seeds, shown = lab.seeds[:4], (0, 1, 2, 5, 10)
    columns = [draw([(slider, 1.0) for _, slider in sliders[:n]]) for n in shown]
    lab.sheet(columns, [f"{n} sliders" for n in shown])
    lab.seeds, scales = lab.seeds[:1], [-2.0, -1.0, 0.0, 1.0, 2.0]
    (_, first), (_, second) = sliders[:2]
    plane = [[(first, a, START), (second, b, START)] for b in scales for a in scales]
    drawn = [column[0] for column in lab.draw(plane, prompts)]
    rows = [drawn[5 * i : 5 * i + 5] for i in range(5)]
    names = [images.scale_label(scale) for scale in scales]
    lab.save_sheet(rows, names, names, "grid")


if __name__ == "__main__":
    cli.run(main)
