"""Pairs of pictures from a style channel of the generator, for train_pairs.py (sliders.py)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

import slider
from experiments.stylegan.channels import Faces, read, span
from experiments.stylegan.draw import load
from miniature import effect
from support import images

PROMPT = "a photo of a person"
CANDIDATES, STRENGTH = 96, 0.5  # faces that pairs are chosen from, and SDEdit's strength


class Channel(NamedTuple):
    layer: int
    channel: int
    attribute: str  # that it moves
    by: float  # standard deviations, either way

    def drawn(self, faces: Faces, by: float):
        """Pictures with the channel moved by `by` standard deviations."""
        return faces.drawn(self.layer, self.channel, by)


def draw_pairs(model, channel: Channel, count: int, folder: Path, seed: int):
    """folder/neg and folder/pos: at most `count` faces of the generator with the channel moved
    either way, each drawn again by `model`. ValueError where something else changes in all."""
    faces = Faces(load(), CANDIDATES, seed=20 + 100 * seed)

    noises = range(20_000 + 1000 * seed, 20_000 + 1000 * seed + CANDIDATES)

    def draw_again(drawn):
        latents = lambda seeds: model.encode([drawn[noises.index(seed)] for seed in seeds])
        settings = slider.sdedit(model, latents, STRENGTH, 20) | dict(steps=20, guidance=3.0)
        return slider.sweep(model, PROMPT, noises, [[]], **settings)[0]

    ends = [draw_again(channel.drawn(faces, sign * channel.by)) for sign in (-1, 1)]
    low, high = map(read, ends)
    change = {name: np.abs(high[name] - low[name]) / span(name) for name in low}
    attribute = channel.attribute
    alone = change[attribute] > 0.2
    for c in effect.others(change, attribute).values():
        alone &= c < 0.25
    good = np.flatnonzero(alone)[:count]
    pairs = f"in {alone.sum()} of {CANDIDATES} pairs nothing else changes"
    print(f"{attribute}: {pairs}; {len(good)} are used", flush=True)
    if not len(good):
        raise ValueError(f"{attribute}: in every one of the pairs something else changes")
    for name, drawn in zip(("neg", "pos"), ends):
        for i in good:
            images.save_image(drawn[i], folder / name / f"{i:03}.png")
