"""Kill trainings at random moments, resume them, compare bytes.  python -m bench.kill

A text and a visual slider on the miniature, each first trained without a break, then killed (SIGKILL, nothing can be caught)
after random times, --kills of them in all, and gone on with by --resume until it is done. Both must end with the same tensors,
bit for bit.
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
TEXT = ["train_text.py", "--pos", "a photo of a person, smiling", "--neg", "a photo of a person, frowning", "--trajectories", "4", "--per-trajectory", "2"]
PAIRS = ["train_pairs.py", "--noises", "4", "--prompt", "a photo of a person"]


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


def survives(command: list[str], folder: Path, kills: int, rng: random.Random, longest: float) -> dict:
    """Train `command` to folder/whole.safetensors, and with `kills` kills to folder/killed.safetensors: {"same", "kills", "finished"}."""
    def start(name, *words):
        return subprocess.Popen([sys.executable, *command, *words, "--out", str(folder / f"{name}.safetensors")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    process = start("whole")
    if process.wait():
        sys.exit(process.stderr.read())
    done, unfinished = 0, folder / "killed.safetensors.unfinished"
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
    return {"same": same(folder / "whole.safetensors", folder / "killed.safetensors"), "kills": done, "left": unfinished.exists()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    p.add_argument("--steps", default="40", help="of each training (default: %(default)s)")
    p.add_argument("--longest", type=float, default=20.0, help="seconds until a kill, at most (default: %(default)s)")
    p.add_argument("--seed", type=int, default=int(time.time()), help="of the moments (default: the time)")
    args = p.parse_args()
    rng, bad = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, "-m", "miniature.pairs", "--count", "4", "--out", str(folder / "pairs")], cwd=ROOT, check=True)
        pairs = [*PAIRS, "--neg", str(folder / "pairs" / "0.7"), "--pos", str(folder / "pairs" / "1.5")]
        for name, command, kills in (("text", TEXT, args.kills - args.kills // 2), ("pairs", pairs, args.kills // 2)):
            (folder / name).mkdir()
            found = survives([*command, "--steps", args.steps, "--probe", "0"], folder / name, kills, rng, args.longest)
            bad += not found["same"] or found["left"]
            print(f"{name}: killed {found['kills']} times, {'the same bytes' if found['same'] else 'OTHER BYTES'} as without a break", flush=True)
    print(f"seed of the moments: {args.seed}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
