"""What a slider does that is trained with the defaults, the mean of three training seeds and the
worst of them:

    python -m experiments.defaults

Age, smile and eye size from words, by the commands that README gives, and eye size from 16 pairs;
age once more, on from half of the denoising. Each is measured at scales -3 to 3 on 64 seeds of the
eight prompts of miniature/effect.py, and on the same seeds of the prompt of README's strip.
Trainings run in processes of their own, as a user's do."""

import subprocess
import sys
from pathlib import Path

import numpy as np

import lora
from experiments.common import Lab
from miniature import effect
from miniature.compose import PERSON, command
from support import cli, images

SEEDS = (0, 1, 2)  # of trainings
STRIP = "a portrait of a person"
START = 0.3  # slider.py's default
KINDS = [  # attribute, whether from pairs, start
    ("age", False, START),
    ("age", False, 0.5),
    ("smile", False, START),
    ("eye_size", False, START),
    ("eye_size", True, START),
]


def run(*words):
    strings = [str(word) for word in words]
    print("python", " ".join(strings), flush=True)
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, *strings], cwd=root, check=True)


def train(attribute: str, from_pairs: bool, seed: int, file: Path):
    """The slider in `file`, unless it is there."""
    if file.exists():
        return
    # What a stop left of its training is begun anew.
    about = ["--out", file, "--seed", seed, "--probe", 0, "--overwrite"]
    if from_pairs:
        pairs = file.with_suffix("")
        run("-m", "miniature.pairs", "--attribute", attribute, "--seed", seed, "--out", pairs)
        ends = ["--neg", pairs / "0.6", "--pos", pairs / "1.6"]
        return run("train_pairs.py", *ends, "--prompt", PERSON, *about)
    run(*command(attribute), *about)


def summary(attribute: str, tables: list[dict]) -> dict:
    """Of the readings (scales, pictures) of each training: how far the attribute moves, on average
    and at the least; the most moved other of the mean over the trainings, and of the worst of
    them; whether every one of them is in order."""
    each = [effect.summary(table, attribute) for table in tables]
    mean = {name: np.mean([table[name] for table in tables], 0) for name in tables[0]}
    of_all, worst = effect.summary(mean, attribute), max(each, key=lambda r: r["worst_other_moved"])
    return {
        "means": of_all["means"],
        "moved": float(np.mean([r["moved"] for r in each])),
        "least_moved": min(r["moved"] for r in each),
        "monotonic": all(r["monotonic"] for r in each),
        "worst_other": of_all["worst_other"],
        "worst_other_moved": of_all["worst_other_moved"],
        "worst_seed": [worst["worst_other"], worst["worst_other_moved"]],
    }


def main():
    lab = Lab(__doc__, "defaults", count=64)
    columns_of = lambda slider: [[(slider, scale)] for scale in effect.SCALES]
    shown, names = [], []
    for attribute, from_pairs, start in KINDS:
        key = attribute.replace("_", " ") + (", 16 pairs" if from_pairs else "")
        stem = f"defaults_{key}".replace(", ", "_").replace(" ", "-")
        files = [Path(lab.args.sliders) / f"{stem}_seed{seed}.safetensors" for seed in SEEDS]
        for seed, file in zip(SEEDS, files):
            train(attribute, from_pairs, seed, file)
        key += "" if start == START else f", start {start:g}"
        sliders = [lora.load(file, lab.model.unet) for file in files]
        unseen = effect.prompts_without(attribute)
        for where, prompts in (("eight prompts", unseen), ("strip", [STRIP])):

            def measure():
                draw = lambda one: lab.draw(columns_of(one), prompts, start=start)
                return summary(attribute, [effect.table(draw(one)) for one in sliders])

            lab.once(f"{key}: {where}", measure)
        settings = dict(prompts=[STRIP], start=start)
        drawn = effect.pictures(lab.model, columns_of(sliders[0]), lab.seeds[:2], **settings)
        shown += [list(row) for row in zip(*drawn)]
        names += [key, ""]
    lab.save_sheet(shown, [images.scale_label(scale) for scale in effect.SCALES], names)


if __name__ == "__main__":
    cli.run(main)
