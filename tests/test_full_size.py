"""Full-size SDXL with random weights, against diffusers and between its forms: gigabytes and
minutes, so only on request:

FULL_SIZE=1 python -m pytest tests/test_full_size.py          (make test-full)
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(
    not os.environ.get("FULL_SIZE"), reason="set FULL_SIZE=1 to run the full-size checks"
)
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float32, 1e-4)])
def test_forward_agrees_with_diffusers(dtype, tolerance):
    from bench.unet import CONFIGS, UNet, empty, inputs

    diffusers = pytest.importorskip("diffusers")
    ours = empty(UNet, dtype)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**CONFIGS["full"])
    theirs.load_state_dict(ours.state_dict(), assign=True)  # the same tensors: no second copy
    x, t, context, pooled, ids = inputs(dtype, side=32)
    added = {"text_embeds": pooled, "time_ids": ids}
    with torch.no_grad():
        a = ours(x, t, context, pooled, ids).float()
        b = theirs.eval()(x, t, context, added_cond_kwargs=added).sample.float()
    error = ((a - b).norm() / b.norm()).item()
    print(f"\nUNet, {dtype}, 256 pixels: relative difference to diffusers {error:.1e}")
    assert a.isfinite().all() and a.std() > 0.01
    assert error < tolerance


LOAD = """
import sys, torch
from sdxl import SDXL
from bench.unet import inputs
from support.cost import peak_memory
before = peak_memory()
model = SDXL.load(sys.argv[1], device="cpu", dtype=torch.float16, base=sys.argv[2])
loaded = peak_memory() - before  # a mapped tensor is resident only once it was used
with torch.no_grad():
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    out = model.unet(*inputs(torch.float16, side=16)), model.vae.decode(latents)
    out += model.condition(["an old man"])
torch.save([t.float() for t in out], sys.argv[3])
print(loaded, peak_memory() - before)
"""


def test_one_full_size_file_and_the_folder_are_the_same_model(tmp_path):
    """Every published name, fp16 (6.9 GB): none missing, none left over; the folder made from it
    gives the same outputs; loading takes at most 1.1 times the weights (the VAE is wanted in
    float32, 4 bytes each)."""
    from formats import single_file
    from formats.weights import PARTS
    from sdxl import MINIATURE

    shapes = json.loads((ROOT / "tests/facts/sdxl_single_file_keys.json").read_text())
    g = torch.Generator().manual_seed(0)
    scale = lambda name, shape: 0.02 if len(shape) > 1 else 0.1
    tensors = {n: (torch.randn(s, generator=g) * scale(n, s)).half() for n, s in shapes.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    base = tmp_path / "base"  # tokenizers: the miniature's; sizes: SDXL's
    for t in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MINIATURE / t, base / t)
    renamed = single_file.rename({n: tuple(s) for n, s in shapes.items()})
    for part in PARTS:
        (base / part).mkdir()
        state = {}
        for new, old, action in renamed[part]:
            state[new] = single_file.transform(tensors[old], action).contiguous().clone()
        stem = "model" if "text" in part else "diffusion_pytorch_model"
        save_file(state, base / part / f"{stem}.safetensors")
        (base / part / "config.json").write_text(json.dumps(single_file.SDXL[part]))
    (base / "scheduler").mkdir()
    scheduler = json.dumps(single_file.SDXL["scheduler"])
    (base / "scheduler" / "scheduler_config.json").write_text(scheduler)
    index = single_file.SDXL["model_index"]
    index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    (base / "model_index.json").write_text(json.dumps(index))
    size = 0  # bytes
    for part in PARTS:
        for _, old, action in renamed[part]:
            numbers = torch.Size(shapes[old]).numel() // (3 if action in ("q", "k", "v") else 1)
            size += numbers * (4 if part == "vae" else 2)
    del tensors, state
    outputs = []
    for form in ("one.safetensors", "base"):
        command = [sys.executable, "-c", LOAD, tmp_path / form, base, tmp_path / "out.pt"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded, used = (int(n) / size for n in done.stdout.split())
        weights = f"the weights' {size / 2**30:.2f} GiB while loading"
        print(f"\n{form}: peak memory {loaded:.2f} times {weights}, {used:.2f} once all were used")
        assert loaded < 1.1 and 0.7 < used < 1.1  # the token tables are read a row at a time
        outputs.append(torch.load(tmp_path / "out.pt", weights_only=True))
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(*outputs))


def test_the_defaults_train_and_say_what_they_take(tmp_path):
    """A text slider on a folder of random weights, as the command line trains it on a CPU: two
    steps of a few samples. The defaults' own cost, as --dry-run prints it: at most 2,500
    evaluations without gradients and 480 with, the probe included."""
    run = lambda *words: subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    done = run("-m", "bench.full_size", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    ends = ("--pos", "a photo of a person, very old", "--neg", "a photo of a person, very young")
    model = ("--model", tmp_path / "model", "--device", "cpu", "--size", 64)
    train = ("train_text.py", *ends, *model, "--out", tmp_path / "age.safetensors")
    groups = ("with glasses, without glasses", "with a hat, without a hat")
    preserve = [word for group in groups for word in ("--preserve", group)]
    done = run(*train, *preserve, "--dry-run")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "H200" in done.stdout
    together = done.stdout.split("together")[1].split()
    assert int(together[0].replace(",", "")) <= 2500 and int(together[1]) <= 480
    few = "--trajectories 1 --per-trajectory 2 --denoising-steps 2 --steps 2 --batch 2 --probe 0"
    done = run(*train, *few.split())
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr and (tmp_path / "age.safetensors").exists()
