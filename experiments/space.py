"""SliderSpace: eight sliders from "a photo of a person", what they move, and directions at random as a control.  python -m experiments.space

Three sets of directions in the same span: principal ones, as in the paper; the same turned to independent ones (train_space.independent_rotation);
and the same turned at random, as a control.

* Effect: the features of held-out seeds at scales -2 to 2, along each slider's own direction; the effect of a slider is the mean
  change of the features from -2 to 2. Its cosine with its own direction, and between the effects of different sliders.
* Attributes (the miniature): which one each slider moves most, and the next.
* Diversity: mean distance of pictures, each with all independent sliders at random scales, against plain ones; malformed faces in both.
"""

import functools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import lora
import slider
import train_space
from experiments.common import Lab
from miniature import effect
from support import checkpoint, cli, clip, images, training
from support.batches import in_batches

PROMPT = "a photo of a person"
K, SAMPLES, TRAIN_SAMPLES = 8, 512, 128


def turned_at_random(v, sigma, seed: int):
    """As many directions in the span of v (k, d), drawn at random and orthogonal, and the features' standard deviation along each."""
    Q, _ = torch.linalg.qr(
        torch.randn(len(v), len(v), generator=torch.Generator().manual_seed(seed))
    )
    return Q @ v, (Q.square() @ sigma.square()).sqrt()


def main():
    lab = Lab(
        __doc__,
        "space",
        lambda p: p.add_argument("--clip", help="as in train_space.py"),
        count=12,
        dtype="float32",
    )
    model = lab.model
    clip, encode = clip.towers(lab.args, model)
    cond, uncond = model.condition([PROMPT], lab.size), model.condition([""], lab.size)
    recipe = training.recipe(model.unet, train_space.SMALL, train_space.LARGE)
    drawing = dict(steps=20, guidance=5.0, start=train_space.START)
    draw = lambda seeds, columns: slider.sweep(
        model, PROMPT, seeds, columns, size=lab.size, **drawing
    )

    @functools.cache
    def samples():
        """All of them, and their features."""
        kept = checkpoint.resume_or_new(
            Path(lab.args.sliders) / f"space_samples_seed{lab.seed}",
            drawing
            | dict(model=lab.args.model, prompt=PROMPT, size=lab.size[0], dtype=lab.args.dtype),
        )
        drawn = train_space.collect(
            model,
            cond,
            uncond,
            kept,
            samples=SAMPLES,
            per_sample=5,
            size=lab.size,
            seed=lab.seed,
            batch=32,
            **drawing,
        )
        return drawn, in_batches(
            SAMPLES, 32, lambda rows: clip.features(model, clip, drawn.x_0[rows]), "features"
        )

    def directions(kind):
        v, sigma, share = train_space.directions(samples()[1], K, independent=kind == "independent")
        return (
            (*turned_at_random(v, sigma, lab.seed), None) if kind == "random" else (v, sigma, share)
        )

    def sliders_for(kind):
        paths = [
            Path(lab.args.sliders) / f"space_{kind}_seed{lab.seed}_{i + 1}.safetensors"
            for i in range(K)
        ]
        if not all(p.exists() for p in paths):
            v, sigma, _ = directions(kind)
            part = samples()[0].first(TRAIN_SAMPLES)
            layers = lora.target_layers(model.unet, recipe["layers"])
            settings = recipe | dict(layers=layers, guidance=1.0, seed=lab.seed)
            made, _ = train_space.learn(model, clip, part, cond, uncond, v, **settings)
            for path, one, direction, s in zip(paths, made, v, sigma):
                train_space.calibrate(
                    model,
                    clip,
                    one,
                    direction,
                    s.item(),
                    cond,
                    uncond,
                    size=lab.size,
                    batch=32,
                    **drawing,
                )
                lora.save(path, one, {"kind": "space slider"})
        return [lora.load(p, model.unet) for p in paths]

    @torch.no_grad()
    def look(drawn):
        """Features of N pictures, (N, d)."""
        x = torch.stack(
            [torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in drawn]
        )
        return F.normalize(
            torch.cat([clip(part.to(model.device)).float().cpu() for part in x.split(32)]), dim=-1
        )

    def measure(kind):
        started = time.time()
        v, _, share = directions(kind)
        sliders, v, rows, effects = sliders_for(kind), v.cpu(), [], []
        seconds = time.time() - started
        hints = clip.name_directions(encode, PROMPT, clip.words_of(model), v)
        for i, one in enumerate(sliders):
            drawn = draw(lab.seeds, [[(one, s)] for s in train_space.SCALES])
            f = [look(column) for column in drawn]
            effects.append((f[-1] - f[0]).mean(0))
            along = [float((x @ v[i]).mean()) for x in f]
            row = {
                "along": along,
                "monotonic": bool((np.diff(along) > 0).all()),
                "cosine": float(F.cosine_similarity(effects[i], v[i], dim=0)),
                "words": hints[i],
            }
            if share is not None:
                row["share"] = float(share[i])
            if lab.small:
                moves = {
                    name: effect.moved(rows_of, name)
                    for name, rows_of in effect.table(drawn).items()
                }
                first = max(moves, key=moves.get)
                second = max(
                    (name for name in moves if name != first and not effect.related(first, name)),
                    key=moves.get,
                )
                row |= {
                    "attribute": first,
                    "moved": moves[first],
                    "next": second,
                    "next_moved": moves[second],
                }
            rows.append(row)
        unit = F.normalize(torch.stack(effects), dim=-1)
        between = (unit @ unit.T)[~torch.eye(K, dtype=bool)].abs().mean()
        return {
            "sliders": rows,
            "mean_cosine": float(np.mean([r["cosine"] for r in rows])),
            "between": float(between),
            "seconds": seconds,
        }

    found = {
        kind: lab.once(kind, lambda: measure(kind))
        for kind in ("independent", "principal", "random")
    }

    def diversity():
        sliders, rng, varied = sliders_for("independent"), np.random.default_rng(lab.seed), []
        seeds = range(lab.seeds[0], lab.seeds[0] + 4 * len(lab.seeds))
        plain = draw(seeds, [[]])[0]
        for s in seeds:
            varied += draw([s], [[(one, float(rng.uniform(-2, 2))) for one in sliders]])[0]
        images.save_image(
            images.contact_sheet([plain[:8], varied[:8]], [""] * 8, ["plain", "random"]),
            lab.path.with_name(lab.path.stem + "_diversity.png"),
        )
        distance = lambda drawn: float(torch.pdist(lab.judges.inception(drawn)).mean())
        malformed = (
            lambda drawn: float((effect.attributes(drawn)["malformed"] > 0.5).mean())
            if lab.small
            else None
        )
        return {
            name: {"distance": distance(drawn), "malformed": malformed(drawn)}
            for name, drawn in (("plain", plain), ("random sliders", varied))
        }

    lab.once("diversity", diversity)
    for kind, results in found.items():
        sheet = [
            [column[0] for column in draw(lab.seeds[:1], [[(one, s)] for s in train_space.SCALES])]
            for one in sliders_for(kind)
        ]
        names = [
            r.get("attribute", str(i + 1)).replace("_", " ")
            for i, r in enumerate(results["sliders"])
        ]
        images.save_image(
            images.contact_sheet(sheet, [images.scale_label(s) for s in train_space.SCALES], names),
            lab.path.with_name(f"{lab.path.stem}_{kind}.png"),
        )


if __name__ == "__main__":
    cli.run(main)
