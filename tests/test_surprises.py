"""What a command does besides what it was asked for: nothing. No network, no file outside the
output folder, no code from files."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from commands import ROOT

from bench import fuzz

# Run before the command, in the same process: every way to the network fails, and says so in a
# file.
NO_NETWORK = """
import socket, sys, runpy
def refuse(*args, **kw):
    open({log!r}, "a").write(repr(args) + "\\n")
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + "/" + sys.argv[0], run_name="__main__")
"""


def tree(folder):
    left_out = {".git", "out", ".venv", ".pytest_cache", "__pycache__"}
    files = [f for f in folder.rglob("*") if f.is_file() and not left_out & set(f.parts)]
    return {f: f.stat().st_mtime_ns for f in files}


@pytest.mark.slow
def test_no_network_and_no_file_outside_the_output_folder(tmp_path):
    """Training and drawing without a home, a cache or a network: nothing is asked for, nothing is
    left but what was named."""
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    program, before = NO_NETWORK.format(log=str(tmp_path / "network"), root=str(ROOT)), tree(ROOT)
    caches = ("HF_", "XDG_", "TRANSFORMERS_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(caches)}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    small = "--steps 1 --trajectories 1 --per-trajectory 1 --denoising-steps 2 --probe 0"
    ends, slider = "--pos 'a person, smiling' --neg 'a person, frowning'", out / "s.safetensors"
    scales = "--scales 0,1 --seeds 0 --steps 2"
    for command in (
        f"train_text.py {ends} {small} --out {slider}",
        f"slider.py --prompt 'a person' --slider {slider} {scales} --out {out}",
    ):
        words = [sys.executable, "-c", program, *shlex.split(command)]
        options = dict(cwd=home, env=environment, capture_output=True, text=True)
        done = subprocess.run(words, **options)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "network").exists(), (tmp_path / "network").read_text()
    assert tree(home) == {} and tree(ROOT) == before
    pictures = {"seed0_scale0.png", "seed0_scale+1.png", "strip.png", "sweep.gif"}
    assert {f.name for f in out.iterdir()} == pictures | {"s.safetensors"}


def test_no_code_from_elsewhere_is_ever_trusted():
    """trust_remote_code nowhere, and no unpickling without weights_only=True."""
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).parts
        if "tests" in parts or any(part.startswith(".venv") for part in parts):
            continue
        text = file.read_text()
        assert "trust_remote_code" not in text, file
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, file
        if file.name != "fuzz.py":
            trusting = r"pickle\.load|yaml\.load\(|\beval\(|joblib"
            assert not re.search(trusting, text.replace(".eval(", "")), file


def test_broken_and_hostile_files_in_small():
    """150 cases of bench/fuzz.py: each is read or refused in one line, in time, and nothing in it
    runs."""
    # Slower here: other tests may run beside it.
    outcomes, findings = fuzz.run(150, 1, slow=3.0, memory=900)
    assert not findings, "\n".join(findings)
    assert outcomes["refused"] > 80
