"""Kill trainings at random moments, resume them, compare bytes.  python -m bench.kill

A text slider, a visual slider and SliderSpace's on the miniature, each first trained without a break, then killed (SIGKILL, nothing
can be caught) after random times, --kills of them in all, and gone on with by --resume until it is done. Each must end with the same
tensors, bit for bit.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TEXT = [
    "train_text.py",
    "--pos",
    "a photo of a person, smiling",
    "--neg",
    "a photo of a person, frowning",
    "--trajectories",
    "4",
    "--per-trajectory",
    "2",
]
PAIRS = ["train_pairs.py", "--noises", "4", "--prompt", "a photo of a person"]
SPACE = [
    "train_space.py",
    "--prompt",
    "a photo of a person",
    "--sliders",
    "2",
    "--samples",
    "24",
    "--train-samples",
    "16",
    "--denoising-steps",
    "8",
]


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a
    )


def survives(
    command: list[str],
    folder: Path,
    kills: int,
    rng: random.Random,
    longest: float,
    out: str = "{}.safetensors",
    files=("{}.safetensors",),
    unfinished: str = "{}.safetensors.unfinished",
) -> dict:
    """Train `command` without a break, and with `kills` kills: {"same", "kills", "left"}. out, files, unfinished: names of --out, of
    the sliders it writes and of what it keeps, in `folder`, with {} for the name of the run."""

    def start(name, *words):
        return subprocess.Popen(
            [sys.executable, *command, *words, "--out", str(folder / out.format(name))],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start("whole")
    if process.wait():
        sys.exit(process.stderr.read())
    done, unfinished = 0, folder / unfinished.format("killed")
    while True:
        going = (unfinished / "settings.json").exists()
        process = start("killed", *(["--resume"] if going else ["--overwrite"]))
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
    return {
        "same": all(same(folder / f.format("whole"), folder / f.format("killed")) for f in files),
        "kills": done,
        "left": unfinished.exists(),
    }


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    p.add_argument("--steps", default="40", help="of each training (default: %(default)s)")
    p.add_argument(
        "--longest",
        type=float,
        default=20.0,
        help="seconds until a kill, at most (default: %(default)s)",
    )
    p.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the moments (default: the time)"
    )
    args = p.parse_args()
    rng, bad = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "miniature.pairs",
                "--count",
                "4",
                "--out",
                str(folder / "pairs"),
            ],
            cwd=ROOT,
            check=True,
        )
        pairs = [
            *PAIRS,
            "--neg",
            str(folder / "pairs" / "0.7"),
            "--pos",
            str(folder / "pairs" / "1.5"),
        ]
        each, probe = args.kills // 3, ["--probe", "0"]
        space = dict(
            out="{}",
            files=("{}/1.safetensors", "{}/2.safetensors"),
            unfinished="{}/space.json.unfinished",
        )
        for name, command, kills, names in (
            ("text", TEXT + probe, args.kills - 2 * each, {}),
            ("pairs", pairs + probe, each, {}),
            ("space", SPACE, each, space),
        ):
            (folder / f"of_{name}").mkdir()
            found = survives(
                [*command, "--steps", args.steps],
                folder / f"of_{name}",
                kills,
                rng,
                args.longest,
                **names,
            )
            bad += not found["same"] or found["left"]
            print(
                f"{name}: killed {found['kills']} times, {'the same weights' if found['same'] else 'OTHER WEIGHTS'} as without a break",
                flush=True,
            )
    print(f"seed of the moments: {args.seed}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
