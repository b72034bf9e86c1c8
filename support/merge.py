"""Sliders and LoRAs added to the weights for good, and what is left of them there.

bfloat16 holds 8 bits of a number, so W + D keeps nothing of a D that is under W's last bit, and a
rounded one of a D just above it. Summed over a layer a share of D survives; the rest is noise."""

from collections import defaultdict

import torch
from torch import nn

from formats import slider_files
from formats.slider_files import Layer
from lora import add_up, down
from support import graphs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Rounding:
    """Adds changes to weights in float32, and measures what each dtype keeps of them."""

    def __init__(self):
        self.products = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def add(self, W, change, dtype=None) -> torch.Tensor:
        """W + change, rounded once to `dtype` (W's own if None). change: float32, of W's shape."""
        exact = W.float() + change.view(W.shape)
        stored = dtype or W.dtype  # one that DTYPES does not name, perhaps
        for name, kind in (DTYPES | {str(stored).removeprefix("torch."): stored}).items():
            made = (exact.to(kind).float() - W.float()).flatten()
            wanted = change.flatten()
            dots = [made @ wanted, wanted @ wanted, made @ made]
            self.products[name] += torch.stack(dots).cpu().double()  # MPS has no float64
        return exact.to(stored)

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
        lost = f"{dtype} keeps {self.kept(dtype):.0%} of this change"
        lost += f" (cosine {self.cosine(dtype):.2f})"
        better = [name for name in ("float16", "float32") if self.kept(name) >= 0.95]
        if not better:
            return f"{lost}: it is too small for any dtype"
        return f"{lost}; {option} {better[0]} keeps {self.kept(better[0]):.0%}"


def by_layer(unet: nn.Module, pairs) -> dict[Layer, list]:
    """pairs (slider, scale) -> {layer of `unet`: [(Delta, scale)]}. ValueError if one does not
    fit."""
    deltas: dict[Layer, list] = {}
    for slider, scale in pairs:
        for part, layer in slider.layers_of(unet):
            deltas.setdefault(layer, []).append((part.delta(), scale))
    return deltas


def merge_files(model, files) -> Rounding:
    """W <- W + sum_i weight_i (alpha_i / r_i) B_i A_i for good, of LoRA files, (path, weight), in
    the UNet and in both text encoders of `model`: in float32, rounded once. Returns what each dtype
    keeps of the change. ValueError, naming the file, for one that does not fit."""
    unet, encoders = model.unet, model.text_encoders
    layers = slider_files.layers_by_kohya_name(unet) | slider_files.text_layers(encoders)
    deltas: dict[Layer, list] = {}
    for path, weight in files:
        for stem, delta in slider_files.read(path, unet, encoders).deltas.items():
            deltas.setdefault(layers[stem][1], []).append((delta, weight))
    return add_to_weights(deltas)


@torch.no_grad()
def add_to_weights(deltas: dict[Layer, list]) -> Rounding:
    """deltas: {layer: [(Delta, scale)]}."""
    rounding = Rounding()
    for layer, weighted in deltas.items():
        W = layer.weight
        A, B = (x.to(W.device) for x in slider_files.concatenate(weighted))
        changed = rounding.add(W, slider_files.delta_weight(A, B))
        layer.weight = nn.Parameter(changed, requires_grad=False)
    return rounding


class Composed:
    """Several sliders at fixed scales as one change of `unet`: on at any scale but 0, off at 0.

    In each layer in the cheaper of two forms: one low-rank change; or, where the ranks add up to
    much and W's dtype keeps 99% of the change, W + sum_i scale_i (alpha_i / r_i) B_i A_i in W's
    place. The latter costs no time however many sliders there are, but memory for a second W."""

    attached = True  # from its construction on

    def __init__(self, unet: nn.Module, pairs, only_low_rank: bool = False):
        """pairs: (slider, scale), sliders not attached. only_low_rank: where another Composed is on
        the same UNet, as only one W can stand in a layer. ValueError if a slider does not fit."""
        self._scale, self.replaced = 0.0, []
        self.handles = [graphs.note_attached(unet, self)]
        for layer, weighted in by_layer(unet, pairs).items():
            A, B = slider_files.concatenate(weighted)
            W, change = layer.weight, None
            if not only_low_rank and 4 * len(A) > min(W.shape[:2]):
                change = slider_files.delta_weight(A, B)
                changed = (W.float() + change).to(W.dtype)
                lost = (changed.float() - W.float() - change).norm()
            if change is not None and lost <= 0.01 * change.norm():
                self.replaced.append((layer, W, nn.Parameter(changed, requires_grad=False)))
            else:
                hook = self._hook(A.to(W.dtype), B.to(W.dtype))
                self.handles.append(layer.register_forward_hook(hook))

    def _hook(self, A, B):
        return lambda layer, x, y: add_up(y, down(x[0], A, layer), B) if self._scale else None

    @property
    def scale(self):
        return self._scale

    @scale.setter
    def scale(self, value):
        self._scale = value
        for layer, W, changed in self.replaced:
            layer.weight = changed if value else W

    def detach(self):
        self.scale = 0.0
        for handle in self.handles:
            handle.remove()
