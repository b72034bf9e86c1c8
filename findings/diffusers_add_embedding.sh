#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.24.0, safetensors 0.8.0.
#
# A LoRA file in kohya's naming that changes the UNet's add_embedding (two linear layers for size and
# pooled text): diffusers renames lora_unet_add_embedding_linear_1 to "add.embedding.linear", a
# layer that does not exist. A file of these two layers alone is refused; beside other layers they
# are left out with a warning. The time embedding, conv_in and conv_out are read. In diffusers' own
# naming (unet.add_embedding.linear_1.lora_A.weight) add_embedding is read, too.
#
# Seen:
#     kohya's naming, add_embedding alone: NoMatchingPeftModuleError
#     kohya's naming, attention and add_embedding: add_embedding 0 of 2
#     kohya's naming, attention and time_embedding: time_embedding 2 of 2
#     kohya's naming, attention and conv_in: conv_in 1 of 1
#     kohya's naming, attention and conv_out: conv_out 1 of 1
#     diffusers' naming, add_embedding alone: add_embedding 2 of 2
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


def read(tensors, end):
    """How many layers of this end of the network carry the LoRA, or the error's name."""
    unet = tiny_unet()
    try:
        pipeline(unet).load_lora_weights(dict(tensors), adapter_name="a")
    except Exception as error:
        return type(error).__name__
    ends = [n for n, m in tiny_unet().named_modules() if n.startswith(end) and hasattr(m, "weight")]
    return f"{end} {sum(name.startswith(end) for name in scales(unet))} of {len(ends)}"


add = "add_embedding"
seen = [read(lora_file(lambda name: name.startswith(add)), add)]
print("kohya's naming, add_embedding alone:", seen[-1])
for end in (add, "time_embedding", "conv_in", "conv_out"):
    seen += [read(lora_file(lambda name: name.startswith(end) or ".attn1.to_" in name), end)]
    print(f"kohya's naming, attention and {end}:", seen[-1])
theirs = {}
for n in (1, 2):
    layer = tiny_unet().get_submodule(f"{add}.linear_{n}")
    theirs[f"unet.{add}.linear_{n}.lora_A.weight"] = torch.randn(4, layer.in_features)
    theirs[f"unet.{add}.linear_{n}.lora_B.weight"] = torch.randn(layer.out_features, 4)
seen += [read(theirs, add)]
print("diffusers' naming, add_embedding alone:", seen[-1])
read_all = ["time_embedding 2 of 2", "conv_in 1 of 1", "conv_out 1 of 1", "add_embedding 2 of 2"]
assert seen == ["NoMatchingPeftModuleError", "add_embedding 0 of 2", *read_all]
PROGRAM
