"""The miniature's judges in the places of CLIP, LPIPS and Inception (evaluate.Judges). They are small networks trained on the
drawn world alone: their numbers compare with one another, not with any that real judges give.

CLIP: the convolutional vision tower that the text encoders were trained against (train.py), with the second text encoder.
LPIPS: the judge's convolutions, every unit-length layer weighted alike. FID: the 160 numbers before the judge's last layer.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from extras.evaluate import Judges
from miniature.measure import Judge, judge, tensor
from sdxl import SDXL


def vision_tower() -> Judge:
    """pictures (B, 3, 128, 128) in [-1, 1] -> (B, 128), in the space of the second text encoder's pooled output."""
    tower = Judge(outputs=128)
    tower.load_state_dict(
        {k: v.float() for k, v in load_file(Path(__file__).parent / "vision.safetensors").items()}
    )
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def miniature_judges(model: SDXL | None = None) -> Judges:
    """model: the miniature, if it is loaded already, with its text encoders."""
    model, tower = model or SDXL.load(vae=False), vision_tower()
    known = {}  # prompts encoded before: training releases the text encoders

    @torch.no_grad()
    def clip_prompts(prompts):
        for p in set(prompts) - known.keys():
            known[p] = model.encode_prompt([p])[1][0].float().cpu()
        return torch.stack([known[p] for p in prompts])

    @torch.no_grad()
    def layers(images):
        x, out = tensor(images), []
        for layer in judge().features[:-1]:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                out.append(F.normalize(x, dim=1, eps=1e-10))
        return out

    seen = lambda net: torch.no_grad()(lambda images: net(tensor(images)))
    return Judges(
        seen(tower), clip_prompts, layers, seen(lambda x: judge().head[:2](judge().features(x)))
    )
