"""The style-based generator: its parts against their equations, its pictures by the measuring
stick, the walk through its channels."""

import contextlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments.stylegan import pairs, train
from experiments.stylegan.channels import FOUND, Faces, moves, summary
from experiments.stylegan.generator import CHANNELS, Generator, Linear, ModulatedConv, W, Z, doubled
from miniature import effect
from support import images


@pytest.mark.parametrize("demodulate", [True, False])
def test_scaling_channels_is_modulating_and_demodulating_weights(demodulate):
    """StyleGAN2, eqs. (1) and (3), as they are written: a convolution of its own for each
    sample."""
    torch.manual_seed(0)
    conv = ModulatedConv(6, 5, 3, demodulate).double()
    x, s = torch.randn(3, 6, 7, 7, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    y = conv(x, s.float().double())
    for b in range(3):
        w = s[b].float().double()[None, :, None, None] * conv.weight * conv.gain
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        assert torch.allclose(y[b : b + 1], F.conv2d(x[b : b + 1], w, padding=1), atol=1e-5)


def test_doubling_is_inserting_zeros_and_filtering():
    x = torch.randn(1, 2, 6, 6)
    k = torch.tensor([1.0, 3, 3, 1]) / 4
    apart = torch.zeros(1, 2, 12, 12)
    apart[..., ::2, ::2] = x
    filtered = F.conv2d(F.pad(apart, (2, 1, 2, 1)), (k[:, None] * k).expand(2, 1, 4, 4), groups=2)
    assert torch.allclose(doubled(x)[..., 2:-2, 2:-2], filtered[..., 2:-2, 2:-2], atol=1e-5)


def test_equalised_learning_rate_and_sizes():
    torch.manual_seed(0)
    assert Linear(400, 500)(torch.randn(64, 400)).std().item() == pytest.approx(1, rel=0.05)
    G = Generator()
    w = G.w(torch.randn(5, Z) * 7)
    assert w.shape == (5, W)
    assert G.w(torch.randn(5, Z), truncation=0.0).sub(G.w_mean).abs().max() == 0
    # z is brought to unit length.
    assert torch.allclose(G.w(torch.ones(1, Z)), G.w(3 * torch.ones(1, Z)), atol=1e-4)
    picture = G.synthesis(G.styles(w), G.noise(5))
    assert picture.shape == (5, 3, max(CHANNELS), max(CHANNELS))


def test_its_faces_are_faces():
    drawn = train.drawn(train.load(), 64, seed=5)
    read = effect.attributes(drawn)
    assert read["face"].mean() > 0.95
    assert all(read[name].std() > 0.1 for name in ("skin", "hat", "glasses", "hair_length"))


def test_a_channel_moves_what_it_is_said_to_move():
    """The best one of the committed list, on faces that chose neither it nor its figure."""
    found = json.loads(FOUND.read_text())
    best = found["best"][0]
    faces = Faces(train.load(), 16, seed=77)
    here = summary(moves(faces, best["layer"], best["channel"], found["by"]))
    assert here["attribute"] == best["attribute"]
    assert here["moved"] == pytest.approx(best["moved"], abs=0.15)


def test_pairs_are_the_generators_faces_drawn_again(model, tmp_path, monkeypatch):
    """A fifth of the way: each picture is nearest to the face that it was drawn from."""
    monkeypatch.setattr(pairs, "CANDIDATES", 3)
    monkeypatch.setattr(pairs, "STRENGTH", 0.2)
    apart = {"shirt red": 0.0}, {"shirt red": 255.0}  # as if the channel moved this alone
    ends = iter(apart)
    of = lambda values, drawn: {name: np.full(len(drawn), x) for name, x in values.items()}
    monkeypatch.setattr(pairs, "read", lambda drawn: of(next(ends), drawn))
    channel = pairs.Channel(0, 0, "shirt red", by=0.0)
    pairs.draw_pairs(model, channel, 3, tmp_path, seed=1)
    array = lambda picture: np.asarray(picture, dtype=float)
    faces = [array(face) for face in channel.drawn(Faces(train.load(), 3, seed=120), 0.0)]
    for end in ("neg", "pos"):
        for i in range(3):
            again = array(images.read_image(tmp_path / end / f"{i:03}.png"))
            assert np.argmin([np.abs(again - face).mean() for face in faces]) == i


def test_training_goes_on_where_it_was(tmp_path, monkeypatch):
    """Stopped in its second step of four, and started again: the same bytes as without a break."""
    real_faces, real_loss, calls = train.faces, train.loss_of, []
    monkeypatch.setattr(train, "faces", lambda count, seed: real_faces(min(count, 16), seed))
    monkeypatch.setattr(train, "drawn", lambda *_: [])
    monkeypatch.setattr(train.images, "contact_sheet", lambda *_: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(train.metrics, "fid", lambda *_: 0.0)

    @contextlib.contextmanager
    def deferred_interrupt():
        yield lambda: len(calls) == 6  # four steps of the whole training, and two

    def loss(*args):
        calls.append(1)
        return real_loss(*args)

    monkeypatch.setattr(train, "deferred_interrupt", deferred_interrupt)
    monkeypatch.setattr(train, "loss_of", loss)
    results = []
    for name in ("whole", "part"):
        small = "train --faces 16 --batch 4 --steps 4"
        command = f"{small} --work {tmp_path}/{name} --out {tmp_path}/{name}.safetensors"
        monkeypatch.setattr(sys, "argv", command.split())
        if name == "part":
            with pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
                train.main()
        train.main()
        results.append(train.load(tmp_path / f"{name}.safetensors").state_dict())
    assert len(calls) == 8
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results)))
