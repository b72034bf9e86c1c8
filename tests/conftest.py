import os
import sys
from pathlib import Path

# Tests mean the CPU, whatever else there is, unless TEST_DEVICE names a GPU (make test-gpu).
if (DEVICE := os.environ.setdefault("TEST_DEVICE", "cpu")) == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported; also for other processes

import pytest  # noqa: E402
import torch  # noqa: E402

if DEVICE == "cpu":
    torch.backends.mps.is_available = lambda: False
sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def model():
    """The bundled miniature SDXL in float32 on the CPU. Tests leave it as they found it."""
    from sdxl import SDXL

    return SDXL.load(device="cpu", dtype=torch.float32)


@pytest.fixture
def inputs(model):
    """Random inputs of the miniature's UNet, batch 3: latents, t, context, pooled, time_ids."""
    g = torch.Generator().manual_seed(0)
    c = model.unet.config
    pooled = c["projection_class_embeddings_input_dim"] - 6 * c["addition_time_embed_dim"]
    return (
        torch.randn(3, 4, 16, 16, generator=g),
        torch.tensor([1, 400, 981]),
        torch.randn(3, 77, c["cross_attention_dim"], generator=g),
        torch.randn(3, pooled, generator=g),
        torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 3),
    )


@pytest.fixture(scope="module")
def pipeline():
    """The miniature in diffusers, in float32."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from sdxl import MINIATURE

    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(MINIATURE, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)
