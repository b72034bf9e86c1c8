"""The cost model against a count of what really passes through the UNet; --dry-run; several
processes against one."""

import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from commands import DRAW, ROOT, TRAIN, run, run_in_two
from counting import counted
from PIL import Image, ImageChops
from safetensors.torch import load_file

import lora
import student
import train_pairs
import train_text
from formats import slider_files
from sdxl import SDXL
from support import checkpoint, cli, cost, distributed, training

SMALL = "--trajectories 3 --per-trajectory 3 --denoising-steps 6 --steps 5 --batch 3"
TEXT = f"{TRAIN} {SMALL}"
TINY = "--size 64"  # pixels: for what does not look at the slider


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for scale in ("a", "b", "c"):
        (folder / scale).mkdir()
        for i in range(3):
            picture = Image.effect_noise((128, 128), 10 + 20 * ord(scale) - 1900 + i)
            picture.save(folder / scale / f"{i}.png")
    return folder


PAIRS = "train_pairs.py --neg {0}/a --pos {0}/b"
THREE = "train_pairs.py --at -1 {0}/a --at 1 {0}/b --at 2 {0}/c"


@pytest.mark.parametrize(
    "script, command",
    [
        pytest.param(
            train_text,
            f"{TEXT} --preserve 'man, woman' --probe 2 --preview 2",
            marks=pytest.mark.slow,
        ),
        (train_text, f"{TEXT} --guidance 1 --probe 0 --positive-only"),
        pytest.param(
            train_pairs,
            f"{THREE} --noises 4 --steps 30 --batch 2 --probe 1",
            marks=pytest.mark.slow,
        ),
        (train_pairs, f"{THREE} --noises 2 --steps 3 --batch 2 --probe 0"),
    ],
    ids=["text", "plain", "pairs", "few pairs"],
)
def test_the_cost_model_is_what_passes_through_the_unet(
    script, command, pairs, tmp_path, monkeypatch
):
    model, plans, estimate = SDXL.load(device="cpu", dtype=torch.float32), [], cost.estimate

    def remember(*args, **options):
        plans.append(estimate(*args, **options))
        return plans[-1]

    monkeypatch.setattr(cli, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(cost, "estimate", remember)
    words = shlex.split(f"{command.format(pairs)} {TINY}")
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "slider.safetensors")])
    with counted(model.unet) as n:
        script.main()
    estimated = [sum(part) for part in zip(*plans[0].values())]
    assert estimated == [n["frozen"], n["trained"]] and n["frozen"] and n["trained"]


def test_the_published_recipe_is_one_flag_away(tmp_path, monkeypatch):
    """500 steps of 2. What is given beside it counts. Of a model of SDXL's size on a CPU a dry run
    says what a GPU would take, too."""
    few = "--trajectories 1 --per-trajectory 1 --denoising-steps 2 --probe 0"
    command = f"{TRAIN} {few} {TINY} --dry-run --out {tmp_path / 's.safetensors'}"
    trained = lambda done: re.search(r"training ([\d,]+) with gradients", done.stdout)[1]
    assert trained(run(command)) == "480"
    assert trained(run(f"{command} --recipe published")) == "1,000"
    monkeypatch.setattr(cost, "is_small", lambda unet: False)
    done = run(f"{command} --recipe published --steps 100")
    assert trained(done) == "200" and "An NVIDIA H200 (800 TFLOP/s) takes about" in done.stdout


@pytest.mark.parametrize(
    "command", [f"{TEXT} {TINY}", f"{PAIRS} --steps 5 --batch 3 {TINY}"], ids=["text", "pairs"]
)
def test_a_dry_run_trains_nothing(command, pairs, tmp_path):
    done = run(f"{command.format(pairs)} --dry-run --out {tmp_path / 'slider.safetensors'}")
    assert done.returncode == 0, done.stderr
    for words in ("Nothing was trained", "GiB", "together"):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())


def change(path):
    """All that a slider file changes, as one vector."""
    tensors = load_file(path)
    parts = []
    for name in sorted(k.removesuffix(".alpha") for k in tensors if k.endswith(".alpha")):
        A, B = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        parts.append(slider_files.delta_weight(A, B).flatten())
    return torch.cat(parts)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["text", "pairs"])
def test_two_processes_train_the_same_slider_as_one(what, pairs, tmp_path):
    """An odd number of trajectories, of pairs and of samples in a step: unlike shares."""
    small_pairs = f"{PAIRS.format(pairs)} --noises 3 --steps 5 --batch 3"
    small_text = f"{TEXT} --lr 1e-3"  # with the default's 4e-3, so few x_t diverge
    command = f"{small_text if what == 'text' else small_pairs} --probe 0 --seed 3 --out {tmp_path}"
    one, two = run(f"{command}/one.safetensors"), run_in_two(f"{command}/two.safetensors")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("teacher's change on unseen x_t") == 1  # only one of them talks
    one, two = change(tmp_path / "one.safetensors"), change(tmp_path / "two.safetensors")
    error = ((one - two).norm() / one.norm()).item()
    assert one.norm() > 0 and error < 0.01, error


@pytest.mark.slow
def test_two_processes_draw_the_same_pictures_as_one(tmp_path):
    command = f"{DRAW} --seeds 0-2 --steps 3 --out {tmp_path}"
    one, two = run(f"{command}/one"), run_in_two(f"{command}/two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for name in ("seed0.png", "seed1.png", "seed2.png", "strip.png"):
        pictures = (Image.open(tmp_path / folder / name) for folder in ("one", "two"))
        extrema = ImageChops.difference(*pictures).getextrema()
        assert max(high for _, high in extrema) <= 2, name


COUNT_THREADS = """
import os, sys
sys.path.insert(0, {root!r})
from support import distributed
def gloo_threads():
    names = [open(f"/proc/self/task/{{t}}/comm").read() for t in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)
distributed.start()
rank = distributed.rank()
from transformers import CLIPTextModel
distributed.all_gather([0], 2)
before = gloo_threads()
distributed.stop()
open({folder!r} + f"/threads{{rank}}", "w").write(f"{{before}} {{gloo_threads()}}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that does aborts the process now and then as it ends, after everything is written.
    Modules imported once the group is there can keep it. Each process writes a file of its own."""
    script = tmp_path / "script.py"
    script.write_text(COUNT_THREADS.format(root=str(ROOT), folder=str(tmp_path)))
    done = run_in_two(script)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        before, after = map(int, (tmp_path / f"threads{rank}").read_text().split())
        assert before > 0 and after == 0


@pytest.mark.slow
def test_an_error_of_several_processes_is_clear():
    done = run_in_two(f"{DRAW} --model nowhere")
    line = "error in process 0: nowhere: no such model folder"
    assert done.returncode != 0 and line in done.stderr


INTERRUPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_cost
test_cost.interrupted({folder!r})
"""


def test_several_processes_stop_at_the_same_step_and_go_on_together(tmp_path):
    """Only one of them is interrupted. The result is that of one process that was not."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPT.format(root=str(ROOT), folder=str(tmp_path)))
    done = run_in_two(script)
    assert done.returncode == 0, done.stderr
    stops = [(tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)]
    expected = "stopped after step 4; the same command with --resume goes on from there"
    assert stops == [expected] * 2
    whole = fitted()
    assert whole.norm() > 0
    for rank in (0, 1):
        found = torch.load(tmp_path / f"slider{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, whole)


def fitted(**options):
    """Least squares by training.train: 12 samples, 9 steps of 5."""
    torch.manual_seed(0)
    slider = lora.Slider({"layer": torch.nn.Linear(3, 2)}, rank=2)
    (part,), x, y = slider.children(), torch.randn(12, 3), torch.randn(12, 2)
    A, B = part.A, part.B
    loss = lambda rows: (x[rows] @ A.T @ B.T / 2 - y[rows]).square().mean(1)
    reading = lambda: {"share": 0.0, "cosine": 0.0}
    settings = dict(steps=9, batch=5, lr=0.1, meter_every=3) | options
    training.train(slider, loss, 12, reading, **settings)
    return torch.cat([p.detach().flatten() for p in slider.parameters()])


@pytest.mark.parametrize("number, refused", [(1, False), (2, True)])
def test_more_processes_than_gpus_are_one_line(monkeypatch, number, refused):
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken, joined = [], []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", joined.append)
    if refused:
        with pytest.raises(ValueError, match="only 2 GPUs: --nproc-per-node 2, or CUDA_VISIBLE"):
            distributed.start()
    else:
        distributed.start()
    assert (taken, joined) == (([], []) if refused else ([1], ["cpu:gloo,cuda:nccl"]))


def interrupted(folder):
    """What each of two processes does: stopped while it is at the fourth step, and once more to the
    end. The interrupt comes in the computation of the fourth step's loss."""
    distributed.start()
    rank, calls, draw = distributed.rank(), [], student.TrainingState.draw

    def interrupt(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)

    student.TrainingState.draw = interrupt
    kept = checkpoint.Checkpoint(Path(folder))
    try:
        fitted(checkpoint=kept)
    except KeyboardInterrupt as stop:
        (Path(folder) / f"stopped{rank}").write_text(str(stop))
    torch.distributed.barrier()
    torch.save(fitted(checkpoint=kept), Path(folder) / f"slider{rank}.pt")
    distributed.stop()
