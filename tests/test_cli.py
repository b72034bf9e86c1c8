"""The command lines as a stranger uses them: what works, and one clear line with exit status 2 for what cannot."""

import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
TRAIN = [
    "train_text.py",
    "--pos",
    "a photo of a person, smiling",
    "--neg",
    "a photo of a person, frowning",
]
PAIRS = ["train_pairs.py", "--neg", "tests/facts"]
DRAW = ["slider.py", "--prompt", "a photo of a person"]


def run(*command, cwd=ROOT):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, ROOT / command[0], *map(str, command[1:])],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quickly trained slider, and what its training printed."""
    path = tmp_path_factory.mktemp("cli") / "smile.safetensors"
    done = run(
        *TRAIN,
        "--preserve",
        "man, woman",
        "--steps",
        4,
        "--trajectories",
        2,
        "--per-trajectory",
        3,
        "--denoising-steps",
        6,
        "--out",
        path,
    )
    assert done.returncode == 0, done.stderr
    return path, done


def test_training_reports_and_records_itself(trained):
    path, done = trained
    assert (
        "target: a photo of a person\n" in done.stdout
        and "teacher's change on unseen x_t" in done.stdout
    )
    assert "learned" in done.stderr and "loss" in done.stderr  # the progress bar with the meter
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    settings = json.loads(metadata["settings"])
    assert (
        settings["pos"] == "a photo of a person, smiling"
        and settings["preserve"] == ["man, woman"]
        and settings["rank"] == 4
    )
    assert (
        settings["lr"] > 0
        and json.loads(metadata["prompts"]) == ["a photo of a person"]
        and json.loads(metadata["preserved"]) == ["man", "woman"]
        and "share" in json.loads(metadata["meter"])
    )


def test_a_strip_and_single_files_from_any_folder(trained, tmp_path):
    done = run(
        *DRAW,
        "--slider",
        trained[0],
        "--scales",
        "-2,0,+2",
        "--seeds",
        "1-2",
        "--steps",
        3,
        "--out",
        tmp_path / "o",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    names = {f"seed{s}_scale{x}.png" for s in (1, 2) for x in ("-2", "0", "+2")} | {
        "strip.png",
        "sweep.gif",
    }
    assert {f.name for f in (tmp_path / "o").iterdir()} == names
    assert Image.open(tmp_path / "o" / "sweep.gif").n_frames == 4  # there and back
    single, strip = (
        Image.open(tmp_path / "o" / "seed1_scale0.png"),
        Image.open(tmp_path / "o" / "strip.png"),
    )
    assert single.size == (128, 128) and strip.width > 3 * 128 and strip.height > 2 * 128
    # Scale 0 is the untouched model, bit for bit, and the same seed is the same picture.
    plain = run(*DRAW, "--seeds", "1-2", "--steps", 3, "--out", tmp_path / "p")
    assert (
        plain.returncode == 0
        and (tmp_path / "p" / "seed1.png").read_bytes()
        == (tmp_path / "o" / "seed1_scale0.png").read_bytes()
    )


def test_a_grid_and_eq_8_without_a_slider(trained, tmp_path):
    path = trained[0]
    done = run(
        *DRAW,
        "--slider",
        path,
        "--slider",
        f"{path}@0.5",
        "--grid",
        "--scales",
        "-1,1",
        "--seeds",
        "0",
        "--steps",
        2,
        "--out",
        tmp_path / "g",
    )
    assert done.returncode == 0, done.stderr
    assert {f.name for f in (tmp_path / "g").iterdir()} == {
        f"seed0_scale{a}_{b}.png" for a in ("-1", "+1") for b in ("-1", "+1")
    } | {"grid_seed0.png"}
    done = run(
        *DRAW,
        "--guide",
        "a photo of an old person",
        "a photo of a young person",
        "--preserve",
        "man, woman",
        "--scales",
        "0,1",
        "--seeds",
        "0",
        "--steps",
        2,
        "--out",
        tmp_path / "e",
    )
    assert done.returncode == 0 and "6 network evaluations" in done.stdout
    assert (tmp_path / "e" / "seed0_scale0.png").read_bytes() != (
        tmp_path / "e" / "seed0_scale+1.png"
    ).read_bytes()


def test_a_real_picture_is_inverted_once_and_edited(trained, tmp_path):
    import numpy as np

    from miniature import world

    world.draw(world.sample(np.random.default_rng(1), kind="face")).resize((200, 160)).save(
        tmp_path / "me.png"
    )
    command = [
        *DRAW,
        "--image",
        tmp_path / "me.png",
        "--slider",
        trained[0],
        "--scales",
        "0,2",
        "--steps",
        3,
        "--out",
        tmp_path / "o",
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert (
        "200x160, brought to 128x128" in done.stdout
        and "at most 39 network evaluations" in done.stdout
    )
    (kept,) = (tmp_path / "o").glob("inversion-*.safetensors")
    assert {f.name for f in (tmp_path / "o").iterdir()} == {
        "me_scale0.png",
        "me_scale+2.png",
        "strip.png",
        "sweep.gif",
        kept.name,
    }
    first, age = (tmp_path / "o" / "me_scale+2.png").read_bytes(), kept.stat().st_mtime_ns
    done = run(*command)
    assert (
        done.returncode == 0
        and "network evaluations" not in done.stdout
        and kept.stat().st_mtime_ns == age
    )
    assert (tmp_path / "o" / "me_scale+2.png").read_bytes() == first
    done = run(
        *command, "--guidance", 3, "--invert", "negative-prompt"
    )  # other settings, another inversion
    assert (
        done.returncode == 0
        and len(list((tmp_path / "o").glob("inversion-*"))) == 2
        and "\nnegative-prompt inversion: 3 network" in done.stdout
    )
    done = run(*command, "--strength", 0.5, "--seeds", "1,2", "--out", tmp_path / "s")
    assert (
        done.returncode == 0
        and (tmp_path / "s" / "seed2_scale+2.png").exists()
        and not list((tmp_path / "s").glob("inversion-*"))
    )


def test_pages_with_a_slider_and_with_a_plane(trained, tmp_path):
    one = [*DRAW, "--slider", trained[0], "--seeds", "0,1", "--steps", 2, "--out", tmp_path / "o"]
    done = run(*one, "--scales", "-1,0,1", "--html", tmp_path / "p" / "one.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "p" / "one.html").read_text()
    assert (
        text.count("data:image/png") == 6
        and "seed1" in text
        and '"say": "' in text
        and '"scales": [-1.0, 0.0, 1.0]' in text
    )
    done = run(
        *one,
        "--slider",
        f"{trained[0]}@0.5",
        "--grid",
        "--scales",
        "-1,1",
        "--html",
        tmp_path / "p" / "two.html",
    )
    assert (
        done.returncode == 0
        and (tmp_path / "p" / "two.html").read_text().count("data:image/png") == 8
    ), done.stderr


def test_a_folder_of_sliders_each_and_at_random(trained, tmp_path):
    (tmp_path / "space").mkdir()
    for i in (1, 2):
        (tmp_path / "space" / f"{i}.safetensors").write_bytes(trained[0].read_bytes())
    command = [
        *DRAW,
        "--slider",
        tmp_path / "space",
        "--scales",
        "-1,0,1",
        "--seeds",
        "0,1",
        "--steps",
        2,
    ]
    done = run(*command, "--each", "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert {f.name for f in (tmp_path / "e").iterdir()} == {"each_seed0.png", "each_seed1.png"}
    done = run(*command, "--random", 2, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    a, b = ((tmp_path / "r" / f"seed0_scalerandom{i}.png").read_bytes() for i in (1, 2))
    assert a != b


def test_pairs_train_and_preview(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "miniature.pairs",
            "--count",
            "3",
            "--values",
            "0.6,1.1,1.6",
            "--out",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    done = run(
        "train_pairs.py",
        "--neg",
        tmp_path / "0.6",
        "--at",
        "0.2",
        tmp_path / "1.1",
        "--pos",
        tmp_path / "1.6",
        "--steps",
        4,
        "--noises",
        2,
        "--preview",
        4,
        "--probe",
        1,
        "--out",
        tmp_path / "eyes.safetensors",
    )
    assert done.returncode == 0, done.stderr
    assert "3 groups of 3" in done.stdout and "teacher's change on unseen x_t" in done.stdout
    assert Image.open(tmp_path / "eyes.png").width > 3 * 128
    with safe_open(tmp_path / "eyes.safetensors", "pt") as f:
        assert (
            json.loads(f.metadata()["settings"])["at"] == [["0.2", str(tmp_path / "1.1")]]
            and f.metadata()["kind"] == "visual slider"
        )


def test_an_unknown_word_is_named(tmp_path):
    done = run(
        "slider.py", "--prompt", "a photo of a zebra", "--seeds", 0, "--steps", 1, "--out", tmp_path
    )
    assert done.returncode == 0 and "'zebra'" in done.stderr and "photo" not in done.stderr


BAD = [
    ([*TRAIN, "--frobnicate"], "--frobnicate"),
    ([*TRAIN, "--step", "3"], "there is no --step: --steps may be meant"),
    (["slider.py", "--promt", "a"], "there is no --promt: --prompt may be meant"),
    ([*TRAIN, "--rank", "0"], "--rank"),
    ([*TRAIN, "--rank", "5000"], "rank: 5000"),
    ([*TRAIN, "--rank", "four"], "--rank"),
    ([*TRAIN, "--model", "nowhere"], "nowhere: no such model folder"),
    ([*TRAIN, "--model", "tests"], "model_index.json"),
    ([*TRAIN, "--layers", "everything"], "--layers"),
    ([*TRAIN, "--size", "100"], "size: 100x100"),
    ([*TRAIN, "--out", "tests"], "is a folder"),
    ([*TRAIN, "--out", "docs/age.png", "--overwrite"], "is to be a .safetensors file"),
    (
        ["train_text.py", "--pos", "a man, old", "--neg", "a man, old"],
        "--pos and --neg are the same",
    ),
    ([*DRAW, "--scales", "nan"], "'nan' is not a list of numbers"),
    ([*DRAW, "--seeds", "5-2"], "'5-2' is not a list of whole numbers"),
    ([*DRAW, "--seeds", "-3"], "'-3' is not a list of whole numbers"),
    ([*TRAIN, "--steps", "0"], "--steps"),
    ([*TRAIN, "--per-trajectory", "30"], "--per-trajectory 30"),
    (["train_text.py", "--pos", "", "--neg", "a"], "--pos is empty"),
    (["train_text.py", "--pos", "an old man", "--neg", "a young man"], "--prompt is needed"),
    (["train_text.py", "--pos", "an old man"], "--neg"),
    ([*DRAW, "--slider", "missing.safetensors"], "missing.safetensors: no such file"),
    ([*DRAW, "--slider", "README.md"], "README.md"),
    ([*DRAW, "--merge", "missing.safetensors"], "missing.safetensors: no such file"),
    ([*DRAW, "--model", "README.md"], "README.md: not a readable"),
    ([*DRAW, "--vae-tile", "8"], "--vae-tile"),
    ([*DRAW, "--size", "130"], "size: 130x130"),
    ([*DRAW, "--steps", "0"], "steps: 0"),
    ([*DRAW, "--scales", "a,b"], "--scales"),
    ([*DRAW, "--seeds", "x"], "--seeds"),
    ([*DRAW, "--out", "README.md"], "README.md"),
    (["slider.py", "--prompt", " "], "--prompt is empty"),
    ([*DRAW, "--slider", "a.safetensors:1@2"], "must be between 0 and 1, not 2"),
    ([*DRAW, "--grid", "--slider", "a.safetensors"], "--grid needs two sliders"),
    ([*DRAW, "--guide", "old", "young", "--slider", "a.safetensors"], "--guide"),
    ([*DRAW, "--batch", "0"], "--batch"),
    ([*DRAW, "--scales", "-1,1"], "no slider to sweep"),
    ([*DRAW, "--eta", "2"], "belong to --guide"),
    ([*DRAW, "--strength", "0.5"], "--strength belongs to --image"),
    ([*DRAW, "--each", "--slider", "a.safetensors", "--html", "x.html"], "--html shows"),
    ([*DRAW, "--each"], "--each needs sliders"),
    ([*DRAW, "--html", "age.safetensors"], "age.safetensors: is to be a .html file"),
    ([*DRAW, "--guidance", "nan"], "'nan' is not"),
    ([*DRAW, "--guidance", "0"], "--guidance: at 0 the prompt would count for nothing"),
    ([*DRAW, "--start", "3"], "--start: 3 is not between 0 and 1"),
    ([*TRAIN, "--seed", "10000000000000000"], "is not a whole number from 0 to"),
    ([*DRAW, "--slider", "README.md:strong"], "'strong' after the colon is no number"),
    ([*DRAW, "--slider", ""], "no file is named"),
    (["live.py", "--slider", "a.safetensors", "--port", "99999"], "--port must be from 0 to 65535"),
    ([*TRAIN, "--guidance", "-5"], "--guidance: at -5 the prompt"),
    ([*TRAIN, "--prompt", ""], "--prompt is empty"),
    ([*PAIRS, "--pos", "tests/facts"], "one folder is named twice"),
    (["miniature/pairs.py", "--values", "5,9"], "eye_size goes from 0.6 to 1.6"),
    ([*DRAW, "--random", "2", "--each", "--slider", "a.safetensors"], "one of them at a time"),
    ([*DRAW, "--slider", "docs"], "docs: holds no slider files"),
    ([*DRAW, "--image", "a.png", "--strength", "2"], "--strength must be above 0"),
    ([*DRAW, "--image", "missing.png"], "missing.png: no such file"),
    ([*DRAW, "--image", "README.md"], "README.md: not a readable picture"),
    ([*DRAW, "--size", "0"], "size: 0x0"),
    (["tools.py", "info", "README.md"], "README.md: not a readable"),
    (["tools.py", "convert", "README.md"], "--out is needed"),
    ([*TRAIN, "--preview", "-1"], "--preview"),
    (PAIRS, "two folders at least"),
    (["train_pairs.py", "--neg", "nowhere", "--pos", "docs"], "nowhere: no such folder"),
    ([*PAIRS, "--pos", "docs"], "tests/facts: holds no pictures"),
    ([*PAIRS, "--at", "-1", "docs"], "two folders at least, each at a scale of its own"),
    ([*PAIRS, "--at", "x", "docs"], "--at wants a number"),
    ([*PAIRS, "--pos", "docs", "--noises", "0"], "--noises"),
]


@pytest.mark.parametrize("command, names", BAD, ids=[" ".join(c[-2:]) for c, _ in BAD])
def test_bad_input_is_one_clear_line(command, names, monkeypatch, capsys):
    """In this process, which has everything imported already."""
    before = {f: f.stat().st_mtime_ns for f in ROOT.glob("*.*")}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # cli.run sets it: put back
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(command[0], run_name="__main__")
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith("warning: ") and "\r" not in line
    ]
    assert stopped.value.code == 2 and names in line and line.startswith("error"), line
    assert {f: f.stat().st_mtime_ns for f in ROOT.glob("*.*")} == before


@pytest.mark.parametrize(
    "command, names",
    [
        ([*TRAIN, "--frobnicate"], "--frobnicate"),
        ([*DRAW, "--slider", "README.md"], "README.md"),
        (PAIRS, "two folders"),
    ],
)
def test_nor_is_there_a_traceback(command, names):
    done = run(*command)
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and names in done.stderr.strip().splitlines()[-1]
    )


@pytest.mark.parametrize(
    "script", ["train_text.py", "train_pairs.py", "train_space.py", "slider.py", "live.py"]
)
def test_help(script, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--model" in out and "default" in out and "None)" not in out


def test_a_space_of_sliders(tmp_path):
    """Discovered, written with what they are, refused where they would replace others, goes on with --resume, and used as a folder."""
    command = ["train_space.py", "--prompt", "a photo of a person", "--sliders", 2, "--samples", 12, "--train-samples", 10, "--per-sample", 2,
               "--denoising-steps", 4, "--steps", 2, "--out", tmp_path / "space"]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert {f.name for f in (tmp_path / "space").iterdir()} == {
        "1.safetensors",
        "2.safetensors",
        "space.json",
        "sheet.png",
        "samples",
    }
    with safe_open(tmp_path / "space" / "1.safetensors", "pt") as f:
        assert (
            f.metadata()["kind"] == "space slider"
            and len(json.loads(f.metadata()["v"])) == 128
            and "words" in f.metadata()
        )
    again = run(*command)
    assert (
        again.returncode == 2
        and "space.json: is there already: --overwrite replaces it" in again.stderr
    )
    other = run(*command, "--overwrite", "--seed", 1)
    assert other.returncode == 2 and "samples: was begun with --seed 0, not 1" in other.stderr
    drawn = run(
        *DRAW,
        "--slider",
        tmp_path / "space",
        "--each",
        "--scales",
        "-1,1",
        "--seeds",
        0,
        "--steps",
        3,
        "--out",
        tmp_path / "drawn",
    )
    assert drawn.returncode == 0 and (tmp_path / "drawn" / "each_seed0.png").exists(), drawn.stderr
