"""Ten sliders on the miniature, alone, in pairs and all at once, by the measuring stick:

    python -m miniature.compose

Trains those that are not in the folder yet (about 55 s each on two cores), then measures
* independence: the effect of one slider (from scale -2 to 2) while another is held at -2, 0 and 2;
* all ten at scale 1 together: is the face still well-formed, and has each attribute moved its way?
"""

import subprocess
import sys
from pathlib import Path

import lora
from miniature.effect import SEEDS, readings
from support import cli

PERSON = "a photo of a person"
GLASSES_AND_HATS = ["with glasses, without glasses", "with a hat, without a hat"]
SLIDERS = {  # attribute -> words of its positive and of its negative end, what is preserved
    "age": ("very old", "very young", GLASSES_AND_HATS),
    "smile": ("with a big smile", "with a big frown", ["man, woman"]),
    "eye_size": ("with big eyes", "with small eyes", ["man, woman"]),
    "sex": ("man", "woman", ["old, young"]),
    "skin": ("dark skin", "light skin", ["man, woman"]),
    "hair_length": ("with long hair", "with short hair", ["man, woman"]),
    "glasses": ("with glasses", "without glasses", ["old, young"]),
    "hat": ("with a hat", "without a hat", ["old, young"]),
    "hair red": ("red hair", "black hair", ["man, woman"]),
    "background blue": ("blue background", "pink background", ["man, woman"]),
}
# Prompts that name none of the attributes.
NEUTRAL = [PERSON, "a picture of a person", "a portrait of a person", "a person"]
PAIRS = [("age", "smile"), ("smile", "eye_size"), ("age", "eye_size")]


def command(attribute: str) -> list[str]:
    """What trains its slider with the defaults: train_text.py and its options, but for --out."""
    pos, neg, preserve = SLIDERS[attribute]
    ends = ["--pos", f"{PERSON}, {pos}", "--neg", f"{PERSON}, {neg}"]
    preserved = [word for concepts in preserve for word in ("--preserve", concepts)]
    return ["train_text.py", "--prompt", PERSON, *ends, *preserved]


def train(attribute: str, folder: Path, model: str) -> Path:
    path = folder / f"{attribute.replace(' ', '_')}.safetensors"
    if not path.exists():
        options = ["--model", model, "--out", str(path), "--resume"]  # of one that was stopped
        subprocess.run([sys.executable, *command(attribute), *options], check=True)
    return path


def main():
    p = cli.model_parser(__doc__)
    p.add_argument("--out", default="out/ten", help="folder of the sliders (default: %(default)s)")
    seeds = dict(default=SEEDS, help=f"default: {SEEDS[0]}-{SEEDS[-1]}")
    p.add_argument("--seeds", type=cli.seed_list, **seeds)
    p.add_argument("--steps", type=int, default=30)
    args = p.parse_args()
    files = {attribute: train(attribute, Path(args.out), args.model) for attribute in SLIDERS}
    model = cli.load_model(args)
    sliders = {attribute: lora.load(file, model.unet) for attribute, file in files.items()}

    for pair in PAIRS:
        for one, other in (pair, pair[::-1]):
            columns = []
            for held in (-2.0, 0.0, 2.0):
                columns += [[(sliders[one], s), (sliders[other], held)] for s in (-2.0, 2.0)]
            rows = readings(model, columns, args.seeds, steps=args.steps)[one]
            means = rows.mean(1).reshape(3, 2)
            effects = means[:, 1] - means[:, 0]
            off = abs(effects / effects[1] - 1).max()
            print(
                f"{one} from scale -2 to 2, {other} held at -2, 0, 2: "
                f"moves {', '.join(f'{e:.3f}' for e in effects)}, "
                f"at most {off:.0%} off its effect alone",
                flush=True,
            )

    columns = [[(s, scale) for s in sliders.values()] for scale in (-1.0, 0.0, 1.0)]
    table = readings(model, columns, args.seeds, NEUTRAL, steps=args.steps)
    print(f"all ten at scale    {'-1':>8}{'0':>8}{'1':>8}")
    for name in (*SLIDERS, "malformed", "face"):
        print(f"{name:20}" + "".join(f"{m:8.2f}" for m in table[name].mean(1)))


if __name__ == "__main__":
    cli.run(main)
