"""make demo: train an age slider on the bundled miniature, draw its strip, measure what it does."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

import cli

OUT = Path("out") / "demo"
SCALES, SEEDS = ["-3", "-2", "-1", "0", "+1", "+2", "+3"], range(6)


def step(*command):
    print("\n$ python " + " ".join(f'"{word}"' if " " in word else word for word in command), flush=True)
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
        "--out",
        str(OUT),
        "--html",
        str(OUT / "age.html"),
    )
    from miniature.measure import measure

    print("\nage (0 young, 1 old) as the measuring stick reads it, mean of the rows:")
    for scale in SCALES:
        pictures = [Image.open(OUT / f"seed{seed}_scale{scale}.png") for seed in SEEDS]
        print(f"  scale {scale:>2}: {measure(pictures)['age'].mean():.2f}")
    print(f"\nLook at {OUT / 'strip.png'}, and open {OUT / 'age.html'} in a browser: a slider to drag")


if __name__ == "__main__":
    cli.run(main)
