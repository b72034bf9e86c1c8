"""The cost model against a count of what really passes through the UNet; --dry-run; several processes against one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file
from test_cli import DRAW, ROOT, TRAIN, run

import lora
import train_pairs
import train_text
from bench.recipe import counted
from sdxl import SDXL
from support import checkpoint, cli, distributed, training

SMALL = [
    "--trajectories",
    "3",
    "--per-trajectory",
    "3",
    "--denoising-steps",
    "6",
    "--steps",
    "5",
    "--batch",
    "3",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for scale in ("a", "b", "c"):
        (folder / scale).mkdir()
        for i in range(3):
            Image.effect_noise((128, 128), 10 + 20 * ord(scale) - 1900 + i).save(
                folder / scale / f"{i}.png"
            )
    return folder


@pytest.mark.parametrize(
    "script, options",
    [
        (
            train_text,
            [*TRAIN[1:], *SMALL, "--preserve", "man, woman", "--probe", "2", "--preview", "2"],
        ),
        (train_text, [*TRAIN[1:], *SMALL, "--guidance", "1", "--probe", "0", "--positive-only"]),
        (train_pairs, ["--noises", "4", "--steps", "30", "--batch", "2", "--probe", "1"]),
    ],
    ids=["text", "plain", "pairs"],
)
def test_the_cost_model_is_what_passes_through_the_unet(
    script, options, pairs, tmp_path, monkeypatch
):
    model, plans = SDXL.load(device="cpu", dtype=torch.float32), []
    if script is train_pairs:
        options = options + [
            "--at",
            "-1",
            str(pairs / "a"),
            "--at",
            "1",
            str(pairs / "b"),
            "--at",
            "2",
            str(pairs / "c"),
        ]
    monkeypatch.setattr(cli, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(
        training,
        "cost",
        lambda *a, cost=training.cost, **k: plans.append(cost(*a, **k)) or plans[-1],
    )
    monkeypatch.setattr(
        sys, "argv", ["train", *options, "--out", str(tmp_path / "slider.safetensors")]
    )
    with counted(model.unet) as n:
        script.main()
    said = [sum(part) for part in zip(*plans[0].values())]
    assert said == [n["frozen"], n["trained"]] and n["frozen"] and n["trained"]


@pytest.mark.parametrize("command", [[*TRAIN, *SMALL], None], ids=["text", "pairs"])
def test_a_dry_run_trains_nothing(command, pairs, tmp_path):
    command = command or [
        "train_pairs.py",
        "--neg",
        pairs / "a",
        "--pos",
        pairs / "b",
        "--steps",
        "5",
    ]
    done = run(*command, "--dry-run", "--out", tmp_path / "slider.safetensors")
    assert done.returncode == 0, done.stderr
    assert (
        "Nothing was trained" in done.stdout
        and "GiB" in done.stdout
        and "together" in done.stdout
        and not list(tmp_path.iterdir())
    )


def together(*command):
    """The command in two processes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run([*launch, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


def dense(path):
    tensors = load_file(path)
    return torch.cat(
        [
            (
                tensors[f"{name}.lora_up.weight"].float().flatten(1)
                @ tensors[f"{name}.lora_down.weight"].float().flatten(1)
            ).flatten()
            for name in sorted(k.removesuffix(".alpha") for k in tensors if k.endswith(".alpha"))
        ]
    )


@pytest.mark.parametrize("what", ["text", "pairs"])
def test_two_processes_train_the_same_slider_as_one(what, pairs, tmp_path):
    """An odd number of trajectories, of pairs and of samples in a step, so that the two have unlike shares."""
    command = (
        [*TRAIN, *SMALL]
        if what == "text"
        else [
            "train_pairs.py",
            "--neg",
            pairs / "a",
            "--pos",
            pairs / "b",
            "--noises",
            3,
            "--steps",
            5,
            "--batch",
            3,
        ]
    )
    command += ["--probe", "0", "--seed", "3", "--out"]
    one, two = (
        run(*command, tmp_path / "one.safetensors"),
        together(*command, tmp_path / "two.safetensors"),
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("teacher's change on unseen x_t") == 1  # only one of them talks
    one, two = dense(tmp_path / "one.safetensors"), dense(tmp_path / "two.safetensors")
    assert one.norm() > 0 and (one - two).norm() < 0.01 * one.norm(), (
        (one - two).norm() / one.norm()
    ).item()


def test_two_processes_draw_the_same_pictures_as_one(tmp_path):
    command = [*DRAW, "--seeds", "0-2", "--steps", "3", "--out"]
    one, two = run(*command, tmp_path / "one"), together(*command, tmp_path / "two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for name in ("seed0.png", "seed1.png", "seed2.png", "strip.png"):
        difference = ImageChops.difference(
            Image.open(tmp_path / "one" / name), Image.open(tmp_path / "two" / name)
        )
        assert max(high for _, high in difference.getextrema()) <= 2, name


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that does aborts the process now and then as it ends, after everything is written. Modules imported once the group is there can keep it."""
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import parallel\n"
        "threads = lambda: [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')]\n"
        "parallel.start()\n"
        "from transformers import CLIPTextModel\n"
        "parallel.gather([0], 2)\n"
        "before = threads()\n"
        "parallel.stop()\n"
        "print(*(sum('gloo' in name for name in when) for when in (before, threads())))\n"
    )
    done = together(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    counts = [tuple(map(int, process.split())) for process in done.stdout.splitlines()]
    assert len(counts) == 2 and all(before > 0 and after == 0 for before, after in counts), (
        done.stdout
    )


def test_an_error_of_several_processes_is_clear():
    done = together(*DRAW, "--model", "nowhere")
    assert (
        done.returncode != 0 and "error in process 0: nowhere: no such model folder" in done.stderr
    )


def test_several_processes_stop_at_the_same_step_and_go_on_together(tmp_path):
    """Only one of them is interrupted. The result is that of one process that was not."""
    (tmp_path / "script.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport test_cost\ntest_cost.interrupted({str(tmp_path)!r})\n"
    )
    done = together(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    stops = [(tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)]
    assert stops == ["stopped after step 4; the same command with --resume goes on from there"] * 2
    whole = fitted()
    assert whole.norm() > 0
    for rank in (0, 1):
        torch.testing.assert_close(
            torch.load(tmp_path / f"slider{rank}.pt", weights_only=True), whole
        )


def fitted(**kept):
    """Least squares by student.loop: 12 samples, 9 steps of 5."""
    torch.manual_seed(0)
    slider = lora.Slider({"layer": torch.nn.Linear(3, 2)}, rank=2)
    (change,), x, y = slider.children(), torch.randn(12, 3), torch.randn(12, 2)
    loss = lambda rows: (change(x[rows]) - y[rows]).square().mean(1)
    training.train(
        slider,
        12,
        loss,
        lambda: {"share": 0.0, "cosine": 0.0},
        steps=9,
        batch=5,
        lr=0.1,
        meter_every=3,
        **kept,
    )
    return torch.cat([p.detach().flatten() for p in slider.parameters()])


def interrupted(folder):
    """What each of two processes does: stopped while it is at the fourth step, and once more to the end."""
    distributed.start()
    rank, calls, add_up = int(os.environ["RANK"]), [], distributed.all_reduce

    def interrupt(tensors):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return add_up(tensors)

    distributed.all_reduce = interrupt
    kept = checkpoint.Checkpoint(Path(folder))
    try:
        fitted(kept=kept)
    except KeyboardInterrupt as stop:
        (Path(folder) / f"stopped{rank}").write_text(str(stop))
    torch.distributed.barrier()
    torch.save(fitted(kept=kept), Path(folder) / f"slider{rank}.pt")
    distributed.stop()
