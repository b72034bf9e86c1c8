"""Make tiny LyCORIS files on the miniature UNet, and the change of each layer as LyCORIS itself
computes it.

    python make.py miniature/model/unet        (writes beside this script)

Made with torch 2.13.0, diffusers 0.42.1, lycoris-lora 4.1.3, safetensors 0.8.0. Both LoRA files
carry the names that LyCORIS writes when it is used alone (prefix "lycoris_"):

    plain.safetensors     rank 1, alpha 0.5: an attention layer, two 3x3 convolutions, a 1x1 one
    tucker.safetensors    use_tucker=True, rank 2 and alpha 1 for 3x3 convolutions, which are then
                          three tensors: lora_down (r, in, 1, 1), lora_mid (r, r, 3, 3), lora_up
                          (out, r, 1, 1); the other two layers as in plain
    expected.safetensors  "plain.<layer>" and "tucker.<layer>", the layer named as in the UNet:
                          every 32nd row (output channel) of LyCORIS's get_diff_weight, float32
"""

import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
LAYERS = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",  # linear
    "down_blocks.0.resnets.0.conv1",  # 3x3
    "down_blocks.1.resnets.0.conv_shortcut",  # 1x1: no core tensor even with use_tucker
    "conv_in",  # 3x3, from 4 channels
]
unet = UNet2DConditionModel.from_pretrained(sys.argv[1])
by_lycoris_name = {"lycoris_" + name.replace(".", "_"): name for name, _ in unet.named_modules()}
patterns = [name.replace(".", r"\.") + "$" for name in LAYERS]
LycorisNetwork.apply_preset({"target_module": [], "target_name": patterns, "enable_conv": True})

expected = {}
for kind, tucker in (("plain", False), ("tucker", True)):
    torch.manual_seed(7)
    network = LycorisNetwork(
        unet,
        lora_dim=1,
        alpha=0.5,
        conv_lora_dim=2 if tucker else 1,
        conv_alpha=1.0 if tucker else 0.5,
        network_module="lora",
        use_tucker=tucker,
    )
    network.apply_to()
    with torch.no_grad():
        for part in network.loras:
            for tensor in part.parameters():
                tensor.copy_((torch.randn_like(tensor) * 0.1).half())  # exact in a float16 file
            change, _ = part.get_diff_weight()
            expected[f"{kind}.{by_lycoris_name[part.lora_name]}"] = change[::32].contiguous()
    path = HERE / f"{kind}.safetensors"
    network.save_weights(path, torch.float16, {"made_by": "lycoris-lora 4.1.3"})
    network.restore()
    for name, tensor in load_file(path).items():
        print(kind, name, tuple(tensor.shape), tensor.dtype)
save_file(expected, HERE / "expected.safetensors")
