"""The command lines as a stranger uses them: what works, and one clear line with exit status 2 for
what cannot."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from commands import DRAW, PAIRS, ROOT, TRAIN, run, run_apart
from PIL import Image
from safetensors import safe_open
from test_lora import trained_slider

import lora
import slider
import train_text
from miniature import world
from support import cli, probe, sheets


def names_in(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def metadata_of(file) -> dict[str, str]:
    with safe_open(file, "pt") as f:
        return f.metadata()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quickly trained slider, and what its training printed."""
    path = tmp_path_factory.mktemp("cli") / "smile.safetensors"
    small = "--trajectories 2 --per-trajectory 3 --denoising-steps 6 --steps 4 --size 64"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "SCALES", (-1.0, 0.0, 1.0))  # most of the time goes into the probe
        done = run(f"{TRAIN} --preserve 'man, woman' {small} --probe 1 --out {path}")
    assert done.returncode == 0, done.stderr
    return path, done


def test_training_reports_and_records_itself(trained):
    path, done = trained
    assert "target: a photo of a person\n" in done.stdout
    assert "teacher's change on unseen x_t" in done.stdout
    assert "learned" in done.stderr and "loss" in done.stderr  # the progress bar with the meter
    metadata = metadata_of(path)
    settings = json.loads(metadata["settings"])
    assert settings["pos"] == "a photo of a person, smiling"
    assert settings["preserve"] == ["man, woman"]
    assert settings["rank"] == 4
    assert settings["lr"] > 0
    assert json.loads(metadata["prompts"]) == ["a photo of a person"]
    assert json.loads(metadata["preserved"]) == ["man", "woman"]
    assert "share" in json.loads(metadata["meter"])
    assert "range" in json.loads(metadata["probe"])


def test_a_strip_and_single_files_from_any_folder(trained, tmp_path):
    draw = f"{DRAW} --slider {trained[0]} --scales -2,0,+2 --seeds 1-2 --steps 3"
    done = run(f"{draw} --out {tmp_path}/o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {f"seed{s}_scale{x}.png" for s in (1, 2) for x in ("-2", "0", "+2")}
    assert names_in(tmp_path / "o") == names | {"strip.png", "sweep.gif"}
    assert Image.open(tmp_path / "o" / "sweep.gif").n_frames == 4  # there and back
    single = Image.open(tmp_path / "o" / "seed1_scale0.png")
    strip = Image.open(tmp_path / "o" / "strip.png")
    assert single.size == (128, 128) and strip.width > 3 * 128 and strip.height > 2 * 128
    # Scale 0 is the untouched model, bit for bit, and the same seed is the same picture.
    plain = run(f"{DRAW} --seeds 1-2 --steps 3 --out {tmp_path}/p")
    assert plain.returncode == 0
    untouched = (tmp_path / "p" / "seed1.png").read_bytes()
    assert untouched == (tmp_path / "o" / "seed1_scale0.png").read_bytes()


def test_a_sweep_of_more_rows_than_a_gif_holds_has_none(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "MAX_GIF_SIDE", 100)
    few = "--scales 0,1 --seeds 1 --steps 2"
    done = run(f"{DRAW} --slider {trained[0]} {few} --out {tmp_path}")
    assert done.returncode == 0 and "no sweep.gif: a GIF is at most 100" in done.stdout
    assert names_in(tmp_path) == {"seed1_scale0.png", "seed1_scale+1.png", "strip.png"}


def test_a_grid_and_eq_8_without_a_slider(trained, tmp_path):
    path = trained[0]
    two = f"--slider {path} --slider {path}@0.5"
    done = run(f"{DRAW} {two} --grid --scales -1,1 --seeds 0 --steps 2 --out {tmp_path}/g")
    assert done.returncode == 0, done.stderr
    names = {f"seed0_scale{a}_{b}.png" for a in ("-1", "+1") for b in ("-1", "+1")}
    assert names_in(tmp_path / "g") == names | {"grid_seed0.png"}
    guide = "--guide 'a photo of an old person' 'a photo of a young person'"
    few = "--scales 0,1 --seeds 0 --steps 2"
    done = run(f"{DRAW} {guide} --preserve 'man, woman' {few} --out {tmp_path}/e")
    assert done.returncode == 0 and "6 network evaluations" in done.stdout
    without, with_it = (tmp_path / "e" / f"seed0_scale{x}.png" for x in ("0", "+1"))
    assert without.read_bytes() != with_it.read_bytes()


def test_a_file_is_drawn_as_its_name_and_the_options_say(model, tmp_path):
    """A strip's single files, a grid's, and the pictures in its page, against slider.generate."""
    sliders = [trained_slider(model.unet, seed, layers="attn") for seed in (0, 1)]
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for one, path in zip(sliders, paths):
        lora.save(path, one, {})
    settings = dict(steps=3, guidance=3.0, negative="with a hat", start=0.5, size=(64, 64))
    more = "--seeds 1 --steps 3 --guidance 3 --negative 'with a hat' --start 0.5 --size 64"
    more += " --scales -2,1"

    def drawn(*scales):
        on = [(one, scale, start) for one, scale, start in zip(sliders, scales, (0.0, 0.5))]
        (picture,) = slider.generate(model, "a photo of a person", [1], on, **settings)
        return np.asarray(picture, int)

    same = lambda picture, expected: np.abs(np.asarray(picture) - expected).max() <= 2
    assert run(f"{DRAW} --slider {paths[0]}@0 {more} --out {tmp_path}/s").returncode == 0
    for scale in (-2, 1):
        file = tmp_path / "s" / f"seed1_scale{scale:+}.png"
        assert same(Image.open(file), drawn(scale)), file.name
    both, page = f"--slider {paths[0]}@0 --slider {paths[1]}", tmp_path / "plane.html"
    done = run(f"{DRAW} {both} --grid --html {page} {more} --out {tmp_path}/g")
    assert done.returncode == 0, done.stderr
    data = json.loads(re.search(r"^const data = (.*);  //", page.read_text(), re.M)[1])
    for i, across in enumerate((-2, 1)):
        for j, down in enumerate((-2, 1)):
            expected = drawn(across, down)
            file = tmp_path / "g" / f"seed1_scale{across:+}_{down:+}.png"
            assert same(Image.open(file), expected), file.name
            png = base64.b64decode(data["frames"][0][j][i]["src"].split(",")[1])
            assert same(Image.open(io.BytesIO(png)), expected), (across, down)
    guide = "--guide 'an old person' 'a young person' --preserve 'a man, a woman' --eta 3"
    assert run(f"{DRAW} {guide} {more} --out {tmp_path}/e").returncode == 0
    said = [f"{end} person, {p}" for end in ("an old", "a young") for p in ("a man", "a woman")]
    ends = model.condition(said, (64, 64))
    change = lambda x_t, t: train_text.ends_difference(model.unet, x_t, t, ends)
    for scale in (-2, 1):
        eq_8 = dict(delta=change, etas=[3.0 * scale])
        (expected,) = slider.sweep(model, "a photo of a person", [1], [[]], **eq_8, **settings)
        file = tmp_path / "e" / f"seed1_scale{scale:+}.png"
        assert same(Image.open(file), np.asarray(expected[0], int)), file.name


def test_a_real_picture_is_inverted_once_and_edited(trained, tmp_path):
    face = world.draw(world.sample(np.random.default_rng(1), kind="face"))
    face.resize((200, 160)).save(tmp_path / "me.png")
    out = tmp_path / "o"
    edit = f"{DRAW} --image {tmp_path}/me.png --slider {trained[0]} --scales 0,2 --steps 3"
    done = run(f"{edit} --out {out}")
    assert done.returncode == 0, done.stderr
    assert "200x160, brought to 128x128" in done.stdout
    assert "at most 39 network evaluations" in done.stdout
    (kept,) = out.glob("inversion-*.safetensors")
    pictures = {"me_scale0.png", "me_scale+2.png", "strip.png", "sweep.gif"}
    assert names_in(out) == pictures | {kept.name}
    first, age = (out / "me_scale+2.png").read_bytes(), kept.stat().st_mtime_ns
    done = run(f"{edit} --out {out}")
    assert done.returncode == 0 and "network evaluations" not in done.stdout
    assert kept.stat().st_mtime_ns == age
    assert (out / "me_scale+2.png").read_bytes() == first
    # Other settings, another inversion.
    done = run(f"{edit} --out {out} --guidance 3 --invert negative-prompt")
    assert done.returncode == 0 and len(list(out.glob("inversion-*"))) == 2
    assert "\nnegative-prompt inversion: 3 network" in done.stdout
    done = run(f"{edit} --strength 0.5 --seeds 1,2 --out {tmp_path}/s")
    assert done.returncode == 0 and (tmp_path / "s" / "seed2_scale+2.png").exists()
    assert not list((tmp_path / "s").glob("inversion-*"))


def test_pages_with_a_slider_and_with_a_plane(trained, tmp_path):
    path, page = trained[0], tmp_path / "p" / "one.html"
    options = f"--prompt 'a photo of a person' --slider {path} --steps 2 --out {tmp_path}/o"
    three = f"{options} --seeds 0,1 --scales -1,0,1 --html {page}"
    done = run(f"slider.py {three}")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.count("data:image/png") == 6 and "seed1" in text
    assert '"scales": [-1.0, 0.0, 1.0]' in text
    assert text.count('"say": ""') == 6  # no captions: it is of any model
    done = run(f"-m miniature.draw {three}")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.count("data:image/png") == 6
    assert text.count('"say": "') == 6 and '"say": ""' not in text
    plane = tmp_path / "p" / "two.html"
    two = f"--slider {path}@0.5 --grid --scales -1,1 --html {plane}"
    done = run(f"slider.py {options} --seeds 0,1 {two}")
    assert done.returncode == 0, done.stderr
    assert plane.read_text().count("data:image/png") == 8


def test_a_folder_of_sliders_each_and_at_random(trained, tmp_path):
    (tmp_path / "space").mkdir()
    for i in (1, 2):
        (tmp_path / "space" / f"{i}.safetensors").write_bytes(trained[0].read_bytes())
    draw = f"{DRAW} --slider {tmp_path}/space --scales -1,0,1 --seeds 0,1 --steps 2"
    done = run(f"{draw} --each --out {tmp_path}/e")
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path / "e") == {"each_seed0.png", "each_seed1.png"}
    page = tmp_path / "plane.html"
    done = run(f"{draw} --grid --html {page} --out {tmp_path}/g")  # a folder of two is two sliders
    assert done.returncode == 0 and (tmp_path / "g" / "grid_seed1.png").exists()
    assert page.read_text().count("data:image/png") == 18  # of two seeds a plane of 3 x 3
    assert page.read_text().count('"scales": [-1.0, 0.0, 1.0]') == 2
    done = run(f"{draw} --grid --slider {trained[0]} --out {tmp_path}/g")
    assert done.returncode == 2 and "--grid needs two sliders" in done.stderr
    done = run(f"{draw} --random 2 --out {tmp_path}/r")
    assert done.returncode == 0, done.stderr
    a, b = ((tmp_path / "r" / f"seed0_scalerandom{i}.png").read_bytes() for i in (1, 2))
    assert a != b


@pytest.mark.parametrize("drawn", ["little", pytest.param("all", marks=pytest.mark.slow)])
def test_pairs_train_and_preview(drawn, tmp_path, monkeypatch):
    if drawn == "little":
        monkeypatch.setattr(probe, "PREVIEW_SEEDS", [0])
    done = run(f"-m miniature.pairs --count 3 --values 0.6,1.1,1.6 --out {tmp_path}")
    assert done.returncode == 0, done.stderr
    folders = f"--neg {tmp_path}/0.6 --at 0.2 {tmp_path}/1.1 --pos {tmp_path}/1.6"
    small = f"--steps 4 --batch 4 --noises 2 --preview 4 --probe {int(drawn == 'all')}"
    done = run(f"train_pairs.py {folders} {small} --out {tmp_path}/eyes.safetensors")
    assert done.returncode == 0, done.stderr
    assert "3 groups of 3" in done.stdout and "teacher's change on unseen x_t" in done.stdout
    assert Image.open(tmp_path / "eyes.png").width > 3 * 128
    metadata = metadata_of(tmp_path / "eyes.safetensors")
    assert json.loads(metadata["settings"])["at"] == [["0.2", "1.1"]]
    assert metadata["kind"] == "visual slider" and str(tmp_path) not in json.dumps(metadata)
    done = run(f"train_pairs.py --like {tmp_path}/eyes.safetensors --out {tmp_path}/b.safetensors")
    assert done.returncode == 2 and "--neg of its own: name it here too" in done.stderr


def test_an_unknown_word_is_named(tmp_path):
    done = run(f"slider.py --prompt 'a photo of a zebra' --seeds 0 --steps 1 --out {tmp_path}")
    assert done.returncode == 0 and "'zebra'" in done.stderr and "photo" not in done.stderr


BAD = [
    (f"{TRAIN} --frobnicate", "--frobnicate"),
    (f"{TRAIN} --step 3", "unknown option --step: did you mean --steps?"),
    ("slider.py --promt a", "unknown option --promt: did you mean --prompt?"),
    (f"{TRAIN} --rank 0", "--rank"),
    (f"{TRAIN} --rank 5000", "rank: 5000"),
    (f"{TRAIN} --rank four", "--rank"),
    (f"{TRAIN} --model nowhere", "nowhere: no such model folder"),
    (f"{TRAIN} --model tests", "model_index.json"),
    (f"{TRAIN} --layers everything", "--layers"),
    (f"{TRAIN} --size 100", "size: 100x100 is not made of multiples of 32: 96x96 is"),
    (
        f"{TRAIN} --size 832x",
        "'832x' is no size: write one number for a square, as 1024, or width x",
    ),
    (f"{TRAIN} --size 1216x832x3", "'1216x832x3' is no size: write"),
    (f"{DRAW} --size 830x1216", "size: 830x1216 is not made of multiples of 32: 832x1216 is"),
    (f"{TRAIN} --out tests", "is a folder"),
    (f"{TRAIN} --out docs/age.png --overwrite", "is to be a .safetensors file"),
    ("train_text.py --pos 'a man, old' --neg 'a man, old'", "--pos and --neg are the same"),
    (f"{DRAW} --scales nan", "'nan' is not a list of numbers"),
    (f"{DRAW} --seeds 5-2", "'5-2' is not a list of whole numbers"),
    (f"{DRAW} --seeds -3", "'-3' is not a list of whole numbers"),
    (f"{TRAIN} --steps 0", "--steps"),
    (f"{TRAIN} --per-trajectory 30", "--per-trajectory 30"),
    ("train_text.py --pos '' --neg a", "--pos is empty"),
    ("train_text.py --pos 'an old man' --neg 'a young man'", "--prompt is needed"),
    ("train_text.py --pos 'an old man'", "--neg"),
    (f"{DRAW} --slider missing.safetensors", "missing.safetensors: no such file"),
    (f"{DRAW} --slider README.md", "README.md"),
    (f"{DRAW} --merge missing.safetensors", "missing.safetensors: no such file"),
    (f"{DRAW} --model README.md", "README.md: not a readable"),
    (f"{DRAW} --vae-tile 8", "--vae-tile"),
    (f"{DRAW} --size 130", "size: 130x130"),
    (f"{DRAW} --steps 0", "steps: 0"),
    (f"{DRAW} --scales a,b", "--scales"),
    (f"{DRAW} --scales 1.001,1.002 --slider a.safetensors", "--scales: two of them are +1 in"),
    (f"{DRAW} --scales -1e-1,1", "no slider to sweep"),
    (f"{DRAW} --seeds x", "--seeds"),
    (f"{DRAW} --out README.md", "README.md"),
    ("slider.py --prompt ' '", "--prompt is empty"),
    (f"{DRAW} --slider a.safetensors:1@2", "must be between 0 and 1, not 2"),
    (f"{DRAW} --grid --slider a.safetensors", "--grid needs two sliders"),
    (f"{DRAW} --guide old young --slider a.safetensors", "--guide"),
    (f"{DRAW} --batch 0", "--batch"),
    (f"{DRAW} --scales -1,1", "no slider to sweep"),
    (f"{DRAW} --eta 2", "belong to --guide"),
    (f"{DRAW} --strength 0.5", "--strength belongs to --image"),
    (f"{DRAW} --each --slider a.safetensors --html x.html", "--html shows"),
    (f"{DRAW} --each", "--each needs sliders"),
    (f"{DRAW} --html age.safetensors", "age.safetensors: is to be a .html file"),
    (f"{DRAW} --guidance nan", "'nan' is not"),
    (f"{DRAW} --guidance 0", "--guidance: at 0 the prompt would count for nothing"),
    (f"{DRAW} --start 3", "--start: 3 is not between 0 and 1"),
    (f"{TRAIN} --seed 10000000000000000", "is not a whole number from 0 to"),
    (f"{DRAW} --slider README.md:strong", "'strong' after the colon is no number"),
    (f"{DRAW} --merge README.md:nan", "'nan' after the colon is no number"),
    (f"{DRAW} --even", "--even needs sliders"),
    (f"{DRAW} --html x.html", "--html needs something to drag"),
    (f"{DRAW} --image a.png --strength 0.5 --invert ddim", "leave --invert out"),
    (f"{TRAIN} --trajectories 1001", "--trajectories can be at most 1000"),
    ("-m extras.tools merge README.md --out x.safetensors --dtype float32", "here, --store"),
    (f"{DRAW} --slider ''", "no file is named"),
    ("-m extras.live --slider a.safetensors --port 99999", "--port must be from 0 to 65535"),
    (f"{TRAIN} --guidance -5", "--guidance: at -5 the prompt"),
    (f"{TRAIN} --prompt ''", "--prompt is empty"),
    (f"{PAIRS} --pos tests/facts", "one folder is named twice"),
    ("-m miniature.pairs --values 5,9", "eye_size goes from 0.6 to 1.6"),
    (f"{DRAW} --random 2 --each --slider a.safetensors", "one of them at a time"),
    (f"{DRAW} --slider docs", "docs: holds no slider files"),
    (f"{DRAW} --image a.png --strength 2", "--strength must be above 0"),
    (f"{DRAW} --image missing.png", "missing.png: no such file"),
    (f"{DRAW} --image README.md", "README.md: not a readable picture"),
    (f"{DRAW} --size 0", "'0' is no size"),
    (f"{DRAW} --image docs/age.png --out docs", "--out docs: the picture itself is in there"),
    (
        "train_space.py --prompt 'a hand' --sliders 64",
        "--sliders 64 of --rank 1 are trained together",
    ),
    ("-m extras.tools info README.md", "README.md: not a readable"),
    ("-m extras.tools convert README.md", "--out is needed"),
    (f"{TRAIN} --preview -1", "--preview"),
    (PAIRS, "two folders at least"),
    ("train_pairs.py --neg nowhere --pos docs", "nowhere: no such folder"),
    (f"{PAIRS} --pos docs", "tests/facts: holds no pictures"),
    (f"{PAIRS} --at -1 docs", "two folders at least, each at a scale of its own"),
    (f"{PAIRS} --at x docs", "--at wants a number"),
    (f"{PAIRS} --at nan docs", "--at wants a number"),
    (f"{PAIRS} --at -1 docs --at x docs", "--at wants a number and a folder: 'x'"),
    (f"{PAIRS} --pos docs --noises 0", "--noises"),
]


@pytest.mark.parametrize("command, names", BAD)
def test_bad_input_is_one_clear_line(command, names):
    before = {f: f.stat().st_mtime_ns for f in ROOT.glob("*.*")}
    done = run(command)
    lines = done.stderr.splitlines()
    (line,) = [ln for ln in lines if not ln.startswith("warning: ") and "\r" not in ln]
    assert done.returncode == 2 and names in line and line.startswith("error"), line
    assert {f: f.stat().st_mtime_ns for f in ROOT.glob("*.*")} == before


OUT_OF_MEMORY = ["can't allocate memory: you tried 9 bytes", "out of memory", ""]
OUT_OF_MEMORY += ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]


@pytest.mark.parametrize("says", OUT_OF_MEMORY)
def test_too_little_memory_is_one_line_on_any_device(says, capsys):
    """PyTorch has a class of its own for it on CUDA alone."""

    def main():
        raise RuntimeError(f"some allocator: {says}") if says else MemoryError

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: not enough memory: a smaller --size or")
    with pytest.raises(RuntimeError, match="shape"):  # our own mistakes stay visible
        cli.run(lambda: torch.zeros(2).view(3))


# In a process of its own. The shortest in every run of the tests, all kinds in the slow ones.
OF_EACH_KIND = [
    (f"{TRAIN} --frobnicate", "--frobnicate"),
    pytest.param(f"{DRAW} --slider README.md", "README.md", marks=pytest.mark.slow),
    pytest.param(PAIRS, "two folders", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("command, names", OF_EACH_KIND)
def test_nor_is_there_a_traceback(command, names):
    done = run_apart(command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert names in done.stderr.strip().splitlines()[-1]


HELP = ["train_text.py", "train_pairs.py", "train_space.py", "slider.py", "-m extras.live"]


@pytest.mark.parametrize("script", HELP)
def test_help(script):
    done = run(f"{script} --help")
    assert done.returncode == 0 and "--model" in done.stdout
    assert "default" in done.stdout and "None)" not in done.stdout


@pytest.mark.parametrize("option", ["--raw-scale", pytest.param("", marks=pytest.mark.slow)])
def test_a_space_of_sliders(option, tmp_path):
    """Discovered, written with what they are, refused where they would replace others, goes on with
    --resume, and used as a folder."""
    space = tmp_path / "space"
    small = "--sliders 2 --samples 12 --train-samples 10 --per-sample 2 --denoising-steps 4"
    small = f"{small} --steps 2 --batch 2 {option}"
    train = f"train_space.py --prompt 'a photo of a person' {small} --out {space}"
    done = run(train)
    assert done.returncode == 0, done.stderr
    files = {"1.safetensors", "2.safetensors", "space.json", "sheet.png", "samples"}
    assert names_in(space) == files
    metadata = metadata_of(space / "1.safetensors")
    assert metadata["kind"] == "space slider" and len(json.loads(metadata["v"])) == 128
    assert "words" in metadata
    again = run(train)
    assert again.returncode == 2
    assert "space.json: is there already: --overwrite replaces it" in again.stderr
    mine = tmp_path / "of_mine"
    mine.mkdir()
    (mine / "2.safetensors").write_bytes(b"mine")
    other = run(f"{train} --out {mine}")
    assert other.returncode == 2 and "2.safetensors: is there already" in other.stderr
    assert (mine / "2.safetensors").read_bytes() == b"mine"
    other = run(f"{train} --overwrite --seed 1")
    assert other.returncode == 2 and "samples: was begun with --seed 0, not 1" in other.stderr
    other = run(f"{train} --overwrite --prompt 'a hand'")
    assert other.returncode == 2 and "samples: was begun with --prompt" in other.stderr
    alone = run(f"{train} --overwrite --sliders 1")  # the samples are used again
    assert alone.returncode == 0 and names_in(space) == files - {"2.safetensors"}
    few = "--scales -1,1 --seeds 0 --steps 3"
    drawn = run(f"{DRAW} --slider {space} --each {few} --out {tmp_path}/drawn")
    assert drawn.returncode == 0 and (tmp_path / "drawn" / "each_seed0.png").exists(), drawn.stderr
