#!/usr/bin/env bash
# Seven questions to diffusers 0.33.1, 0.35.2, 0.38.0, 0.40.0 and 0.42.1, each with the peft and the
# transformers of its time (below), torch 2.13.0, on LoRA files in kohya's naming, and one in diffusers' own.
#
# The answers are alpha / r as applied, attention first, convolutions second. Right would be
#     mixed_alphas            [1.0], [0.25]   rank 4, alpha 4 in attention, else 1
#     mixed_ranks             [0.5], [0.25]   alpha 1, rank 2 in attention, else 4
#     mixed_ranks_no_alpha    [1.0], [1.0]    the same ranks, no alpha in the file
#     diffusers_naming        [1.0], [1.0]    the same A and B in diffusers' naming (unet....lora_A)
#     add_embedding           2               layers read of a file with these two
#     block_scales            [0.5]           mid resnets after {"unet": {"mid": 0.5}}
#     saved_again             [0.25]          alpha 1, rank 4, saved and read again
#
# Seen: mixed_ranks is right in all versions. mixed_ranks_no_alpha and diffusers_naming are wrong up
# to 0.38.0, where the layers of smaller rank come out [2.0], twice too strong, and right in 0.40.0
# and 0.42.1. All versions: mixed_alphas [0.25], [0.25]; add_embedding an error (ValueError, in 0.42.1
# NoMatchingPeftModuleError); block_scales [1.0]; saved_again [1.0].
#
# It exits 0 while this is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
cat > ask.py <<'PROGRAM'
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
import diffusers
from peft import get_peft_model_state_dict

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


def ask(question):
    try:
        return question()
    except Exception as error:
        return type(error).__name__


def load(tensors):
    unet = tiny_unet()
    pipe = pipeline(unet)
    pipe.load_lora_weights(dict(tensors), adapter_name="a")
    return unet, pipe


inside = lambda name: ".attn1.to_" in name or ".conv" in name
factor = lambda tensors, part: sorted({s for n, s in scales(load(tensors)[0]).items() if part in n})
without = lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("alpha")}
two_or_four = lambda name: 2 if "attn1" in name else 4
four_or_one = lambda name: 4.0 if "attn1" in name else 1.0


def mixed_alphas():
    tensors = lora_file(inside, alpha=four_or_one)
    return f"{factor(tensors, 'attn1')}, {factor(tensors, '.conv')}"


def mixed_ranks():
    tensors = lora_file(inside, two_or_four)
    return f"{factor(tensors, 'attn1')}, {factor(tensors, '.conv')}"


def mixed_ranks_no_alpha():
    tensors = without(lora_file(inside, two_or_four))
    return f"{factor(tensors, 'attn1')}, {factor(tensors, '.conv')}"


def diffusers_naming():
    tensors = without(lora_file(inside, two_or_four))
    theirs = {}
    for name, module in tiny_unet().named_modules():
        stem = "lora_unet_" + name.replace(".", "_")
        if f"{stem}.lora_up.weight" in tensors:
            theirs[f"unet.{name}.lora_A.weight"] = tensors[f"{stem}.lora_down.weight"]
            theirs[f"unet.{name}.lora_B.weight"] = tensors[f"{stem}.lora_up.weight"]
    return f"{factor(theirs, 'attn1')}, {factor(theirs, '.conv')}"


def add_embedding():
    return len(scales(load(lora_file(lambda name: name.startswith("add_embedding")))[0]))


def block_scales():
    unet, pipe = load(lora_file(inside))
    pipe.set_adapters("a", {"unet": {"mid": 0.5}})
    return sorted({4 * s for n, s in scales(unet).items() if n.startswith("mid_block.resnets")})


def saved_again():
    unet, _ = load(lora_file(inside))
    weights = get_peft_model_state_dict(unet, adapter_name="a")
    StableDiffusionXLPipeline.save_lora_weights("saved", unet_lora_layers=weights)
    again = tiny_unet()
    pipeline(again).load_lora_weights("saved")
    return sorted(set(scales(again).values()))


questions = [mixed_alphas, mixed_ranks, mixed_ranks_no_alpha, diffusers_naming, add_embedding]
for question in [*questions, block_scales, saved_again]:
    print(f"    {question.__name__}: {ask(question)}")
PROGRAM
while read -r diffusers peft transformers; do
    echo "diffusers $diffusers, peft $peft, transformers $transformers"
    venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0 \
        "diffusers==$diffusers" "peft==$peft" "transformers==$transformers"
    venv/bin/python -W ignore ask.py < /dev/null | tee seen.txt
    grep -qF "mixed_alphas: [0.25], [0.25]" seen.txt
    grep -qF "mixed_ranks: [0.5], [0.25]" seen.txt
    case $diffusers in 0.4*) small=1.0 ;; *) small=2.0 ;; esac
    grep -qF "mixed_ranks_no_alpha: [$small], [1.0]" seen.txt
    grep -qF "diffusers_naming: [$small], [1.0]" seen.txt
    grep -q "add_embedding: .*Error" seen.txt
    grep -qF "block_scales: [1.0]" seen.txt
    grep -qF "saved_again: [1.0]" seen.txt
done <<'VERSIONS'
    0.33.1 0.15.2 4.51.3
    0.35.2 0.17.1 4.56.2
    0.38.0 0.19.1 4.56.2
    0.40.0 0.20.0 5.24.0
    0.42.1 0.21.2 5.24.0
VERSIONS
