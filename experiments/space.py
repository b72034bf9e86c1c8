"""SliderSpace: eight sliders from "a photo of a person", what they move, and directions at random as a control.  python -m experiments.space

* Effect: the features of held-out seeds at scales -2 to 2, along each slider's own direction; the effect of a slider is the mean
  change of the features from -2 to 2. Its cosine with its own direction, and between the effects of different sliders.
* Attributes (the miniature): which one each slider moves most, and by how much more than any other.
* Diversity: mean distance of pictures, each with all sliders at random scales, against plain ones; malformed faces in both.
* Control: directions drawn at random in the space of the same principal components.
"""

import functools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import cli
import lora
import pictures
import slider
import train_space
import training
from experiments.common import Lab
from miniature import effect
from unfinished import Unfinished

PROMPT = "a photo of a person"
SCALES = [-2.0, -1.0, 0.0, 1.0, 2.0]
K, SAMPLES, TRAIN_SAMPLES = 8, 512, 128
DRAWING = dict(steps=20, guidance=5.0, start=0.3)


def random_directions(v, sigma, seed: int):
    """As many directions in the span of v (k, d), drawn at random and orthogonal, and the features' standard deviation along each."""
    Q, _ = torch.linalg.qr(torch.randn(len(v), len(v), generator=torch.Generator().manual_seed(seed)))
    return Q @ v, (Q.square() @ sigma.square()).sqrt()


def mean_distance(f) -> float:
    """The mean distance between two of features (n, d)."""
    return float(torch.pdist(f).mean())


def main():
    lab = Lab(__doc__, "space", lambda p: p.add_argument("--clip", help="as in train_space.py"))
    model = lab.model
    clip, encode = train_space.towers(lab.args, model)
    cond, uncond = model.condition([PROMPT], lab.size), model.condition([""], lab.size)
    recipe = training.recipe(model.unet, train_space.SMALL, train_space.LARGE)
    layers = lora.target_layers(model.unet, "xattn")

    @functools.cache
    def found():
        """Samples, directions, their spread, hints in words."""
        samples = train_space.collect(
            model,
            cond,
            uncond,
            Unfinished(Path(lab.args.sliders) / f"space_samples_seed{lab.seed}"),
            samples=SAMPLES,
            per_sample=4,
            size=lab.size,
            seed=lab.seed,
            batch=32,
            **DRAWING,
        )
        with torch.no_grad():
            f = torch.cat([train_space.features(model, clip, z) for z in samples.x_0.split(32)])
        v, sigma, share = train_space.directions(f, K)
        part = train_space.Samples(*(x[:TRAIN_SAMPLES] for x in (samples.x_0, samples.x_t, samples.t, samples.prompt)))
        words = sorted(model.known_words) if model.known_words else train_space.WORDS
        return part, v, sigma, share, train_space.names(encode, PROMPT, words, v)

    def sliders_for(name, v, sigma):
        paths = [Path(lab.args.sliders) / f"space_{name}_seed{lab.seed}_{i + 1}.safetensors" for i in range(K)]
        if not all(p.exists() for p in paths):
            made, _ = train_space.learn(
                model, clip, found()[0], cond, uncond, v, layers=layers, rank=1, alpha=1.0, guidance=1.0, checkpointing=False, seed=lab.seed, **recipe
            )
            for i, one in enumerate(made):
                factor = train_space.calibrate(model, clip, one, v[i], sigma[i].item(), cond, uncond, seeds=4, size=lab.size, batch=32, **DRAWING)
                lora.save(paths[i], train_space.scaled(one, factor), {"kind": "space slider"})
        return [lora.load(p, model.unet) for p in paths]

    def look(drawn):
        """Features of N pictures, (N, d)."""
        with torch.no_grad():
            x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in drawn])
            return F.normalize(torch.cat([clip(part.to(model.device)).float().cpu() for part in x.split(32)]), dim=-1)

    def measure(name):
        started = time.time()
        _, v, sigma, share, hints = found()
        if name == "random":
            v, sigma = random_directions(v, sigma, lab.seed)
        sliders, v, rows, effects = sliders_for(name, v, sigma), v.cpu(), [], []
        seconds = time.time() - started
        for i, one in enumerate(sliders):
            drawn = slider.sweep(model, PROMPT, lab.seeds, [[(one, s)] for s in SCALES], size=lab.size)
            f = [look(column) for column in drawn]
            effects.append((f[-1] - f[0]).mean(0))
            along = [float((x @ v[i]).mean()) for x in f]
            row = {"along": along, "monotonic": bool((np.diff(along) > 0).all()), "cosine": float(F.cosine_similarity(effects[i], v[i], dim=0))}
            if name == "found":
                row |= {"share": float(share[i]), "words": hints[i]}
            if lab.small:
                moves = {name: effect.moved(rows_of, name) for name, rows_of in effect.table(drawn).items()}
                first, second = sorted(moves, key=moves.get, reverse=True)[:2]
                row |= {"attribute": first, "moved": moves[first], "next": second, "next_moved": moves[second]}
            rows.append(row)
        cosines = F.normalize(torch.stack(effects), dim=-1) @ F.normalize(torch.stack(effects), dim=-1).T
        other = cosines[~torch.eye(K, dtype=bool)].abs()
        return {"sliders": rows, "mean_cosine": float(np.mean([r["cosine"] for r in rows])), "between": float(other.mean()), "seconds": seconds}

    results = {name: lab.once(name, lambda: measure(name)) for name in ("found", "random")}

    def diversity():
        _, v, sigma, _, _ = found()
        sliders, rng, plain, varied = sliders_for("found", v, sigma), np.random.default_rng(lab.seed), [], []
        seeds = range(lab.seeds[0], lab.seeds[0] + 4 * len(lab.seeds))
        plain = slider.sweep(model, PROMPT, seeds, [[]], size=lab.size)[0]
        for s in seeds:
            varied += slider.sweep(model, PROMPT, [s], [[(one, float(rng.uniform(-2, 2))) for one in sliders]], size=lab.size)[0]
        judged = lambda drawn: mean_distance(lab.judges.inception(drawn))
        malformed = lambda drawn: float((effect.attributes(drawn)["malformed"] > 0.5).mean()) if lab.small else None
        pictures.save(pictures.sheet([plain[:8], varied[:8]], [""] * 8, ["plain", "random"]), lab.path.with_name(lab.path.stem + "_diversity.png"))
        return {name: {"distance": judged(drawn), "malformed": malformed(drawn)} for name, drawn in (("plain", plain), ("random sliders", varied))}

    lab.once("diversity", diversity)
    _, v, sigma, _, _ = found()
    sheet = [
        [column[0] for column in slider.sweep(model, PROMPT, lab.seeds[:1], [[(one, s)] for s in SCALES], size=lab.size)]
        for one in sliders_for("found", v, sigma)
    ]
    pictures.save(
        pictures.sheet(sheet, [pictures.label(s) for s in SCALES], [r.get("attribute", str(i + 1)) for i, r in enumerate(results["found"]["sliders"])]),
        lab.path.with_suffix(".png"),
    )


if __name__ == "__main__":
    cli.run(main)
