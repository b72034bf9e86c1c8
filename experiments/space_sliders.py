"""The sliders of experiments/space.py: three sets of directions in one span, and sliders along
them, trained once."""

import functools
import time
from pathlib import Path

import torch

import lora
import slider
import train_space
from experiments.common import Lab
from support import clip, training
from support.batches import in_batches
from support.checkpoint import resume_or_new

PROMPT = "a photo of a person"
K, SAMPLES, TRAIN_SAMPLES, BATCH = 8, 512, 128, 32
DRAWING = dict(steps=20, guidance=5.0, start=train_space.START)


def random_rotation(v, sigma, seed: int):
    """As many directions in the span of v (k, d), drawn at random and orthogonal, and the
    features' standard deviation along each."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(v), len(v), generator=g))
    return Q @ v, (Q.square() @ sigma.square()).sqrt()


class SpaceSliders:
    """The sets "independent", "principal" and "random". What they are made of is drawn when it is
    first needed."""

    def __init__(self, lab: Lab):
        self.lab, self.model, self.folder = lab, lab.model, Path(lab.args.sliders)
        self.encoder, self.encode = clip.towers(lab.args.clip, lab.model)
        self.prompts = tuple(lab.model.condition([words], lab.size) for words in (PROMPT, ""))

    def draw(self, seeds, columns):
        """As slider.sweep."""
        return slider.sweep(self.model, PROMPT, seeds, columns, size=self.lab.size, **DRAWING)

    @functools.cached_property
    def samples(self) -> train_space.Samples:
        args, seed, size = self.lab.args, self.lab.seed, self.lab.size
        about = dict(model=args.model, prompt=PROMPT, size=size[0], dtype=args.dtype)
        checkpoint = resume_or_new(self.folder / f"space_samples_seed{seed}", DRAWING | about)
        settings = dict(samples=SAMPLES, per_sample=5, size=size, seed=seed, batch=BATCH)
        settings |= DRAWING | dict(remember=checkpoint.remember)
        return train_space.collect(self.model, *self.prompts, **settings)

    @functools.cached_property
    def sample_features(self):
        x_0 = self.samples.x_0
        see = lambda rows: {"f": clip.features(self.model, self.encoder, x_0[rows])}
        return in_batches(see, SAMPLES, BATCH, desc="features")["f"]  # (SAMPLES, d)

    def directions(self, kind: str):
        """As train_space.directions. Random ones have no shares of the variance."""
        independent = kind == "independent"
        v, sigma, share = train_space.directions(self.sample_features, K, independent)
        if kind == "random":
            return (*random_rotation(v, sigma, self.lab.seed), None)
        return v, sigma, share

    def load_or_train(self, kind: str) -> list[lora.Slider]:
        """A slider along each of these directions, trained if they are not in the folder."""
        name = f"space_{kind}_seed{self.lab.seed}"
        paths = [self.folder / f"{name}_{i + 1}.safetensors" for i in range(K)]
        if not all(path.exists() for path in paths):
            self.train(kind, paths)
        return [lora.load(path, self.model.unet) for path in paths]

    def train(self, kind: str, paths: list[Path]):
        started = time.time()
        model, encoder, (v, sigma, _) = self.model, self.encoder, self.directions(kind)
        samples = self.samples.first(TRAIN_SAMPLES)
        recipe = training.recipe(model.unet, train_space.SMALL, train_space.LARGE)
        layers = lora.target_layers(model.unet, recipe["layers"])
        settings = recipe | dict(layers=layers, guidance=1.0, seed=self.lab.seed)
        made, _ = train_space.learn(model, encoder, samples, *self.prompts, v, **settings)
        drawing = DRAWING | dict(size=self.lab.size, batch=BATCH)
        for path, one, v_i, sigma_i in zip(paths, made, v, sigma):
            direction = (one, v_i, sigma_i.item())
            train_space.calibrate(model, encoder, *direction, *self.prompts, **drawing)
        seconds = time.time() - started
        for path, one in zip(paths, made):
            lora.save(path, one, {"kind": "space slider", "seconds": seconds})
