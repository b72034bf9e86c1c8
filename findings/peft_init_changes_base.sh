#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0, transformers 5.24.0, safetensors 0.8.0.
#
# With init_lora_weights="pissa" or "olora", peft takes the LoRA's start out of the base: the weight
# becomes W - (alpha / r) B A, so that base and LoRA together are W. The file that it saves
# (adapter_model.safetensors) holds A and B alone; added to the unchanged W, as every other program
# would do, they change the model although nothing was trained. Only adapter_config.json beside it
# says so ("init_lora_weights"), and peft itself, which reads that file, is right again.
#
# Seen, for an untrained LoRA (the right change is 0 in all cases; "some" means clearly not 0):
#     pissa: in the file ['lora_A', 'lora_B']; W + (alpha / r) B A is off by some; peft again: 0
#     olora: in the file ['lora_A', 'lora_B']; W + (alpha / r) B A is off by some; peft again: 0
#     True: in the file ['lora_A', 'lora_B']; W + (alpha / r) B A is off by 0; peft again: 0
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
import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

torch.manual_seed(0)
W = torch.randn(16, 16) / 4


def model():
    linear = torch.nn.Linear(16, 16, bias=False)
    linear.weight.data = W.clone()
    return torch.nn.Sequential(linear)


def word(x):
    return "0" if x < 1e-5 else "some" if x > 0.1 else str(x)


for init, expected in (("pissa", "some"), ("olora", "some"), (True, "0")):
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=init, target_modules=["0"])
    get_peft_model(model(), config).save_pretrained("saved")
    file = load_file("saved/adapter_model.safetensors")
    A, B = (file[f"base_model.model.0.lora_{x}.weight"] for x in "AB")
    off = word((B @ A).norm())  # alpha / r is 1
    layer = PeftModel.from_pretrained(model(), "saved").base_model.model[0]
    again = word((layer.base_layer.weight + layer.get_delta_weight("default") - W).norm())
    names = sorted(name.split(".")[-2] for name in file)
    print(f"{init}: in the file {names}; W + (alpha / r) B A is off by {off}; peft again: {again}")
    assert (off, again, names) == (expected, "0", ["lora_A", "lora_B"])
    assert json.load(open("saved/adapter_config.json"))["init_lora_weights"] == init
PROGRAM
