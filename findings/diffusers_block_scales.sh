#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.24.0, safetensors 0.8.0.
#
# set_adapters takes scales by block: {"unet": {"mid": 0.5}}. They are in force in the attention
# blocks, but only in some of the rest: the middle block's resnets stay at 1, and so do those of the
# blocks without attention (SDXL's first down block and last up block), their down- and
# upsamplers included. In blocks with attention, resnets follow the attention of the same number.
#
# Seen, as a share of the LoRA's full strength, after {"down": 0.5, "mid": 0.5, "up": 0.5}:
#     down_blocks.0 (no attention): 1.0
#     down_blocks.1.resnets: 0.5
#     down_blocks.1.attentions: 0.5
#     mid_block.resnets: 1.0
#     mid_block.attentions: 0.5
#     up_blocks.0.resnets: 0.5
#     up_blocks.0.attentions: 0.5
#     up_blocks.1 (no attention): 1.0
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
pipe = pipeline(unet)
inside = lambda name: ".attn1.to_" in name or ".conv" in name or "samplers" in name
pipe.load_lora_weights(lora_file(inside), adapter_name="a")
full = scales(unet)
pipe.set_adapters("a", {"unet": {"down": 0.5, "mid": 0.5, "up": 0.5}})
now = scales(unet)
expected = {
    "down_blocks.0 (no attention)": 1.0,
    "down_blocks.1.resnets": 0.5,
    "down_blocks.1.attentions": 0.5,
    "mid_block.resnets": 1.0,
    "mid_block.attentions": 0.5,
    "up_blocks.0.resnets": 0.5,
    "up_blocks.0.attentions": 0.5,
    "up_blocks.1 (no attention)": 1.0,
}
for where, share in expected.items():
    seen = {now[n] / full[n] for n in full if n.startswith(where.split(" ")[0] + ".")}
    print(f"{where}: {', '.join(map(str, seen))}")
    assert seen == {share}, where
PROGRAM
