"""UNet and VAE: names and shapes of the released SDXL, arithmetic of an independent implementation
(diffusers)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miniature import world
from sdxl_unet import UNet
from sdxl_vae import VAE
from support.training import set_checkpointing

FACTS = Path(__file__).parent / "facts"
CONFIGS = json.loads((FACTS / "sdxl_configs.json").read_text())
UNET = CONFIGS["unet"] | {
    "block_out_channels": [32, 64, 96],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [1, 2, 3],
    "cross_attention_dim": 40,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 24 + 96,
    "norm_num_groups": 16,
}
VAE_ = CONFIGS["vae"] | {
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}


def randomise(module, seed=0):
    """Every parameter away from its initial value, so that every branch matters."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        std, mean = (0.08, 0.0) if p.ndim > 1 else (0.3, 0.4)
        p.data = torch.randn(p.shape, generator=g) * std + mean
    return module.eval()


def unet_inputs(batch=3, h=8, w=12, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, h, w, generator=g),
        torch.tensor([1, 500, 981][:batch]),
        torch.randn(batch, 77, 40, generator=g),
        torch.randn(batch, 24, generator=g),
        torch.rand(batch, 6, generator=g) * 1024,
    )


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("kind, part", [(UNet, "unet"), (VAE, "vae")])
def test_full_size_names_and_shapes_are_the_released_ones(kind, part):
    with torch.device("meta"):
        module = kind(CONFIGS[part])
    facts = json.loads((FACTS / f"sdxl_{part}_keys.json").read_text())
    assert {name: list(p.shape) for name, p in module.state_dict().items()} == facts
    assert sum(p.numel() for p in module.parameters()) == CONFIGS["totals"][f"{part}_parameters"]


@pytest.mark.parametrize("h, w", [(8, 8), (8, 12), (16, 4)])
def test_unet_agrees_with_diffusers(h, w):
    diffusers = pytest.importorskip("diffusers")
    ours = randomise(UNet(UNET))
    theirs = diffusers.UNet2DConditionModel(**UNET).eval()
    theirs.load_state_dict(ours.state_dict())
    x, t, context, pooled, time_ids = unet_inputs(h=h, w=w)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        a = ours(x, t, context, pooled, time_ids)
        b = theirs(x, t, context, added_cond_kwargs=added).sample
    assert a.std() > 0.1 and relative_error(a, b) < 1e-5


def test_vae_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    ours = randomise(VAE(VAE_))
    theirs, factor = diffusers.AutoencoderKL(**VAE_).eval(), VAE_["scaling_factor"]
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(x)
        assert latents.shape == (2, 4, 8, 12)
        assert relative_error(latents, theirs.encode(x).latent_dist.mean * factor) < 1e-5
        pictures = theirs.decode(latents / factor).sample
        assert relative_error(ours.decode(latents), pictures) < 1e-5


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_close_to_float32(dtype, most):
    unet = randomise(UNet(UNET))
    x, t, *cond = unet_inputs()
    with torch.no_grad():
        exact = unet(x, t, *cond)
        half = unet.to(dtype)(x.to(dtype), t, *(c.to(dtype) for c in cond))
    assert half.dtype == dtype and relative_error(half.float(), exact) < most


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    if kind == "unet":
        network = randomise(UNet(UNET))
        block, run = network.mid_block, lambda: network(*unet_inputs())
    else:
        network = randomise(VAE(VAE_))
        block, run = network.decoder.mid_block, lambda: network.decode(torch.ones(2, 4, 8, 8))
    calls, gradients = [], []
    block.resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        set_checkpointing(network, checkpointing)
        network.zero_grad()
        run().square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert len(calls) == 1 + 2  # once more on the way back


NOT_SDXL = [
    {"down_block_types": ["AttnDownBlock2D"] * 3},
    {"addition_embed_type": None},
    {"attention_head_dim": 8},
]


@pytest.mark.parametrize("change", NOT_SDXL)
def test_another_kind_of_unet_is_refused(change):
    with pytest.raises(ValueError, match="not SDXL's kind"):
        UNet(UNET | change)


def test_decoding_in_tiles(model):
    """Exact where the decoder looks at one place at a time; close, and without seams, with the
    real one."""
    vae, tile = model.vae, model.vae.tile
    pictures = [world.draw(world.sample(np.random.default_rng(i))) for i in range(6)]
    z = model.encode(pictures)  # (6, 4, 16, 16)
    rows = torch.cat([*z[:3]], -1), torch.cat([*z[3:]], -1)
    z = torch.cat(rows, -2)[None]  # one picture of six: (1, 4, 32, 48)
    enlarge = lambda z: F.interpolate(z[:, :3], scale_factor=8.0)
    with torch.no_grad():
        whole = vae.decode(z)
        try:
            vae.tile = 20
            tiled = vae.decode(z)
            vae.decode_unscaled = enlarge
            found = vae.decode(z) * vae.config["scaling_factor"]
            assert torch.allclose(found, enlarge(z), atol=1e-5)
        finally:
            vae.tile = tile
            del vae.decode_unscaled
    assert tiled.shape == whole.shape == (1, 3, 256, 384)
    assert 0 < (tiled - whole).abs().mean() < 0.03
    edges = [119, 159, 223, 279]  # of the tiles
    jump = lambda p: (p[..., 1:] - p[..., :-1]).abs().mean((0, 1, 2))[edges]
    assert (jump(tiled) - jump(whole)).abs().max() < 0.01
