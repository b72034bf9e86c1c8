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
import train_text
from bench.kill import TEXT, survives
from support import checkpoint, training
from support.checkpoint import Checkpoint


def collect(model, kept=checkpoint.NO_CHECKPOINT, **changes):
    prompts = train_text.encode(
        model,
        ["a photo of a person"],
        "a photo of a person, smiling",
        "a photo of a person, frowning",
        [],
        (128, 128),
    )
    settings = dict(
        eta=1.0,
        trajectories=5,
        per_trajectory=2,
        denoising_steps=4,
        size=(128, 128),
        seed=5,
        batch=2,
    )
    return train_text.collect(model, prompts, remember=kept.remember, **(settings | changes))


def fit(model, targets, kept=checkpoint.NO_CHECKPOINT, **changes):
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet, "xattn")).attach(model.unet)
    try:
        reading = training.fit_targets(
            model.unet,
            slider,
            targets,
            targets[torch.arange(2)],
            **(dict(steps=9, batch=3, lr=1e-3, meter_every=2, checkpoint=kept) | changes),
        )
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


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_a_training_that_broke_off_ends_with_the_same_bytes(
    model, targets, whole, tmp_path, monkeypatch, at
):
    real, calls = student.predict, []

    def breaks(unet, slider, batch):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > at:
            raise Stop
        return real(unet, slider, batch)

    kept = Checkpoint(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(student, "predict", breaks)
        with pytest.raises(Stop):
            fit(model, targets, kept)
    again, reading = fit(model, targets, kept)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], again)) and reading == whole[1]


def test_collecting_goes_on_where_it_was(model, targets, tmp_path, monkeypatch):
    real, calls = train_text.ends_difference, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return real(*args)

    kept = Checkpoint(tmp_path)
    monkeypatch.setattr(train_text, "ends_difference", breaks)
    with pytest.raises(Stop):
        collect(model, kept)
    monkeypatch.setattr(train_text.sampler, "sample", lambda *_, **__: pytest.fail("walked again"))
    again = collect(model, kept)
    assert len(calls) == 3 + 8  # ten batches of one x_t; two were there
    for name in ("x_t", "t", "eps_0", "target"):
        assert torch.equal(getattr(targets, name), getattr(again, name)), name


def test_ctrl_c_ends_the_step_keeps_it_and_says_how_to_go_on(
    model, targets, whole, tmp_path, monkeypatch
):
    real, calls = student.predict, []

    def interrupts(unet, slider, batch):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(unet, slider, batch)

    kept = Checkpoint(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(student, "predict", interrupts)
        with pytest.raises(
            KeyboardInterrupt, match="stopped after step 4; the same command with --resume"
        ):
            fit(model, targets, kept, meter_every=100)
    assert kept.load()["step"] == 4
    assert all(
        torch.equal(a, b) for a, b in zip(whole[0], fit(model, targets, kept, meter_every=100)[0])
    )


@pytest.mark.slow
def test_divergence_keeps_the_last_good_state(model, targets, tmp_path, monkeypatch):
    real, calls = student.predict, []

    def explodes(unet, slider, batch):
        calls.append(torch.is_grad_enabled())
        return real(unet, slider, batch) * (float("nan") if sum(calls) == 5 else 1)

    kept = Checkpoint(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(student, "predict", explodes)
        with pytest.raises(
            FloatingPointError,
            match="diverged at step 5 .*lower --lr.*--resume with it goes on from step 4",
        ):
            fit(model, targets, kept)
    state = kept.load()
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["parameters"])
    slider, _ = fit(model, targets, kept, lr=1e-4)  # goes on with another rate
    assert all(p.isfinite().all() for p in slider)


def args(tmp_path, **changes):
    flags = dict(resume=False, overwrite=False, dry_run=False)
    settings = dict(out=str(tmp_path / "s.safetensors"), pos="a", steps=None, lr=None)
    return Namespace(**(flags | settings | dict(merge=[("x", 1.0)]) | changes))


def test_nothing_is_overwritten_unless_asked(tmp_path, monkeypatch):
    out = tmp_path / "s.safetensors"
    # Stopped before anything was kept: from the beginning.
    assert checkpoint.open_checkpoint(args(tmp_path, resume=True), out).load() is None
    kept = checkpoint.open_checkpoint(args(tmp_path), out)
    kept.save({"step": 3})
    with pytest.raises(ValueError, match="--resume goes on with it, --overwrite starts anew"):
        checkpoint.open_checkpoint(args(tmp_path), out)
    with pytest.raises(ValueError, match="was begun with --pos a, not b"):
        checkpoint.open_checkpoint(args(tmp_path, resume=True, pos="b"), out)
    with (
        monkeypatch.context() as m,
        pytest.raises(ValueError, match="was begun with --nproc-per-node 1, not 2"),
    ):
        m.setattr(checkpoint.distributed, "world_size", lambda: 2)
        checkpoint.open_checkpoint(args(tmp_path, resume=True), out)
    assert checkpoint.open_checkpoint(args(tmp_path, resume=True, lr=1e-5), out).load() == {
        "step": 3
    }
    assert checkpoint.open_checkpoint(args(tmp_path, overwrite=True), out).load() is None
    kept.remove()
    assert not list(tmp_path.iterdir())
    out.with_suffix(".png").write_text("precious")
    with pytest.raises(ValueError, match="s.png: is there already"):
        checkpoint.open_checkpoint(args(tmp_path, preview=10), out)
    out.write_text("precious")
    with pytest.raises(ValueError, match="is there already: --overwrite replaces it"):
        checkpoint.open_checkpoint(args(tmp_path), out)
    assert (
        checkpoint.open_checkpoint(args(tmp_path, dry_run=True), out).folder is None
        and out.read_text() == "precious"
    )


def test_processes_have_parts_of_their_own_and_one_state(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path)
    for name, first, value in (("", True, 0.0), (" in process 1", False, 1.0)):
        monkeypatch.setattr(checkpoint.distributed, "process_name", lambda: name)
        monkeypatch.setattr(checkpoint.distributed, "is_main_process", lambda: first)
        assert kept.remember("x", lambda: {"a": torch.tensor([value])})["a"].item() == value
        kept.save({"step": value})
        assert kept.load() == {"step": 0.0}


def test_a_state_made_on_another_device_is_read(tmp_path):
    kept = Checkpoint(tmp_path)
    kept.save({"parameters": [torch.arange(3.0)]})
    with zipfile.ZipFile(tmp_path / "state.pt") as f:
        parts = {name: f.read(name) for name in f.namelist()}
    # Where the pickle says that the tensor was.
    here, there = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:7"
    assert any(here in part for part in parts.values())
    with zipfile.ZipFile(tmp_path / "state.pt", "w", zipfile.ZIP_STORED) as f:
        for name, part in parts.items():
            f.writestr(name, part.replace(here, there))
    assert torch.equal(kept.load()["parameters"][0], torch.arange(3.0))


def test_damaged_states_are_said_so(tmp_path):
    kept = Checkpoint(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match="state.pt: damaged .*delete it"):
        kept.load()
    kept.remember("x", lambda: {"a": torch.zeros(3)})
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="x.safetensors: damaged .*delete it"):
        kept.remember("x", lambda: {})


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil_ran_here",)


def test_a_state_that_would_run_code_is_not_read(tmp_path):
    torch.save({"step": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(tmp_path).load()
    assert not Path("/tmp/evil_ran_here").exists()


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        formats.write_atomically(tmp_path / "x", full)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_twice_from_the_command_line(tmp_path):
    found = survives([*TEXT, "--steps", "6", "--probe", "0"], tmp_path, 2, random.Random(3), 9.0)
    assert found == {"same": True, "kills": 2, "left": False}
