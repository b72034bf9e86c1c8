"""Trainings that are stopped: what is kept, what is refused, and the same bytes in the end."""

import os
import random
import signal
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import formats
import lora
import student
import train_pairs
import train_text
from bench.kill import TEXT, survives
from formats import slider_files
from support import batches, distributed, training
from support.checkpoint import NO_CHECKPOINT, Checkpoint, open_checkpoint, save_state


def collect(model, checkpoint=NO_CHECKPOINT, **changes):
    target, size = "a photo of a person", (64, 64)
    ends = (f"{target}, smiling", f"{target}, frowning")
    prompts = train_text.encode(model, [target], *ends, [], size)
    settings = dict(eta=1.0, trajectories=5, per_trajectory=2, denoising_steps=4)
    settings |= dict(size=size, seed=5, batch=2)
    return train_text.collect(model, prompts, remember=checkpoint.remember, **(settings | changes))


def fit(model, targets, checkpoint=NO_CHECKPOINT, **changes):
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet, "xattn")).attach(model.unet)
    settings = dict(steps=9, batch=2, lr=1e-3, meter_every=2, checkpoint=checkpoint) | changes
    held_out, targets = targets[torch.arange(2)], targets[torch.arange(7)]  # 9 steps: 3 epochs
    try:
        reading = training.fit_targets(model.unet, slider, targets, held_out, **settings)
    finally:
        slider.detach()
    return [p.detach().clone() for p in slider.parameters()], reading


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def targets(model):
    return collect(model)


@pytest.fixture(scope="module")
def whole(model, targets):
    """The slider and the reading of a training without a break."""
    return fit(model, targets)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("at", [pytest.param(1, marks=SLOW), 2, 5, pytest.param(8, marks=SLOW)])
def test_a_training_that_broke_off_ends_with_the_same_bytes(
    model, targets, whole, tmp_path, monkeypatch, at
):
    real, calls = student.predict, []

    def breaks(unet, slider, batch):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > at:
            raise Stop
        return real(unet, slider, batch)

    checkpoint = Checkpoint(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(student, "predict", breaks)
        with pytest.raises(Stop):
            fit(model, targets, checkpoint)
    again, reading = fit(model, targets, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], again)) and reading == whole[1]


def test_collecting_goes_on_where_it_was(model, targets, tmp_path, monkeypatch):
    real, calls = train_text.ends_difference, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return real(*args)

    checkpoint = Checkpoint(tmp_path)
    monkeypatch.setattr(train_text, "ends_difference", breaks)
    with pytest.raises(Stop):
        collect(model, checkpoint)
    monkeypatch.setattr(train_text.sampler, "sample", lambda *_, **__: pytest.fail("walked again"))
    again = collect(model, checkpoint)
    assert len(calls) == 3 + 8  # ten batches of one x_t; two were there
    for name in ("x_t", "t", "eps_0", "target"):
        assert torch.equal(getattr(targets, name), getattr(again, name)), name


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_what_the_meter_sees_is_not_what_a_folder_keeps_of_the_training(model, kind, tmp_path):
    """Both teachers' parts lie in one folder: with it they return what they do without."""
    target, size = "a photo of a person", (64, 64)
    if kind == "text":
        prompts = train_text.encode(model, [target], f"{target}, old", f"{target}, young", [], size)
        few = dict(eta=1.0, trajectories=4, per_trajectory=1, denoising_steps=2, size=size)
        teach = lambda **kept: train_text.teach(model, prompts, seed=0, batch=1, **few, **kept)
    else:
        latents, at = torch.randn(2, 1, 2, 4, 8, 8), torch.tensor([-1.0, 1.0])
        settings = dict(noises=2, batch=2)
        settings |= dict(cond=model.condition([target], size))
        teach = lambda **kept: [
            train_pairs.collect(model, latents[seed], at, seed=seed, **settings, **kept)
            for seed in (0, 1)
        ]
    kept, alone = teach(remember=Checkpoint(tmp_path).remember), teach()
    for here, there in zip(kept, alone):
        for name in ("x_t", "eps_0", "target"):
            assert torch.equal(getattr(here, name), getattr(there, name)), name


def test_ctrl_c_ends_the_step_keeps_it_and_says_how_to_go_on(
    model, targets, whole, tmp_path, monkeypatch
):
    real, calls = student.predict, []

    def interrupts(unet, slider, batch):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(unet, slider, batch)

    checkpoint = Checkpoint(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(student, "predict", interrupts)
        stopped = "stopped after step 4; the same command with --resume"
        with pytest.raises(KeyboardInterrupt, match=stopped):
            fit(model, targets, checkpoint, meter_every=100)
    assert checkpoint.load()["step"] == 4
    again, _ = fit(model, targets, checkpoint, meter_every=100)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], again))


@pytest.mark.slow
def test_divergence_keeps_the_last_good_state(model, targets, tmp_path, monkeypatch):
    real, calls = student.predict, []

    def explodes(unet, slider, batch):
        calls.append(torch.is_grad_enabled())
        return real(unet, slider, batch) * (float("nan") if sum(calls) == 5 else 1)

    checkpoint = Checkpoint(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(student, "predict", explodes)
        line = "diverged at step 5 .*lower --lr.*--resume with it goes on from step 4"
        with pytest.raises(FloatingPointError, match=line):
            fit(model, targets, checkpoint)
    state = checkpoint.load()
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["parameters"])
    slider, _ = fit(model, targets, checkpoint, lr=1e-4)  # goes on with another rate
    assert all(p.isfinite().all() for p in slider)


def args(tmp_path, **changes):
    flags = dict(resume=False, overwrite=False, dry_run=False)
    settings = dict(out=str(tmp_path / "s.safetensors"), pos="a", steps=None, lr=None)
    return Namespace(**(flags | settings | dict(merge=[("x", 1.0)]) | changes))


def test_nothing_is_overwritten_unless_asked(tmp_path, monkeypatch):
    out = tmp_path / "s.safetensors"
    # Stopped before anything was kept: from the beginning.
    assert open_checkpoint(args(tmp_path, resume=True), out).load() is None
    checkpoint = open_checkpoint(args(tmp_path), out)
    checkpoint.save({"step": 3})
    with pytest.raises(ValueError, match="--resume goes on from it, --overwrite starts anew"):
        open_checkpoint(args(tmp_path), out)
    with pytest.raises(ValueError, match="was begun with --pos a, not b"):
        open_checkpoint(args(tmp_path, resume=True, pos="b"), out)
    with monkeypatch.context() as m:
        m.setattr(distributed, "world_size", lambda: 2)
        with pytest.raises(ValueError, match="was begun with --nproc-per-node 1, not 2"):
            open_checkpoint(args(tmp_path, resume=True), out)
    other_lr = open_checkpoint(args(tmp_path, resume=True, lr=1e-5), out)
    assert other_lr.load() == {"step": 3}
    assert open_checkpoint(args(tmp_path, overwrite=True), out).load() is None
    checkpoint.remove()
    assert not list(tmp_path.iterdir())
    out.with_suffix(".png").write_text("precious")
    with pytest.raises(ValueError, match="s.png: is there already"):
        open_checkpoint(args(tmp_path, preview=10), out)
    out.write_text("precious")
    with pytest.raises(ValueError, match="is there already: --overwrite replaces it"):
        open_checkpoint(args(tmp_path), out)
    assert open_checkpoint(args(tmp_path, dry_run=True), out).folder is None
    assert out.read_text() == "precious"


def test_other_pictures_under_the_same_names_are_noticed(tmp_path):
    out, files = tmp_path / "s.safetensors", [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(b"1")
    open_checkpoint(args(tmp_path), out, [files]).save({"step": 3})
    resumed = open_checkpoint(args(tmp_path, resume=True), out, [files])
    assert resumed.load() == {"step": 3}
    files[1].write_bytes(b"2")
    with pytest.raises(ValueError, match="was begun with other pictures in these folders"):
        open_checkpoint(args(tmp_path, resume=True), out, [files])


def test_as_many_at_once_after_a_stop_as_before(model, tmp_path, monkeypatch):
    """On a GPU it follows from what is free, and names the parts."""
    checkpoint, size = Checkpoint(tmp_path, {}), (128, 128)
    for free in (5, 3):
        monkeypatch.setattr(batches, "samples_at_once", lambda *_: free)
        assert training.samples_at_once(Namespace(batch=8), model, size, checkpoint) == 5
    assert training.samples_at_once(Namespace(batch=8), model, size, NO_CHECKPOINT) == 3


def test_processes_have_parts_of_their_own_and_one_state(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank, value in ((0, 0.0), (1, 1.0)):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        assert checkpoint.remember("x", lambda: {"a": torch.tensor([value])})["a"].item() == value
        checkpoint.save({"step": value})
        assert checkpoint.load() == {"step": 0.0}


def test_a_state_made_on_another_device_is_read(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save({"parameters": [torch.arange(3.0)]})
    with zipfile.ZipFile(tmp_path / "state.pt") as f:
        parts = {name: f.read(name) for name in f.namelist()}
    # Where the pickle says that the tensor was.
    here, there = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:7"
    assert any(here in part for part in parts.values())
    with zipfile.ZipFile(tmp_path / "state.pt", "w", zipfile.ZIP_STORED) as f:
        for name, part in parts.items():
            f.writestr(name, part.replace(here, there))
    assert torch.equal(checkpoint.load()["parameters"][0], torch.arange(3.0))


def test_damaged_states_are_said_so(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match="state.pt: damaged .*delete it"):
        checkpoint.load()
    checkpoint.remember("x", lambda: {"a": torch.zeros(3)})
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="x.safetensors: damaged .*delete it"):
        checkpoint.remember("x", lambda: {})


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil_ran_here",)


def test_a_state_that_would_run_code_is_not_read(tmp_path):
    torch.save({"step": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(tmp_path).load()
    assert not Path("/tmp/evil_ran_here").exists()


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        slider_files.save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, None)
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        formats.write_atomically(tmp_path / "x", full)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    (tmp_path / "state.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="state.pt: could not be written"):
        save_state({"x": torch.zeros(9)}, tmp_path / "state.pt")


@pytest.mark.slow
def test_killed_twice_from_the_command_line(tmp_path):
    found = survives([*TEXT, "--steps", "6"], tmp_path, 2, random.Random(3), 9.0)
    assert found == {"same": True, "kills": 2, "left": False}
