#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.24.0, safetensors 0.8.0.
#
# A LoRA file in kohya's naming holds one alpha per layer. Where they differ, diffusers loses those
# of attention projections (to_q, to_k, to_v, to_out): they take the alpha that is most frequent in
# the file. Other layers keep their own. Nothing but a warning of peft's about unmatched keys of an
# "alpha_pattern" tells. With one alpha in the whole file, or with differing ranks and one alpha,
# every layer is right.
#
# Seen:
#     alpha 4 in attention, 1 elsewhere (rank 4):
#         attention 0.25 (1.0 is right), others 0.25 (0.25 is right)
#     alpha 1, rank 2 in attention, 4 elsewhere:
#         attention 0.5 (0.5 is right), others 0.25 (0.25 is right)
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


def read(title, rank, alpha):
    """Load such a file; print alpha / r of attention and of other layers, applied and right."""
    unet = tiny_unet()
    layers = lambda name: ".attn1.to_" in name or ".conv" in name
    pipeline(unet).load_lora_weights(lora_file(layers, rank, alpha), adapter_name="a")
    seen = scales(unet)
    words = []
    for kind in ("attention", "others"):
        names = [n for n in seen if ("attn1" in n) == (kind == "attention")]
        (applied,) = {seen[n] for n in names}
        (right,) = {alpha(n) / rank(n) for n in names}
        words.append(f"{kind} {applied} ({right} is right)")
    print(f"{title}:", ", ".join(words), sep="\n    ")
    return words


four_or_one = lambda name: 4.0 if "attn1" in name else 1.0
mixed = read("alpha 4 in attention, 1 elsewhere (rank 4)", lambda name: 4, four_or_one)
two_or_four = lambda name: 2 if "attn1" in name else 4
ranks = read("alpha 1, rank 2 in attention, 4 elsewhere", two_or_four, lambda name: 1.0)
assert mixed == ["attention 0.25 (1.0 is right)", "others 0.25 (0.25 is right)"]
assert ranks == ["attention 0.5 (0.5 is right)", "others 0.25 (0.25 is right)"]
PROGRAM
