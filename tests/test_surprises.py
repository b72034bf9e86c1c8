"""What a command does besides what it was asked for: nothing. No network, no file outside the
output folder, no code from files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import fuzz

ROOT = Path(__file__).parent.parent

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
    return {
        f: f.stat().st_mtime_ns
        for f in folder.rglob("*")
        if f.is_file()
        and "__pycache__" not in f.parts
        and not {".git", "out", ".venv", ".pytest_cache"} & set(f.parts)
    }


@pytest.mark.slow
def test_no_network_and_no_file_outside_the_output_folder(tmp_path):
    """Training and drawing without a home, a cache or a network: nothing is asked for, nothing is
    left but what was named."""
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    program, before = NO_NETWORK.format(log=str(tmp_path / "network"), root=str(ROOT)), tree(ROOT)
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TRANSFORMERS_"))
    } | {"HOME": str(home), "TMPDIR": str(home)}
    for command in (
        [
            "train_text.py",
            "--pos",
            "a person, smiling",
            "--neg",
            "a person, frowning",
            "--steps",
            "1",
            "--trajectories",
            "1",
            "--per-trajectory",
            "1",
            "--denoising-steps",
            "2",
            "--probe",
            "0",
            "--out",
            str(out / "s.safetensors"),
        ],
        [
            "slider.py",
            "--prompt",
            "a person",
            "--slider",
            str(out / "s.safetensors"),
            "--scales",
            "0,1",
            "--seeds",
            "0",
            "--steps",
            "2",
            "--out",
            str(out),
        ],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "network").exists(), (tmp_path / "network").read_text()
    assert tree(home) == {} and tree(ROOT) == before
    assert {f.name for f in out.iterdir()} == {
        "s.safetensors",
        "seed0_scale0.png",
        "seed0_scale+1.png",
        "strip.png",
        "sweep.gif",
    }


def test_no_code_from_elsewhere_is_ever_trusted():
    """trust_remote_code nowhere, and no unpickling without weights_only=True."""
    for file in ROOT.rglob("*.py"):
        if (
            any(part.startswith(".venv") for part in file.parts)
            or file == Path(__file__)
            or "tests" in file.parts
        ):
            continue
        text = file.read_text()
        assert "trust_remote_code" not in text, file
        assert all(
            "weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text)
        ), file
        assert (
            not re.search(r"pickle\.load|yaml\.load\(|\beval\(|joblib", text.replace(".eval(", ""))
            or file.name == "fuzz.py"
        ), file


def test_broken_and_hostile_files_in_small():
    """150 cases of bench/fuzz.py: each is read or refused in one line, in time, and nothing in it
    runs."""
    outcomes, findings = fuzz.run(
        150, 1, slow=3.0, memory=900
    )  # slower here: other tests may run beside it
    assert not findings, "\n".join(findings)
    assert outcomes["refused"] > 80
