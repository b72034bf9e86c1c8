"""The miniature's own training: killed after any checkpoint, it goes on to the same bits."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import slider
from formats import slider_files
from miniature import train, world
from sdxl import SDXL


@pytest.mark.slow
def test_a_killed_vae_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PICTURES", 24)
    narrow = train.VAE_CONFIG | {"block_out_channels": [16, 16, 16, 16]}
    monkeypatch.setattr(train, "VAE_CONFIG", narrow)
    results = []
    for killed in (False, True):
        monkeypatch.setattr(train, "WORK", tmp_path / str(killed))
        monkeypatch.setattr(train, "MODEL", tmp_path / str(killed) / "model")
        train.WORK.mkdir()
        pictures, _ = train.make_data()
        if killed:

            def save_and_die(self, step, save=train.Checkpoint.save):
                save(self, step)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train.Checkpoint, "save", save_and_die)
                train.train_vae(pictures, "cpu", first=3, crop=2, second=2, save_every=2)
            assert not (train.MODEL / "vae").exists()
        train.train_vae(pictures, "cpu", first=3, crop=2, second=2, save_every=2)
        results.append(load_file(train.MODEL / "vae" / "diffusion_pytorch_model.safetensors"))
    assert results[0] and all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_the_files_of_a_stage_are_whole_or_not_there(tmp_path, monkeypatch):
    """A stage is done where its file is: so one that is killed while it writes leaves none."""

    def killed(tensors, path, metadata=None):
        path.write_bytes(b"cut short")
        raise KeyboardInterrupt

    monkeypatch.setattr(slider_files, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        train.save_half({"a": torch.ones(2)}, tmp_path / "vae" / "model.safetensors")
    assert not list((tmp_path / "vae").iterdir())


def test_muon_moves_along_the_nearest_orthogonal_matrix():
    """With one gradient and no history the step is U V^T of the gradient's SVD, to Newton-Schulz's
    tolerance."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(24, 40))
    p.grad = torch.randn(24, 40)
    train.Muon([p], lr=1.0).step()
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    step, nearest = -p.detach().flatten(), (u @ v).flatten()
    assert torch.nn.functional.cosine_similarity(step, nearest, dim=0) > 0.97
    singular = torch.linalg.svdvals(p.detach())
    assert 0.6 < singular.min() and singular.max() < 1.3


@pytest.mark.slow
def test_all_stages_from_nothing_make_a_folder_that_draws(tmp_path, monkeypatch):
    """A few steps of each: what is checked is that they fit together, not what is learned."""
    monkeypatch.setattr(train, "PICTURES", 128)
    monkeypatch.setattr(train, "WORK", tmp_path)
    monkeypatch.setattr(train, "MODEL", tmp_path / "model")
    pictures, attributes = train.make_data()
    train.train_vae(pictures, "cpu", first=2, crop=1, second=1)
    latents = train.make_latents(pictures, "cpu")
    train.train_judge(pictures, attributes, latents, "cpu", steps=2, round_trips=32)
    train.train_clip(pictures, attributes, "cpu", steps=2, batch=16)
    train.train_unet(attributes, latents, "cpu", steps=2, batch=4)
    model = SDXL.load(train.MODEL, device="cpu")
    (picture,) = slider.generate(model, "a photo of a person with glasses", [0], steps=2)
    assert picture.size == (128, 128) and latents.shape == (128, 4, 16, 16)
    assert 0.9 < latents.float().std() < 1.1  # the scaling factor is the latents' own
    trained = (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    train.train_unet(attributes, latents, "cpu", steps=2, batch=4)  # done: nothing to do
    assert (tmp_path / "unet.pt").exists()
    assert (train.MODEL / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == trained


def test_a_wrong_caption_is_wrong_in_one_thing():
    """All clauses of the first two but one are the true caption's. The last says something else,
    one clause of which, as a rule, no caption of the picture says."""
    differ, asked, untrue, said_too = 0, 0, 0, 0
    praise = sorted(world.BAD_FACE + world.GOOD_FACE + world.BAD_HAND + world.GOOD_HAND, key=len)
    one = re.compile("|".join(map(re.escape, praise[::-1])))  # with commas in it, but one clause
    split = re.compile(r", | (?=with |without |wearing |on a )")
    clauses = lambda caption: set(split.split(one.sub("quality", caption)))
    for i in range(200):
        rng = np.random.default_rng(i)
        true, *wrong = train.true_and_wrong(world.sample(rng), rng)
        assert len(wrong) == 3
        *like_it, other = wrong
        for caption in like_it:
            asked += 1
            differ += caption != true
            # A clause becomes another, is added or dropped; long red hair is one clause of two.
            assert len(clauses(caption) - clauses(true)) <= 1, (true, caption)
            assert len(clauses(true) - clauses(caption)) <= 1, (true, caption)
    assert differ / asked > 0.8
    for i in range(40):
        rng = np.random.default_rng(i)
        a = world.sample(rng)
        true, *_, other = train.true_and_wrong(a, rng)
        captions = (world.caption(a, rng, 0.6) for _ in range(1500))
        can_say = set().union(*map(split.split, captions))
        untrue += bool(set(split.split(other)) - can_say)
        said_too += len(clauses(other) & clauses(true)) == len(clauses(true))
    assert untrue > 32 and said_too < 20  # of 40
