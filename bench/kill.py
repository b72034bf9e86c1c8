"""Kill trainings at random moments, resume them, compare bytes:

    python -m bench.kill

A text slider, a visual slider and SliderSpace's on the miniature, each first trained without a
break, then killed (SIGKILL, nothing can be caught) after random times, --kills of them in all, and
gone on with by --resume until it is done. Each must end with the same tensors, bit for bit."""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from miniature.world import RANGES
from support import cli
from support.options import default_help

ROOT = Path(__file__).parent.parent
PERSON = "a photo of a person"
TEXT = ["train_text.py", "--pos", f"{PERSON}, smiling", "--neg", f"{PERSON}, frowning"]
TEXT += ["--trajectories", "4", "--per-trajectory", "2", "--probe", "0"]
PAIRS = ["train_pairs.py", "--noises", "4", "--prompt", PERSON, "--probe", "0"]
SPACE = ["train_space.py", "--prompt", PERSON, "--sliders", "2", "--samples", "24"]
SPACE += ["--train-samples", "16", "--denoising-steps", "8"]


class Files(NamedTuple):
    """What a training writes, in its folder. {} stands for the name of the run."""

    out: str  # --out
    checkpoint: str
    sliders: list[str]


ONE_SLIDER = Files("{}.safetensors", "{}.safetensors.checkpoint", ["{}.safetensors"])
SPACE_SLIDERS = ["{}/1.safetensors", "{}/2.safetensors"]
SPACE_FOLDER = Files("{}", "{}/space.json.checkpoint", SPACE_SLIDERS)


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    content = lambda tensor: (tensor.dtype, tensor.numpy().tobytes())
    return a.keys() == b.keys() and all(content(a[k]) == content(b[k]) for k in a)


def survives(
    command: list[str],
    folder: Path,
    kills: int,
    rng: random.Random,
    longest: float,
    files: Files = ONE_SLIDER,
) -> dict:
    """Train `command` in `folder` without a break, and with `kills` kills, each after at most
    `longest` seconds: {"same": whether the sliders are, "kills", "left": whether a checkpoint
    is}."""

    def start(name, *words):
        out = str(folder / files.out.format(name))
        words = [sys.executable, *command, *words, "--out", out]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(words, cwd=ROOT, **pipes)

    process = start("unbroken")
    if process.wait():
        sys.exit(process.stderr.read())
    done, checkpoint = 0, folder / files.checkpoint.format("killed")
    while True:
        resumable = (checkpoint / "settings.json").exists()
        process = start("killed", "--resume" if resumable else "--overwrite")
        try:
            process.wait(rng.uniform(0.5, longest) if done < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            continue
        if process.returncode:
            sys.exit(process.stderr.read())
        if done >= kills:
            break  # finished, and no kill is left
    path = lambda name, run: folder / name.format(run)
    pairs = [(path(name, "unbroken"), path(name, "killed")) for name in files.sliders]
    same = all(same_tensors(one, other) for one, other in pairs)
    return {"same": same, "kills": done, "left": checkpoint.exists()}


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("--kills", type=int, default=20, help=default_help("in all"))
    p.add_argument("--steps", default="40", help=default_help("of each training"))
    longest = default_help("seconds until a kill, at most")
    p.add_argument("--longest", type=float, default=20.0, help=longest)
    seed = "of the moments (default: the time)"
    p.add_argument("--seed", type=int, default=int(time.time()), help=seed)
    args = p.parse_args()
    rng, bad, each = random.Random(args.seed), 0, args.kills // 3
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw = ["miniature.pairs", "--count", "4", "--out", str(folder / "pairs")]
        subprocess.run([sys.executable, "-m", *draw], cwd=ROOT, check=True)
        neg, pos = (str(folder / "pairs" / f"{value:g}") for value in RANGES["eye_size"])
        trainings = [
            ("text", TEXT, args.kills - 2 * each, ONE_SLIDER),
            ("pairs", [*PAIRS, "--neg", neg, "--pos", pos], each, ONE_SLIDER),
            ("space", SPACE, each, SPACE_FOLDER),
        ]
        for name, command, kills, files in trainings:
            work = folder / f"of_{name}"
            work.mkdir()
            command = [*command, "--steps", args.steps]
            found = survives(command, work, kills, rng, args.longest, files)
            bad += not found["same"] or found["left"]
            weights = "the same weights" if found["same"] else "OTHER WEIGHTS"
            line = f"{name}: killed {found['kills']} times, {weights} as without a break"
            print(line, flush=True)
    print(f"seed of the moments: {args.seed}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
