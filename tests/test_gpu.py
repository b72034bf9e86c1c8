"""What a GPU does differently: its arithmetic, half precision, CUDA graphs, free memory.

    make test-gpu                       (CUDA; TEST_DEVICE=mps make test-gpu on a Mac)

Everything else is tested on the CPU."""

import copy
import os
import re
import warnings

import numpy as np
import pytest
import torch
from commands import DRAW, TRAIN, run
from PIL import Image
from test_lora import trained_slider

import lora
import sampler
import train_text
from sdxl import SDXL
from support import batches, graphs, training
from support.merge import Composed, add_to_weights, by_layer

DEVICE = os.environ["TEST_DEVICE"]
USABLE = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
pytestmark = pytest.mark.skipif(
    not USABLE.get(DEVICE, lambda: False)(), reason="no GPU; TEST_DEVICE=cuda or mps names one"
)
CUDA_ALONE = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs are CUDA's")
SMALL = "--trajectories 8 --per-trajectory 4 --denoising-steps 10 --steps 40 --probe 1"


@pytest.fixture(scope="module")
def on_gpu():
    return SDXL.load(device=DEVICE, dtype=torch.float32)


@pytest.fixture
def gpu_inputs(inputs):
    return [x.to(DEVICE) for x in inputs]


@pytest.fixture
def graphs_on(monkeypatch):
    """A context for what is to run without a warning, so as a graph."""
    monkeypatch.setattr(graphs, "enabled", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def relative(a, b):
    return ((a.cpu().float() - b.cpu().float()).norm() / b.cpu().float().norm()).item()


def without_graphs(function, *args):
    graphs.enabled = False
    try:
        return function(*args)
    finally:
        graphs.enabled = True


@torch.no_grad()
def test_the_networks_agree_with_the_cpu(model, on_gpu, inputs, gpu_inputs):
    assert relative(on_gpu.unet(*gpu_inputs), model.unet(*inputs)) < 1e-3
    latents = inputs[0]
    picture = on_gpu.vae.decode(latents.to(DEVICE))
    assert relative(picture, model.vae.decode(latents)) < 1e-3
    assert relative(on_gpu.vae.encode(picture), model.vae.encode(picture.cpu())) < 1e-3
    cond = [m.condition(["a photo of an old man"]) for m in (on_gpu, model)]
    assert all(relative(a, b) < 1e-3 for a, b in zip(*cond))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@torch.no_grad()
def test_half_precision(model, inputs, dtype, tolerance):
    """With a slider on, whose weights are float32 as in training."""
    half = SDXL.load(device=DEVICE, dtype=dtype, vae=False)
    sliders = [trained_slider(m.unet).to(m.device).attach(m.unet) for m in (half, model)]
    x = [v.to(DEVICE, dtype if v.is_floating_point() else None) for v in inputs]
    try:
        with sliders[0].at(1.0), sliders[1].at(1.0):
            assert relative(half.unet(*x), model.unet(*inputs)) < tolerance
    finally:
        sliders[1].detach()


@torch.no_grad()
def test_a_picture_is_the_cpus(model, on_gpu):
    """Twenty steps with guidance: the same noise means the same picture."""
    drawn = []
    for m in (model, on_gpu):
        cond, uncond = m.condition(["a photo of a man with a hat"]), m.condition([""])
        x_T = sampler.noise([3], m.latent_shape(), m.device, m.dtype)
        x_0 = sampler.sample(m.unet, x_T, cond, uncond, alpha_bar=m.alpha_bar, steps=20)
        drawn.append(np.asarray(m.decode(x_0)[0], float))
    assert np.abs(drawn[0] - drawn[1]).mean() < 1


# ---------------------------------------------------------------------------------- CUDA graphs


@CUDA_ALONE
@torch.no_grad()
def test_graphs_predict_what_the_unet_does(on_gpu, gpu_inputs, graphs_on):
    """Bit for bit, for every kind of scale, as scales and the slider's weights change."""
    unet, inputs = on_gpu.unet, gpu_inputs
    other = [x.flip(0) for x in inputs]
    slider = trained_slider(unet, rank=4).to(DEVICE)
    plain = without_graphs(unet, *inputs)
    assert torch.equal(unet(*inputs), plain) and torch.equal(unet(*inputs), plain)
    slider.attach(unet)
    assert torch.equal(unet(*inputs), plain)
    each = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    by_rank = torch.randn(3, 4, device=DEVICE)
    for scale in (1.0, -2.0, each, by_rank, 0.0, each.flip(0), 1.0):
        for x in (inputs, other):
            with slider.at(scale):
                assert torch.equal(unet(*x), without_graphs(unet, *x))
        for p in slider.parameters():
            p.add_(0.01)
    slider.detach()
    assert torch.equal(unet(*inputs), plain)


@CUDA_ALONE
@torch.no_grad()
def test_graphs_see_weights_that_were_replaced(on_gpu, gpu_inputs, graphs_on):
    unet = copy.deepcopy(on_gpu.unet)
    before = unet(*gpu_inputs)
    pairs = [(trained_slider(unet, seed).to(DEVICE), 1.0) for seed in (1, 2)]
    composed = Composed(unet, pairs)
    composed.scale = 1.0
    with_both = unet(*gpu_inputs)
    assert torch.equal(with_both, without_graphs(unet, *gpu_inputs))
    assert relative(with_both, before) > 1e-3
    composed.detach()
    assert torch.equal(unet(*gpu_inputs), before)
    add_to_weights(by_layer(unet, pairs))
    assert relative(unet(*gpu_inputs), with_both) < 1e-3


@CUDA_ALONE
@torch.no_grad()
def test_hooks_of_others_are_called(on_gpu, gpu_inputs, graphs_on):
    seen = []
    on_gpu.unet(*gpu_inputs)
    handle = on_gpu.unet.conv_in.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        on_gpu.unet(*gpu_inputs)
    handle.remove()
    assert len(seen) == 3


@CUDA_ALONE
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_as_a_graph_is_the_training(on_gpu, graphs_on, checkpointing):
    """The same slider, to rounding, as without; with the meter's readings in between."""
    model, size = on_gpu, (128, 128)
    words = ("a photo of a person, smiling", "a photo of a person, frowning")
    prompts = train_text.encode(model, ["a photo of a person"], *words, [], size)
    settings = dict(eta=1.0, size=size, denoising_steps=8, batch=16, trajectories=6)
    train, held_out = train_text.teach(model, prompts, seed=0, **settings)
    training.set_checkpointing(model.unet, checkpointing)
    sliders, readings = [], []
    for on in (True, False):
        graphs.enabled = on
        torch.manual_seed(0)
        slider = lora.Slider(lora.target_layers(model.unet)).to(DEVICE).attach(model.unet)
        settings = dict(steps=30, batch=8, lr=4e-3, meter_every=10)
        readings.append(training.fit_targets(model.unet, slider, train, held_out, **settings))
        slider.detach()
        sliders.append(torch.cat([p.detach().flatten() for p in slider.parameters()]))
    graphs.enabled = True
    training.set_checkpointing(model.unet, False)
    assert relative(*sliders) < 1e-2
    for name, value in readings[1].items():
        assert readings[0][name] == pytest.approx(value, abs=1e-2)
    assert readings[0]["share"] > 0.3


@CUDA_ALONE
def test_what_cannot_be_recorded_runs_all_the_same():
    slow = lambda x: x * x.sum().item()  # waits for the GPU
    call, x = graphs.captured(slow, DEVICE), torch.ones(3, device=DEVICE)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        first = call(x)
    assert torch.equal(first, 3 * x) and torch.equal(call(2 * x), 12 * x)
    assert torch.randn(3, device=DEVICE).isfinite().all()  # the generator still works
    fine = graphs.captured(lambda x: x + 1, DEVICE)
    assert torch.equal(fine(x), x + 1) and torch.equal(fine(x + 1), x + 2)


# ------------------------------------------------------------------------------ memory, commands


@CUDA_ALONE
def test_a_full_gpu_takes_fewer_samples(on_gpu):
    most = batches.samples_at_once(on_gpu.unet, on_gpu.latent_shape(), 8)
    assert most == batches.MAX_SAMPLES
    huge = batches.free_memory(DEVICE) // batches.sample_bytes(on_gpu.unet, (4, 1, 1))
    assert batches.samples_at_once(on_gpu.unet, (4, huge, 1), 8) == 1
    assert training.fits(8, on_gpu.unet, on_gpu.latent_shape())
    assert not training.fits(8, on_gpu.unet, (4, huge, 1))


@pytest.mark.parametrize("option", ["", "--no-cuda-graphs", "--checkpointing", "--dtype float16"])
def test_a_slider_with_the_defaults_of_a_gpu(option, tmp_path):
    """bfloat16 by itself; trained, probed, drawn."""
    done = run(f"{TRAIN} {SMALL} {option} --out {tmp_path}/smile.safetensors")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    share = int(re.search(r"makes (\d+)% of the teacher's change", done.stdout)[1])
    assert share > 40
    scales = f"--slider {tmp_path}/smile.safetensors --scales -2,0,2 --steps 10 --seeds 0,1"
    done = run(f"{DRAW} {scales} {option.replace('--checkpointing', '')} --out {tmp_path}/drawn")
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "drawn" / "strip.png")).std() > 10


def test_the_other_trainings_and_an_inversion(tmp_path):
    """Every loss on the way back through the UNet, and through CLIP and the VAE."""
    done = run(f"-m miniature.pairs --count 4 --values 0.6,1.6 --out {tmp_path}")
    assert done.returncode == 0, done.stderr
    small = f"--steps 6 --batch 4 --noises 2 --probe 0 --out {tmp_path}/eyes.safetensors"
    done = run(f"train_pairs.py --neg {tmp_path}/0.6 --pos {tmp_path}/1.6 {small}")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    small = "--sliders 2 --samples 12 --train-samples 10 --per-sample 2 --denoising-steps 4"
    small = f"{small} --steps 3 --batch 2 --out {tmp_path}/space"
    done = run(f"train_space.py --prompt 'a photo of a person' {small}")
    assert done.returncode == 0 and "no CUDA graph" not in done.stderr, done.stderr
    picture = next((tmp_path / "0.6").glob("*.png"))
    edit = f"--image {picture} --slider {tmp_path}/eyes.safetensors --scales 0,2 --steps 6"
    done = run(f"{DRAW} {edit} --out {tmp_path}/edited")
    assert done.returncode == 0, done.stderr
