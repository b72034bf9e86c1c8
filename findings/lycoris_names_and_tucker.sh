#!/usr/bin/env bash
# lycoris-lora 4.1.3, diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.24.0,
# safetensors 0.8.0.
#
# LyCORIS used alone (not inside kohya's trainer) calls a layer lycoris_down_blocks_..., not
# lora_unet_down_blocks_..., else as kohya does. With use_tucker=True a 3x3 convolution is three
# tensors: lora_down (r, in, 1, 1), lora_mid (r, r, 3, 3), lora_up (out, r, 1, 1); the change is
# alpha / r times sum over m, n of up[o, m] mid[m, n] down[n, i]. diffusers refuses the prefix, and,
# once that is renamed, the file with lora_mid.
#
# Seen:
#     plain: conv1 has alpha, lora_down.weight, lora_up.weight
#         diffusers: ValueError; renamed to lora_unet_: read
#     tucker: conv1 has alpha, lora_down.weight, lora_mid.weight, lora_up.weight
#         diffusers: ValueError; renamed to lora_unet_: ValueError
#     the formula above is LyCORIS's own change
#
# It exits 0 while this is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 safetensors==0.8.0 lycoris-lora==4.1.3
venv/bin/python -W ignore - <<'PROGRAM'
import logging

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from lycoris import LycorisNetwork
from safetensors.torch import load_file

def tiny_unet():
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=1,
        attention_head_dim=(2, 4), cross_attention_dim=16, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


def pipeline(unet):
    parts = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    return StableDiffusionXLPipeline(**parts, unet=unet, scheduler=EulerDiscreteScheduler())


def scales(unet):
    """{layer: alpha / r as it is applied} of the layers that carry the LoRA."""
    layers = {n: m for n, m in unet.named_modules() if getattr(m, "lora_A", None)}
    return {name: next(iter(m.scaling.values())) for name, m in layers.items()}


def diffusers_reads(tensors):
    try:
        pipeline(tiny_unet()).load_lora_weights(tensors)
    except Exception as error:
        return type(error).__name__
    return "read"


logging.getLogger("LyCORIS").setLevel("ERROR")
names = [r".*\.conv1$", r".*attn1\.to_q$"]
LycorisNetwork.apply_preset({"target_module": [], "target_name": names, "enable_conv": True})
seen = {}
for kind in ("plain", "tucker"):
    options = dict(network_module="lora", use_tucker=kind == "tucker")
    ranks = dict(lora_dim=2, alpha=1, conv_lora_dim=2, conv_alpha=1)
    network = LycorisNetwork(tiny_unet(), **ranks, **options)
    network.apply_to()
    for part in network.loras:
        torch.nn.init.normal_(part.lora_up.weight)
    network.save_weights("file.safetensors", torch.float32, {})
    file = load_file("file.safetensors")
    conv = "lycoris_down_blocks_0_resnets_0_conv1."
    names = sorted(name.removeprefix(conv) for name in file if name.startswith(conv))
    renamed = {name.replace("lycoris_", "lora_unet_"): tensor for name, tensor in file.items()}
    seen[kind] = (diffusers_reads(file), diffusers_reads(renamed))
    print(f"{kind}: conv1 has {', '.join(names)}")
    print(f"    diffusers: {seen[kind][0]}; renamed to lora_unet_: {seen[kind][1]}")
    assert all(name.startswith("lycoris_") for name in file)
    assert ("lora_mid.weight" in names) == (kind == "tucker")
up, mid, down = (file[f"{conv}lora_{x}.weight"] for x in ("up", "mid", "down"))
factors = up[:, :, 0, 0], mid, down[:, :, 0, 0]
ours = file[conv + "alpha"] / 2 * torch.einsum("om,mnhw,ni->oihw", *factors)
theirs = next(p for p in network.loras if p.lora_name + "." == conv).get_diff_weight()[0]
assert torch.allclose(ours, theirs, atol=1e-5)
print("the formula above is LyCORIS's own change")
assert seen == {"plain": ("ValueError", "read"), "tucker": ("ValueError", "ValueError")}
PROGRAM
