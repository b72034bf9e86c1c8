"""Make tiny peft folders on the miniature UNet, and the change of each layer as peft computes it.

    python make.py miniature/model/unet        (writes beside this script)

Made with torch 2.13.0, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.0. Each folder holds what
peft's save_pretrained writes: adapter_model.safetensors (A and B alone) and adapter_config.json
(ranks, alphas).

    pattern/  r 2, lora_alpha 1; rank_pattern gives to_q rank 1, alpha_pattern gives conv1 alpha 4
    rslora/   r 4, lora_alpha 2, use_rslora: alpha / sqrt(r) = 1 in place of alpha / r = 0.5;
              rank_pattern gives to_q rank 1, so that 2 / sqrt(1) = 2 is in force there
    pissa/    r 1, init_lora_weights "pissa": peft changes the base weights at the start, so A and B
              of this file mean nothing on the unchanged base; adapter_config.json alone says so
    expected.safetensors  "<folder>.<layer>": every 32nd row (output channel) of get_delta_weight,
              float32; of pattern and rslora
"""

import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, SHORTCUT = "down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"
LAYERS = [Q, CONV, SHORTCUT]
CONFIGS = {
    "pattern": LoraConfig(
        r=2, lora_alpha=1, rank_pattern={Q: 1}, alpha_pattern={CONV: 4}, target_modules=LAYERS
    ),
    "rslora": LoraConfig(
        r=4, lora_alpha=2, use_rslora=True, rank_pattern={"to_q": 1}, target_modules=LAYERS
    ),
    "pissa": LoraConfig(r=1, lora_alpha=1, init_lora_weights="pissa", target_modules=[Q]),
}

expected = {}
for folder, config in CONFIGS.items():
    torch.manual_seed(7)
    unet = UNet2DConditionModel.from_pretrained(sys.argv[1])
    model = get_peft_model(unet, config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_" in name and folder != "pissa":
                tensor.copy_((torch.randn_like(tensor) * 0.1).half())
    for layer in LAYERS if folder != "pissa" else []:
        change = unet.get_submodule(layer).get_delta_weight("default")
        expected[f"{folder}.{layer}"] = change[::32].detach().contiguous()
        print(folder, layer, "scale", unet.get_submodule(layer).scaling["default"])
    model.half().save_pretrained(HERE / folder)
    (HERE / folder / "README.md").unlink(missing_ok=True)
    for name, tensor in load_file(HERE / folder / "adapter_model.safetensors").items():
        print(folder, name, tuple(tensor.shape), tensor.dtype)
save_file(expected, HERE / "expected.safetensors")
