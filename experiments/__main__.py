"""Every experiment with two training seeds, then the tables, then whether the page still says what
they do:

    python -m experiments --jobs 2

With --jobs N, N of them run at once, each on its share of the cores: the work is small, and two
processes of one thread do more of it than one of two. Stop it at any time and start it again: what
experiments/results/done.txt names is not run again, and of what is not, only what its results lack.
Results of another miniature than the bundled one are removed first (git has them)."""

import shutil
import subprocess
import sys

from experiments import claims, report
from experiments.common import RESULTS
from formats import hashes
from sdxl import MINIATURE
from support import cli
from support.jobs import at_once
from support.options import default_help

NAMES = ["text_sliders", "visual_sliders", "ablations", "activation", "composition", "repair"]
NAMES += ["inversion", "space", "guidance", "stylegan.sliders"]
SEEDS = (0, 1)  # side by side: two experiments of one seed would train the same sliders twice
ALL = ["defaults", *(f"{name} --seed {seed}" for name in NAMES for seed in SEEDS)]
OTHERS = ("full_width.json", "full_width.png")  # not of the bundled miniature
DONE = RESULTS / "done.txt"
SLIDERS = "out/experiments"


def done() -> list[str]:
    """What is done with the bundled miniature; results of another one are removed."""
    judge = MINIATURE.parent / "judge.safetensors"
    model = hashes.files_hash([*sorted(MINIATURE.rglob("*.safetensors")), judge])
    lines = DONE.read_text().splitlines() if DONE.exists() else [""]
    if lines[0] == model:
        return lines
    print("the results are another miniature's: they are removed, and so are its sliders")
    for path in RESULTS.iterdir():
        if path.name not in OTHERS:
            path.unlink()
    shutil.rmtree(SLIDERS, ignore_errors=True)
    cli.write_text(DONE, model + "\n")
    return [model]


def run(line: str) -> int:
    print(f"\n$ python -m experiments.{line}", flush=True)
    name, *options = line.split()
    return subprocess.run([sys.executable, "-m", f"experiments.{name}", *options]).returncode


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("--jobs", type=int, default=1, help=default_help("experiments at once"))
    args = p.parse_args()
    finished, failed = done(), []
    for (line,), status in at_once(args.jobs, run, [(x,) for x in ALL if x not in finished]):
        (failed if status else finished).append(line)
        cli.write_text(DONE, "\n".join(finished) + "\n")
    report.main()
    claims.main()
    if failed:
        sys.exit("\n".join(f"failed: python -m experiments.{line}" for line in failed))


if __name__ == "__main__":
    cli.run(main)
