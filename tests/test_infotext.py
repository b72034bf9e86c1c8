"""What pictures say of how they were made, read back by the field's own readers."""

import shlex

import numpy as np
import pytest
from commands import run
from PIL import Image
from test_lora import trained_slider

import lora
from support import infotext

PROMPT, NEGATIVE = 'a photo of a man, smiling: "happy"', "with a hat, naïve"


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """Two sliders' strip, and the same without metadata."""
    folder = tmp_path_factory.mktemp("parameters")
    for seed, name in enumerate(("age", "old hat")):
        lora.save(folder / f"{name}.safetensors", trained_slider(model.unet, seed), {})
    files = [f"{folder}/age.safetensors:1.5@0.5", f"{folder}/old hat.safetensors"]
    words = ["slider.py", "--prompt", PROMPT, "--negative", NEGATIVE, "--scales", "0,-2"]
    words += [word for file in files for word in ("--slider", file)]
    words += "--seeds 3,4 --steps 2 --guidance 4.5 --size 96x64 --out".split()
    for out, more in (("with", []), ("without", ["--no-metadata"])):
        done = run(shlex.join([*words, str(folder / out), *more]))
        assert done.returncode == 0, done.stderr
    return folder


def test_the_text_is_a1111s(drawn):
    text = Image.open(drawn / "with" / "seed4_scale-2.png").text["parameters"]
    assert text.splitlines() == [
        PROMPT,
        f"Negative prompt: {NEGATIVE}",
        "Steps: 2, Sampler: DDIM, CFG scale: 4.5, Seed: 4, Size: 96x64, Model: miniature, "
        "Sliders: age 1.5 from 0.5 on; old hat -2 from 0.3 on",
    ]
    text = Image.open(drawn / "with" / "seed3_scale0.png").text["parameters"]
    assert text.endswith("Sliders: age 1.5 from 0.5 on")
    text = Image.open(drawn / "with" / "strip.png").text["parameters"]
    assert 'Seeds: "3, 4", Sliders: age; old hat, Scales: "0, -2"' in text


def test_no_path_is_in_it_and_pixels_are_the_same_without(drawn):
    for path in sorted((drawn / "with").glob("*.png")):
        with Image.open(path) as said, Image.open(drawn / "without" / path.name) as silent:
            assert str(drawn) not in said.text["parameters"]
            assert "/" not in said.text["parameters"].splitlines()[-1]
            assert "parameters" not in silent.info
            assert np.array_equal(np.asarray(said), np.asarray(silent))


def test_sd_parsers_reads_it(drawn):
    """sd-parsers 0.6."""
    sd_parsers = pytest.importorskip("sd_parsers")
    found = sd_parsers.ParserManager().parse(drawn / "with" / "seed4_scale-2.png")
    assert found.generator.name == "AUTOMATIC1111"
    assert [prompt.value for prompt in found.prompts] == [PROMPT]
    assert [prompt.value for prompt in found.negative_prompts] == [NEGATIVE]
    (sampler,) = found.samplers
    assert sampler.name == "DDIM" and sampler.model.name == "miniature"
    assert sampler.parameters == {"cfg_scale": "4.5", "seed": "4", "steps": "2"}
    assert found.metadata["Size"] == "96x64" and found.metadata["Sliders"].startswith("age 1.5")


def test_sd_prompt_reader_reads_it(drawn):
    """sd-prompt-reader 1.3.5, which wants an older Pillow than this project's: in an environment
    of its own, or skipped."""
    reader = pytest.importorskip("sd_prompt_reader.image_data_reader")
    with open(drawn / "with" / "seed4_scale-2.png", "rb") as file:
        found = reader.ImageDataReader(file)
    assert found.tool == "A1111 webUI"
    assert found.positive.strip() == PROMPT and found.negative.strip() == NEGATIVE
    assert found.parameter["seed"] == "4" and found.parameter["size"] == "96x64"


def test_an_inverted_picture_has_no_seed(drawn, tmp_path):
    image = drawn / "with" / "seed3_scale0.png"
    for options, seed in (("--invert ddim", None), ("--strength 0.5", "0")):
        command = f"slider.py --prompt 'a man' --image {image} --size 64 --steps 2 {options}"
        done = run(f"{command} --out {tmp_path}/{len(options)}")
        assert done.returncode == 0, done.stderr
        for path in (tmp_path / str(len(options))).glob("*.png"):
            assert ("Seed" in Image.open(path).text["parameters"]) == (seed is not None)


def test_eq_8_is_told_with_its_strength(tmp_path):
    words = "slider.py --prompt 'a man' --guide old young --preserve 'with a hat, without a hat'"
    done = run(f"{words} --eta 2 --scales 0,1.5 --seeds 0 --steps 2 --out {tmp_path}")
    assert done.returncode == 0, done.stderr
    text = lambda name: Image.open(tmp_path / name).text["parameters"]
    told = 'Eq. (8): + old - young, Preserved: "with a hat, without a hat"'
    assert told in text("seed0_scale+1.5.png") and "Eta: 3" in text("seed0_scale+1.5.png")
    assert "Eta: 0" in text("seed0_scale0.png")


def test_fields_that_hold_what_divides_fields_are_quoted():
    assert infotext.quoted("a, b") == '"a, b"' and infotext.quoted([3, 1]) == '"3, 1"'
    assert infotext.quoted('say "x"') == '"say \\"x\\""' and infotext.quoted(2.5) == "2.5"
    assert infotext.quoted("plain words") == "plain words"
