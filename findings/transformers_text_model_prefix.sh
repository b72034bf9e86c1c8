#!/usr/bin/env bash
# transformers 4.56.2 and 5.24.0, peft 0.21.2, torch 2.13.0, safetensors 0.8.0.
#
# SDXL's two text encoders are a CLIPTextModel and a CLIPTextModelWithProjection. transformers 4
# names the layers of both text_model.encoder..., transformers 5 those of the first encoder...,
# without text_model., and of the second as before; save_pretrained writes them so, too. So a peft
# adapter that was trained on the first encoder with transformers 4 is loaded with 5 without an
# error, and changes nothing: its names are only returned as unexpected. That of the second works.
#
# Seen:
#     4.56.2 CLIPTextModel: module text_model.encoder..., file text_model.encoder...
#     4.56.2 CLIPTextModelWithProjection: module text_model.encoder..., file text_model.encoder...
#     5.24.0 CLIPTextModel: module encoder..., file encoder...
#     5.24.0 CLIPTextModelWithProjection: module text_model.encoder..., file text_model.encoder...
#     5.24.0 CLIPTextModel: adapter of 4.56.2: 2 names unexpected, applied False
#     5.24.0 CLIPTextModelWithProjection: adapter of 4.56.2: 0 names unexpected, applied True
#
# It exits 0 while this is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
    torch==2.13.0 peft==0.21.2 transformers==5.24.0 safetensors==0.8.0
venv/bin/pip install --quiet --disable-pip-version-check --target old \
    transformers==4.56.2 safetensors==0.8.0
cat > look.py <<'PROGRAM'
import sys, tempfile

import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

config = CLIPTextConfig(
    vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    projection_dim=8,
)
layer = "encoder.layers.0.self_attn.q_proj"
for kind in (CLIPTextModel, CLIPTextModelWithProjection):
    model, said = kind(config), f"{transformers.__version__} {kind.__name__}"
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        in_file = [n for n in load_file(f"{saved}/model.safetensors") if n.endswith(f"{layer}.weight")]
    in_module = [n for n, _ in model.named_modules() if n.endswith(layer)]
    short = lambda names: names[0].split("encoder.")[0] + "encoder..."
    print(f"{said}: module {short(in_module)}, file {short(in_file)}")
    if "peft" in sys.argv:
        import peft

        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        name = f"base_model.model.text_model.{layer}"  # as transformers 4 has it
        weights = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
        result = peft.set_peft_model_state_dict(adapted, weights)
        applied = any(bool((p == 1).all()) for n, p in adapted.named_parameters() if "lora_B" in n)
        unexpected = len(result.unexpected_keys)
        print(f"{said}: adapter of 4.56.2: {unexpected} names unexpected, applied {applied}")
PROGRAM
{
    PYTHONPATH=old venv/bin/python -W ignore look.py 2>/dev/null
    venv/bin/python -W ignore look.py peft 2>/dev/null
} | tee seen
both="module text_model.encoder..., file text_model.encoder..."
cat > expected <<EXPECTED
4.56.2 CLIPTextModel: $both
4.56.2 CLIPTextModelWithProjection: $both
5.24.0 CLIPTextModel: module encoder..., file encoder...
5.24.0 CLIPTextModel: adapter of 4.56.2: 2 names unexpected, applied False
5.24.0 CLIPTextModelWithProjection: $both
5.24.0 CLIPTextModelWithProjection: adapter of 4.56.2: 0 names unexpected, applied True
EXPECTED
diff expected seen
