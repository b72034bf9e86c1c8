"""How many operations a GPU would launch for SDXL's UNet:  python -m bench.operations

Ours, and diffusers' with peft: a forward pass, one with a slider on, and a training step (forward
and backward) of a rank-4 slider on the layers that train_text.py changes. Needs no GPU, and
computes nothing: tensors are on PyTorch's meta device, which has no fused attention, so each of the
140 attentions counts as the operations it is made of; on a GPU it is one. Views cost nothing and do
not count. Exit status 1 if ours are more than 4,200 with a slider on, or 8,000 in training."""

import re
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from bench.unet import add_peft, call_diffusers, empty, inputs
from sdxl_unet import UNet

VIEWS = "view|transpose|unsqueeze|expand|detach|split|slice|permute|select|alias|reshape"
LIMITS = {"forward, slider on": 4200, "training step": 8000}


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += not re.search(rf"{VIEWS}|\.t\.", str(function))
        return function(*args, **(kwargs or {}))


def count(predict, train: bool) -> int:
    x = [v.to("meta") for v in inputs()]
    with torch.set_grad_enabled(train), Count() as counted:
        loss = predict(*x).float().square().mean()
        if train:
            loss.backward()
    return counted.n


def ours() -> list[int]:
    unet = empty(UNet, device="meta")
    with torch.device("meta"):
        slider = lora.Slider(lora.target_layers(unet))
    plain = count(unet, False)
    slider.attach(unet)
    slider.scale = 1.0
    return [plain, count(unet, False), count(unet, True)]


def theirs() -> list[int]:
    import diffusers

    unet = empty(lambda config: diffusers.UNet2DConditionModel(**config), device="meta")
    predict = call_diffusers(unet)
    plain = count(predict, False)
    with torch.device("meta"):
        add_peft(unet)
    return [plain, count(predict, False), count(predict, True)]


def main():
    print("| full size, operations | ours | diffusers + peft |\n|---|---|---|")
    names, too_many = ("forward", "forward, slider on", "training step"), []
    for name, a, b in zip(names, ours(), theirs()):
        print(f"| {name} | {a:,} | {b:,} |")
        too_many += [name] * (a > LIMITS.get(name, a))
    if too_many:
        sys.exit(f"more than allowed: {', '.join(too_many)}")


if __name__ == "__main__":
    main()
