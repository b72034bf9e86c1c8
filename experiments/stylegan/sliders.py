"""From a StyleGAN neuron to a slider (the paper's Figure 5):  python -m experiments.stylegan.sliders   (some minutes a channel)

A style channel that moves one thing in the generator's faces is moved either way in a hundred of them. The miniature SDXL draws each picture
again from half-way down its noise (SDEdit), both of a pair with the same noise: what the generator blurs it draws as it is used to, and the
difference stays. Pairs in which the measuring stick sees anything else change are left out, as somebody who looks at them would; the first
--count of the rest train a visual slider by the command that anybody would use, train_pairs.py, and the slider is measured on seeds and
prompts of its own. By default the best channels that channels.py found for a hat, the size of the eyes, and the shirt.

    python -m experiments.stylegan.sliders --channel 7.17 --attribute eye_size --by 3                       another one
    python -m experiments.stylegan.sliders --channel 7.17 --attribute eye_size --by 3 --only-pairs pairs    only draw the pairs
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import lora
import slider
from experiments.common import Lab
from experiments.stylegan.channels import FOUND, Faces, read, span
from experiments.stylegan.train import load
from miniature import effect
from support import cli, images

SCALES = [-3, -2, -1, 0, 1, 2, 3]
CHOSEN = {
    "hat": 8.0,
    "eye_size": 4.0,
    "shirt red": 8.0,
}  # and how far each is moved: eyes vanish beyond
PROMPT, START = "a photo of a person", 0.2  # of the denoising: hats and colours are decided early
ROOT = Path(__file__).parent.parent.parent


def draw_pairs(
    model,
    layer: int,
    channel: int,
    by: float,
    attribute: str,
    count: int,
    folder: Path,
    candidates: int = 96,
    strength: float = 0.5,
):
    """folder/neg and folder/pos: at most `count` faces of the generator with the channel moved by -by and by +by standard deviations."""
    faces = Faces(load(), candidates, seed=20)
    ends = [faces.drawn(layer, channel, sign * by) for sign in (-1, 1)]

    def again(drawn):
        begin = slider.sdedit(
            model, lambda some: model.encode([drawn[i] for i in some]), strength, 20
        )
        return slider.sweep(
            model, PROMPT, range(candidates), [[]], steps=20, guidance=3.0, **begin
        )[0]

    ends = [again(drawn) for drawn in ends]
    low, high = map(read, ends)
    change = {name: np.abs(high[name] - low[name]) / span(name) for name in low}
    alone = change[attribute] > 0.2
    for name, c in change.items():
        if name != attribute and not effect.related(attribute, name):
            alone &= c < 0.25
    good = np.flatnonzero(alone)[:count]
    print(
        f"{attribute}: in {alone.sum()} of {candidates} pairs nothing else changes; {len(good)} are used",
        flush=True,
    )
    for name, drawn in zip(("neg", "pos"), ends):
        for i in good:
            images.save_image(drawn[i], folder / name / f"{i:03}.png")


def measured(tables, attribute: str) -> dict:
    """tables: what `read` says of the pictures at each scale."""
    means = {name: np.array([t[name].mean() for t in tables]) for name in tables[0]}
    moved = {name: float(np.ptp(m)) / span(name) for name, m in means.items()}
    others = {
        name: v
        for name, v in moved.items()
        if name != attribute and not effect.related(attribute, name)
    }
    other = max(others, key=others.get)
    steps = np.diff(means[attribute])
    return {
        "means": means[attribute].round(3).tolist(),
        "moved": moved[attribute],
        "monotonic": bool((steps > 0).all() or (steps < 0).all()),
        "other": other,
        "other_moved": others[other],
    }


def main():
    def options(p):
        p.add_argument(
            "--channel",
            action="append",
            default=[],
            metavar="LAYER.CHANNEL",
            help="may be repeated, each with its --attribute",
        )
        p.add_argument(
            "--attribute",
            action="append",
            default=[],
            help="what it moves, as channels.py calls it",
        )
        p.add_argument(
            "--by",
            type=float,
            default=5.0,
            help="with --channel: standard deviations, either way (default: %(default)s)",
        )
        p.add_argument("--count", type=int, default=24, help="pairs (default: %(default)s)")
        p.add_argument(
            "--only-pairs",
            metavar="DIR",
            help="draw the pairs of one channel there, and train nothing",
        )

    lab = Lab(__doc__, "stylegan", options)
    args = lab.args
    if len(args.channel) != len(args.attribute):
        raise ValueError(
            "--attribute is needed for each --channel: what it moves, as channels.py calls it"
        )
    chosen = [(*map(int, c.split(".")), a, args.by) for c, a in zip(args.channel, args.attribute)]
    if not chosen:
        best = {}
        for row in json.loads(FOUND.read_text())["best"]:
            best.setdefault(row["attribute"], row)
        chosen = [
            (best[name]["layer"], best[name]["channel"], name, by) for name, by in CHOSEN.items()
        ]
    if args.only_pairs:
        layer, channel, attribute, by = chosen[0]
        return draw_pairs(
            lab.model, layer, channel, by, attribute, args.count, Path(args.only_pairs)
        )
    rows, names = [], []
    for layer, channel, attribute, by in chosen:
        name = f"{attribute.replace('_', ' ')}: layer {layer}, channel {channel}"
        pairs = Path(args.sliders) / f"stylegan_{layer}.{channel}"
        file = pairs.with_name(f"stylegan_{layer}.{channel}.safetensors")
        if not file.exists():
            draw_pairs(lab.model, layer, channel, by, attribute, args.count, pairs)
            command = [
                "train_pairs.py",
                "--neg",
                pairs / "neg",
                "--pos",
                pairs / "pos",
                "--prompt",
                PROMPT,
                "--out",
                file,
                "--seed",
                lab.seed,
                "--probe",
                0,
            ]
            print(" ".join(map(str, command)), flush=True)
            subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
        one = lora.load(file, lab.model.unet)

        def measure():
            tables = [
                read(column) for column in lab.draw([[(one, s)] for s in SCALES], start=START)
            ]
            faces = Faces(load(), args.pictures, seed=21)
            gan = [read(faces.drawn(layer, channel, by * s / 3)) for s in SCALES]
            return {
                "slider": measured(tables, attribute),
                "generator": measured(gan, attribute),
                "prompts": effect.PROMPTS,
            }

        lab.once(name, measure)
        faces = Faces(load(), 1, seed=20)
        rows += [
            [faces.drawn(layer, channel, by * s / 3)[0] for s in SCALES],
            [
                column[0]
                for column in slider.sweep(
                    lab.model,
                    effect.PROMPTS[5],
                    lab.seeds[5:6],
                    [[(one, s)] for s in SCALES],
                    start=START,
                )
            ],
        ]
        names += [f"channel {layer}.{channel}", attribute.replace("_", " ")]
    images.save_image(
        images.contact_sheet(rows, [images.scale_label(s) for s in SCALES], names),
        lab.path.with_suffix(".png"),
    )


if __name__ == "__main__":
    cli.run(main)
