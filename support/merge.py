"""Sliders and LoRAs added to the weights for good, and what is left of them there.

bfloat16 holds 8 digits of a number, so W + D keeps nothing of a D that is under W's last digit,
and a rounded one of a D just above it. Summed over a layer a share of D survives; the rest is
noise."""

from collections import defaultdict

import torch
from torch import nn

import lora
from formats import slider_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Rounding:
    """Adds changes to weights in float32, and measures what each dtype keeps of them."""

    def __init__(self):
        self.products = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def add(self, W, change, dtype=None) -> torch.Tensor:
        """W + change, rounded once to `dtype` (W's own if None). change: float32, of W's shape."""
        exact = W.float() + change.view(W.shape)
        for name, kind in DTYPES.items():
            made = (exact.to(kind).float() - W.float()).flatten()
            wanted = change.flatten()
            dots = [made @ wanted, wanted @ wanted, made @ made]
            self.products[name] += torch.stack(dots).double().cpu()
        return exact.to(dtype or W.dtype)

    def kept(self, dtype: str) -> float:
        """The share of the change that is made: 1 is all of it."""
        dot, wanted, _ = self.products[dtype].tolist()
        return dot / wanted if wanted else 1.0

    def cosine(self, dtype: str) -> float:
        """Between what is made and what was wanted: under 1, the difference is noise."""
        dot, wanted, made = self.products[dtype].tolist()
        return dot / (wanted * made) ** 0.5 if wanted * made else 1.0

    def warning(self, dtype: str, option: str) -> str | None:
        """One line where `dtype` keeps less than 95% of the change; it names the first dtype that
        keeps more, to be chosen by `option`."""
        if self.kept(dtype) >= 0.95:
            return None
        better = next(name for name in ("float16", "float32") if self.kept(name) >= 0.95)
        lost = f"{dtype} keeps {self.kept(dtype):.0%} of this change"
        return (
            f"{lost} (cosine {self.cosine(dtype):.2f}); "
            f"{option} {better} keeps {self.kept(better):.0%}"
        )


@torch.no_grad()
def merge(unet: nn.Module, pairs) -> Rounding:
    """W <- W + sum_i scale_i (alpha_i / r_i) B_i A_i for good, in float32 and rounded once. pairs:
    (lora.Slider, scale). Returns what each dtype keeps of the change."""
    rounding = Rounding()
    for layer, weighted in lora.by_layer(unet, pairs).items():
        change = slider_files.delta_weight(*slider_files.concatenate(weighted))
        layer.weight = nn.Parameter(rounding.add(layer.weight, change), requires_grad=False)
    return rounding
