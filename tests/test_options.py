"""What options do to that which is trained: seen where the training begins."""

import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import TRAIN

import slider
import train_pairs
import train_text
from miniature import pairs, world
from sdxl import SDXL
from support import images, training

TEXT = f"{TRAIN} --size 64 --trajectories 1 --per-trajectory 1 --denoising-steps 2"
PAIRS = "train_pairs.py --neg {0}/neg --pos {0}/pos --prompt 'a photo of a person' --noises 2"


class Begun(Exception):
    pass


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """A function (script, command) -> the slider and the targets with which its training begins,
    and the sizes that its prompts were told."""
    found, told, condition = {}, set(), SDXL.condition

    def fit(args, model, slider, train, held_out, *_):
        slider.detach()
        found.update(slider=slider, train=train, held_out=held_out)
        raise Begun

    def remember(self, prompts, size=None):
        told.add(size)
        return condition(self, prompts, size)

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(SDXL, "condition", remember)

    def run(script, command):
        out = ["--out", str(tmp_path / "s.safetensors"), "--device", "cpu", "--overwrite"]
        monkeypatch.setattr(sys, "argv", [*shlex.split(command), *out])
        with pytest.raises(Begun):
            script.main()
        return SimpleNamespace(**found, told=told)

    return run


@pytest.fixture
def eight_pairs(tmp_path):
    for i, group in enumerate(pairs.draw("eye_size", (0.7, 1.5), 8)):
        for end, picture in zip(("neg", "pos"), group):
            images.save_image(picture, tmp_path / end / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("option, ends", [("", {1.0, -1.0}), ("--positive-only", {1.0})])
def test_both_ends_or_one(begin, option, ends):
    begun = begin(train_text, f"{TEXT} {option}")
    assert set(begun.train.scale.tolist()) == ends
    assert begun.told == {(64, 64)}  # every prompt: the size is a part of SDXL's conditioning


def test_layers_and_alpha(begin):
    slider = begin(train_text, f"{TEXT} --layers attn --no-conv --alpha 2 --rank 3").slider
    names = [name for name, _ in slider.named_children()]
    assert any("attn1" in name for name in names) and any("attn2" in name for name in names)
    assert all("attn1" in name or "attn2" in name for name in names)
    assert {part.alpha for part in slider.children()} == {2.0}
    assert {part.lora_down.weight.shape[0] for part in slider.children()} == {3}
    slider = begin(train_text, f"{TEXT} --no-conv").slider
    assert {part.lora_down.weight.ndim for part in slider.children()} == {2}


def test_the_meter_has_pairs_of_its_own(model, begin, eight_pairs):
    """Of eight pairs one is the meter's alone, with other noises."""
    begun = begin(train_pairs, f"{PAIRS.format(eight_pairs)} --size 64 --target noise")
    train, held_out = begun.train, begun.held_out
    assert len(train) == 7 * 2 * 2 and len(held_out) == 16 * 2
    assert begun.told == {(64, 64)}
    latents = []  # of the first two pairs: (4, 64 * 4)
    for i in (0, 1):
        files = [eight_pairs / end / f"{i}.png" for end in ("neg", "pos")]
        latents.append(model.encode(images.read_group(files, (64, 64))).flatten(1))
    # With --target noise the noise is at hand, and so is what was noised.
    low = train.t < 600  # there rounding does not blur it
    a = model.alpha_bar[train.t].view(-1, 1, 1, 1)
    x_0 = ((train.x_t - (1 - a).sqrt() * train.target) / a.sqrt())[low].flatten(1)
    assert torch.cdist(latents[0], x_0).min() > 0.5 and torch.cdist(latents[1], x_0).min() < 0.01
    a = model.alpha_bar[held_out.t][:, None]
    z = latents[0].repeat(16, 1)
    eps = (held_out.x_t.flatten(1) - a.sqrt() * z) / (1 - a).sqrt()
    assert 0.8 < eps.std() < 1.2 and torch.cdist(eps, train.target.flatten(1)).min() > 1
    shared = begin(train_pairs, f"{PAIRS.format(eight_pairs)} --size 64").train
    assert torch.equal(shared.x_t, train.x_t)
    assert (shared.target - train.target).abs().max() > 0.1


@pytest.mark.parametrize("option, eta", [("", 0.6), ("--recipe published", 4.0), ("--eta 2", 2.0)])
@torch.no_grad()
def test_pos_is_the_positive_end_and_what_is_named_is_preserved(model, begin, option, eta):
    """The command's targets against eq. (8), one prompt at a time."""
    train = begin(train_text, f"{TEXT} --preserve 'man, woman' {option}").train
    person = "a photo of a person"

    def eps(end):
        both = [model.condition([f"{person}, {end}, {p}"], (64, 64)) for p in ("man", "woman")]
        return sum(model.unet(train.x_t[:1], train.t[:1], *cond)[0] for cond in both) / 2

    change = eta * (eps("smiling") - eps("frowning"))
    assert train.scale.tolist() == [1, -1]
    for scale, delta in zip((1, -1), train.delta):
        assert (delta - scale * change).norm() < 1e-2 * change.norm()


ENDS = [("--neg {0}/neg --pos {0}/pos", -1, 1), ("--at 2 {0}/neg --pos {0}/pos", 2, 1)]


@pytest.mark.parametrize("folders, neg, pos", ENDS)
def test_a_folder_s_pictures_are_at_its_scale(model, begin, eight_pairs, folders, neg, pos):
    """With --target noise the noise is at hand, and so is what was noised."""
    command = f"train_pairs.py {folders.format(eight_pairs)} --noises 2 --size 64 --target noise"
    train = begin(train_pairs, command).train
    train = train[train.t < 600]  # there rounding does not blur it
    a = model.alpha_bar[train.t].view(-1, 1, 1, 1)
    x_0 = ((train.x_t - (1 - a).sqrt() * train.target) / a.sqrt()).flatten(1)
    assert set(train.scale.tolist()) == {neg, pos}
    for folder, scale in (("neg", neg), ("pos", pos)):
        files = [eight_pairs / folder / f"{i}.png" for i in range(8)]
        latents = model.encode(images.read_group(files, (64, 64))).flatten(1)
        distance = torch.cdist(x_0, latents).min(1).values
        here = train.scale == scale
        assert distance[here].max() < 0.01 < 0.1 < distance[~here].min(), folder


def test_a_negative_prompt_stands_in_for_the_empty_one(model):
    draw = lambda **settings: np.asarray(
        slider.generate(model, "a photo of a person", [0], steps=4, size=(64, 64), **settings)[0]
    )
    plain, with_it = draw(), draw(negative="smiling")
    by_hand = draw(uncond=model.condition(["smiling"], (64, 64)))
    assert not (plain == with_it).all() and (with_it == by_hand).all()


def test_a_picture_comes_back_from_the_vae(model):
    face = world.draw(world.sample(np.random.default_rng(1), kind="face"))
    (back,) = model.decode(model.encode([face]))
    off = lambda a: np.abs(np.asarray(back, float) - np.asarray(a)).mean()
    assert off(face) < 8 < off(face.transpose(5))
