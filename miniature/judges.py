"""The miniature's judges in the places of CLIP, LPIPS and Inception (metrics.Judges). They are
small networks trained on the drawn world alone: their numbers compare with one another, not with
any that real judges give.

CLIP: the image encoder that the text encoders were trained against (train.py), with the second
text encoder. LPIPS: the judge's convolutions, every unit-length layer weighted alike. FID: the 160
numbers before the judge's last layer."""

import torch
import torch.nn.functional as F
from torch import nn

from extras.metrics import Judges
from miniature.measure import judge, tensor
from sdxl import MINIATURE, SDXL
from support.clip import load_encoder


def miniature_judges(model: SDXL | None = None) -> Judges:
    """model: the miniature, if it is loaded already, with its text encoders."""
    model, encoder = model or SDXL.load(vae=False), load_encoder(MINIATURE / "image_encoder")
    encoded = {}  # prompts encoded before: training releases the text encoders

    @torch.no_grad()
    def clip_pictures(images):
        return encoder(tensor(images))

    @torch.no_grad()
    def clip_prompts(prompts):
        for prompt in set(prompts) - encoded.keys():
            encoded[prompt] = model.encode_prompt([prompt])[1][0].float().cpu()
        return torch.stack([encoded[prompt] for prompt in prompts])

    @torch.no_grad()
    def layers(images):
        x, out = tensor(images), []
        for layer in judge().features[:-1]:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                out.append(F.normalize(x, dim=1, eps=1e-10))
        return out

    @torch.no_grad()
    def features(images):
        return judge().head[:2](judge().features(tensor(images)))

    return Judges(clip_pictures, clip_prompts, layers, features)
