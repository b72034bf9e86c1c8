"""Pictures that are no squares: what --size names, and what diffusers draws at it."""

import json

import numpy as np
import pytest
import torch
from commands import DRAW, TRAIN, run
from PIL import Image
from safetensors import safe_open

import sampler
from sdxl import MINIATURE
from support import sizes, training


def test_names_and_sizes():
    assert sizes.height_width("832x1216") == (1216, 832) and sizes.height_width(512) == (512, 512)
    assert sizes.name(1216, 832) == "832x1216" and sizes.name(512, 512) == "512"
    for h, w in ((640, 512), (512, 512), (64, 2048)):
        assert sizes.height_width(sizes.name(h, w)) == (h, w)
    with pytest.warns(UserWarning, match="--size 832: a square .* 832x1216 is one of SDXL's sizes"):
        assert sizes.size("832") == "832"


@pytest.mark.parametrize(
    "ratio, side, expected",
    [
        (1.0, 1024, (1024, 1024)),
        (2 / 3, 1024, (1216, 832)),  # a portrait of 35 mm film
        (4 / 3, 1024, (896, 1152)),
        (16 / 9, 1024, (768, 1344)),
        (100.0, 1024, (512, 2048)),
        (2 / 3, 512, (608, 416)),  # half of it, in multiples of 32
    ],
)
def test_the_nearest_training_size(ratio, side, expected):
    h, w = sizes.nearest(ratio, side, 32)
    assert (h, w) == expected and h % 32 == w % 32 == 0


def test_every_training_size_has_about_a_megapixel():
    for long, short in sizes.SIDES:
        assert long % 64 == short % 64 == 0 and 0.9 < long * short / 1024**2 <= 1.04


@pytest.mark.parametrize("height, width", [(64, 128), (128, 64)])
@torch.no_grad()
def test_oblong_pictures_are_diffusers(model, height, width):
    """Twelve steps with guidance: the time ids are told height first."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(MINIATURE)
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    size, prompt = (height, width), "a photo of a woman with red hair"
    cond, uncond = model.condition([prompt], size), model.condition([""], size)
    x_T = sampler.noise([5], model.latent_shape(size))
    settings = dict(alpha_bar=model.alpha_bar, steps=12, guidance=4.0)
    ours = sampler.sample(model.unet, x_T, cond, uncond, **settings)
    settings = dict(height=height, width=width, num_inference_steps=12, guidance_scale=4.0)
    theirs = pipeline(prompt, latents=x_T.clone(), output_type="latent", **settings).images
    assert ours.shape[-2:] == (height // 8, width // 8)
    assert (ours - theirs).norm() / theirs.norm() < 1e-3


def test_an_oblong_slider_is_trained_and_drawn(tmp_path):
    small = "--trajectories 1 --per-trajectory 2 --denoising-steps 3 --steps 2 --batch 2 --probe 1"
    path = tmp_path / "smile.safetensors"
    done = run(f"{TRAIN} --size 64x96 {small} --out {path}")
    assert done.returncode == 0, done.stderr
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert json.loads(about["settings"])["size"] == "64x96"
    assert about["modelspec.resolution"] == "64x96"
    more = f"--slider {path} --scales 0,1 --steps 2 --seeds 0"
    done = run(f"{DRAW} {more} --size 64x96 --out {tmp_path / 'drawn'}")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "drawn" / "seed0_scale0.png").size == (64, 96)


def test_pairs_come_to_the_nearest_training_size(tmp_path, capsys, monkeypatch, model):
    """One size for all pairs, by their middle proportions; of a model that knows oblong ones."""
    groups = []
    for i, (w, h) in enumerate([(200, 300), (200, 300), (400, 400)]):
        files = [tmp_path / f"{end}{i}.png" for end in ("neg", "pos")]
        for file in files:
            Image.fromarray(np.zeros((h, w, 3), np.uint8)).save(file)
        groups.append(files)
    assert training.size_of_pairs(model, groups) == "128"  # it was trained on squares
    assert "brought to 128x128 (width x height), for which 2 of 3 groups" in capsys.readouterr().out
    monkeypatch.setattr(training, "is_small", lambda unet: False)
    monkeypatch.setattr(model, "size", 512)
    assert training.size_of_pairs(model, groups) == "416x608"
    printed = capsys.readouterr().out
    assert "brought to 416x608 (width x height), for which 3 of 3 groups are cropped" in printed
    Image.fromarray(np.zeros((310, 200, 3), np.uint8)).save(groups[0][1])
    with pytest.raises(ValueError, match="pos0.png: is 200x310"):
        training.size_of_pairs(model, groups)
