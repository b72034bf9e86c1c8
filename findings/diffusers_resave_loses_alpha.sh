#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.24.0, safetensors 0.8.0.
#
# Load a LoRA of rank 4 with alpha 1 (so a quarter of B A is applied) and save it again with
# save_lora_weights, given peft's get_peft_model_state_dict: the new file holds A and B as they were
# and no alpha anywhere, neither as a tensor nor in its metadata.
# Every program then reads alpha as equal to the rank: the slider is four times too strong. Given
# unet_lora_adapter_metadata (peft's configuration, to be passed by hand), the alpha goes into the
# file's metadata, and diffusers reads it back.
#
# Seen:
#     applied at first: 0.25
#     saved again: no alpha tensors, metadata ['format']; applied then: 1.0
#     with unet_lora_adapter_metadata: no alpha tensors,
#         metadata ['format', 'lora_adapter_metadata']; applied then: 0.25
#
# It exits 0 while this is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 safetensors==0.8.0
venv/bin/python -W ignore - <<'PROGRAM'
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors import safe_open

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


def lora_file(layers, rank=lambda name: 4, alpha=lambda name: 1.0):
    """A random LoRA in the naming of kohya's trainer, for the layers that `layers` accepts."""
    tensors = {}
    for name, module in tiny_unet().named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and layers(name):
            out, *rest = module.weight.shape
            stem, r = "lora_unet_" + name.replace(".", "_"), rank(name)
            tensors[f"{stem}.lora_down.weight"] = torch.randn(r, *rest)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(out, r, *[1] * (len(rest) - 1))
            tensors[f"{stem}.alpha"] = torch.tensor(alpha(name))
    return tensors


unet = tiny_unet()
pipeline(unet).load_lora_weights(lora_file(lambda name: ".attn1.to_" in name), adapter_name="a")
print("applied at first:", *set(scales(unet).values()))
weights = get_peft_model_state_dict(unet, adapter_name="a")


def save_and_read(title, **options):
    """Save, read again; the names in the file's metadata, and the alpha / r applied then."""
    StableDiffusionXLPipeline.save_lora_weights("saved", unet_lora_layers=weights, **options)
    with safe_open("saved/pytorch_lora_weights.safetensors", "pt") as file:
        assert not any("alpha" in name for name in file.keys())
        metadata = sorted(file.metadata())
    again = tiny_unet()
    pipeline(again).load_lora_weights("saved")
    (applied,) = set(scales(again).values())
    print(f"{title}: no alpha tensors, metadata {metadata}; applied then: {applied}")
    return metadata, applied


assert save_and_read("saved again") == (["format"], 1.0)
config = unet.peft_config["a"].to_dict()
seen = save_and_read("with unet_lora_adapter_metadata", unet_lora_adapter_metadata=config)
assert seen == (["format", "lora_adapter_metadata"], 0.25)
PROGRAM
