"""Every experiment with two training seeds, then the tables, then whether the page still says what
they do:

    python -m experiments

Stop it at any time and start it again: what experiments/results/done.txt names is not run again,
and of what is not, only what its results lack. Results of another miniature than the bundled one
are removed first (git has them)."""

import shutil
import subprocess
import sys

from experiments import claims, report
from experiments.common import RESULTS
from formats import hashes
from sdxl import MINIATURE
from support import cli

NAMES = ("text_sliders", "visual_sliders", "ablations", "activation", "composition", "repair")
ALL = [[name, f"--seed {seed}"] for seed in (0, 1) for name in (*NAMES, "inversion", "space")]
ALL += [["guidance", f"--seed {seed} --pictures 16 --dtype float32"] for seed in (0, 1)]
ALL += [["defaults", ""], *(["stylegan.sliders", f"--seed {seed}"] for seed in (0, 1))]
OTHERS = ("full_width.json", "full_width.png")  # not of the bundled miniature
DONE = RESULTS / "done.txt"
SLIDERS = "out/experiments"


def done() -> list[str]:
    """What is done with the bundled miniature; results of another one are removed."""
    model = hashes.model_hash(MINIATURE / "unet" / "diffusion_pytorch_model.safetensors")
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


def main():
    cli.plain_parser(__doc__).parse_args()
    finished = done()
    for name, options in ALL:
        line = f"{name} {options}".strip()
        if line in finished:
            continue
        print(f"\n$ python -m experiments.{line}", flush=True)
        command = [sys.executable, "-m", f"experiments.{name}", *options.split()]
        if status := subprocess.run(command).returncode:
            sys.exit(status)
        finished.append(line)
        cli.write_text(DONE, "\n".join(finished) + "\n")
    report.main()
    claims.main()


if __name__ == "__main__":
    cli.run(main)
