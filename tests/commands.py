"""Command lines for tests, written as a user writes them: "slider.py --prompt 'a cat' --steps
3"."""

import contextlib
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
POS, NEG = "'a photo of a person, smiling'", "'a photo of a person, frowning'"
TRAIN = f"train_text.py --pos {POS} --neg {NEG}"
PAIRS = "train_pairs.py --neg tests/facts"
DRAW = "slider.py --prompt 'a photo of a person'"
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


def run(command: str, cwd=ROOT):
    """The command in this process, which has everything imported already: much faster. Returns an
    object with returncode, stdout and stderr, as subprocess does."""
    words, out, err, code = shlex.split(command), io.StringIO(), io.StringIO(), 0
    before = sys.argv, Path.cwd(), signal.getsignal(signal.SIGTERM)
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    os.chdir(cwd)
    try:
        with (
            warnings.catch_warnings(),  # support.cli.run replaces showwarning
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            warnings.simplefilter("default")
            warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        signal.signal(signal.SIGTERM, before[2])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def run_apart(command: str, cwd=ROOT):
    """The command in a process of its own."""
    words = shlex.split(command)
    words = words if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
    captured = dict(capture_output=True, text=True)
    return subprocess.run([sys.executable, *words], cwd=cwd, env=ENVIRONMENT, **captured)


def run_in_two(command: str):
    """The command in two processes that work together."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    return run_apart(f"{launch} {command}")
