#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0, transformers 5.24.0, safetensors 0.8.0.
#
# What peft's adapter_model.safetensors does not say: it holds A and B, no alpha, and no metadata of
# use. alpha, and with use_rslora that the factor is alpha / sqrt(r) in place of alpha / r, stand in
# adapter_config.json alone. With lora_bias=True there is a third tensor, lora_B.bias, added
# to the layer's output times the same factor: a reader of A and B alone loses it.
#
# Seen (rank 4, alpha 1):
#     plain: in the file ['lora_A.weight', 'lora_B.weight'], applied 0.25
#     use_rslora: in the file ['lora_A.weight', 'lora_B.weight'], applied 0.5
#     lora_bias: in the file ['lora_A.weight', 'lora_B.bias', 'lora_B.weight'], applied 0.25
#     the bias is added times 0.25
#
# It exits 0 while this is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
    torch==2.13.0 peft==0.21.2 transformers==5.24.0 safetensors==0.8.0
venv/bin/python -W ignore - <<'PROGRAM'
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

expected = {"plain": 0.25, "use_rslora": 0.5, "lora_bias": 0.25}
for kind, factor in expected.items():
    option = {} if kind == "plain" else {kind: True}
    config = LoraConfig(r=4, lora_alpha=1, init_lora_weights=False, target_modules=["0"], **option)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
    model.save_pretrained("saved")
    layer = model.base_model.model[0]
    with safe_open("saved/adapter_model.safetensors", "pt") as file:
        names = sorted(name.removeprefix("base_model.model.0.") for name in file.keys())
        assert file.metadata() == {"format": "pt"}
    print(f"{kind}: in the file {names}, applied {layer.scaling['default']}")
    assert layer.scaling["default"] == factor and ("lora_B.bias" in names) == (kind == "lora_bias")
with torch.no_grad():
    added = layer(torch.zeros(1, 16)) - layer.base_layer(torch.zeros(1, 16))
    factor = (added / layer.lora_B["default"].bias).mean().item()
print(f"the bias is added times {factor:.2f}")
assert abs(factor - 0.25) < 1e-3
PROGRAM
