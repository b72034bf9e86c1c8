"""make demo: train an age slider on the bundled miniature, draw its strip, measure what it does."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from support import cli

OUT = Path("out") / "demo"
SCALES, SEEDS = ["-3", "-2", "-1", "0", "+1", "+2", "+3"], range(1, 7)
START = "0.5"  # later than the default: age moves less far, and brings less else along


def step(*command):
    print(
        "\n$ python " + " ".join(f'"{word}"' if " " in word else word for word in command),
        flush=True,
    )
    if status := subprocess.run([sys.executable, *command]).returncode:
        sys.exit(status)


def main():
    step(
        "train_text.py",
        "--pos",
        "a photo of a person, very old",
        "--neg",
        "a photo of a person, very young",
        "--preserve",
        "with glasses, without glasses",
        "--preserve",
        "with a hat, without a hat",
        "--out",
        str(OUT / "age.safetensors"),
        "--overwrite",
    )
    step(
        "slider.py",
        "--prompt",
        "a portrait of a person",
        "--slider",
        str(OUT / "age.safetensors"),
        "--scales",
        ",".join(SCALES),
        "--seeds",
        f"{SEEDS[0]}-{SEEDS[-1]}",
        "--start",
        START,
        "--out",
        str(OUT),
        "--html",
        str(OUT / "age.html"),
    )
    from miniature import effect

    columns = [
        [Image.open(OUT / f"seed{seed}_scale{scale}.png") for seed in SEEDS] for scale in SCALES
    ]
    found = effect.summary(effect.table(columns), "age", [float(s) for s in SCALES])
    print("\nage (0 young, 1 old) as the measuring stick reads it, mean of the rows:")
    for scale, mean in zip(SCALES, found["means"]):
        print(f"  scale {scale:>2}: {mean:.2f}")
    print(
        f"It {effect.order(found['means'])}. In these {len(SEEDS)} rows {found['worst_other']} moves most of everything else, by "
        f"{found['worst_other_moved']:.0%} (one row is {1 / len(SEEDS):.0%}). The slider is on from half of the denoising (--start {START}); from 30% on, "
        "the default, it moves age further and takes glasses along (README.md measures both on 64 pictures)."
    )
    print(
        f"\nLook at {OUT / 'strip.png'}, and open {OUT / 'age.html'} in a browser: a slider to drag. "
        'Then make one of your own: "source .venv/bin/activate", and README.md, "Train a slider, and use it".'
    )


if __name__ == "__main__":
    cli.run(main)
