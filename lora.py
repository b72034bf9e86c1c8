"""Low-rank adaptors (LoRA, Hu et al. 2022): the slider itself.

A slider adds a low-rank change to each chosen layer W of the frozen UNet. One number turns it up:

    y = W x  +  scale * (alpha / r) * B A x         A: (r, in), B: (out, r), B = 0 at the start

`scale` is the knob that is turned at inference (the paper's alpha); `alpha` is LoRA's constant, set
in training. A forward hook adds the term, so the UNet's modules and weights are never touched: a
detached UNet is the untouched UNet, bit for bit, and any number of sliders can be attached to it.
"""

import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from formats import slider_files
from formats.slider_files import Layer, kohya_name, layers_by_kohya_name

# The layers that a slider changes, by what their names contain. As in the paper's code, all sets
# stay within attention (attn1: self-, attn2: cross-attention), resnets and up/downsamplers.
LAYERS = {
    "noxattn": r"\.attn1\.|\.resnets\.|samplers\.",  # all but cross-attention: the paper's default
    "attn": r"\.attn[12]\.",
    "xattn": r"\.attn2\.",
    "all": r"\.attn[12]\.|\.resnets\.|samplers\.",
}


def target_layers(unet: nn.Module, layers: str = "noxattn", conv: bool = True) -> dict[str, Layer]:
    """{name: Linear or Conv2d} of the layer set `layers`, a key of LAYERS. conv=False leaves out
    convolutions. ValueError for an unknown set."""
    if layers not in LAYERS:
        raise ValueError(f"layers: {layers!r} is not one of {', '.join(LAYERS)}")
    kinds = Layer if conv else nn.Linear
    modules = unet.named_modules()
    return {n: m for n, m in modules if isinstance(m, kinds) and re.search(LAYERS[layers], n)}


class LowRank(nn.Module):
    """(alpha / r) B A for one layer. A convolution's A has its kernel and stride; B is 1x1."""

    def __init__(self, layer: Layer, rank: int, alpha: float):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            kernel = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_down = nn.Conv2d(layer.in_channels, rank, *kernel, bias=False)  # type: ignore
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)  # type: ignore
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)  # type: ignore
        nn.init.kaiming_uniform_(self.lora_down.weight, a=1)
        nn.init.zeros_(self.lora_up.weight)  # B = 0: an untrained slider changes nothing
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.multiplier = float(alpha) / rank  # alpha / r, as a number: no tensor is read per call

    def forward(self, x, rank_scale=None):
        """(alpha / r) B A x; with rank_scale (batch, r), (alpha / r) B diag(rank_scale) A x.

        In x's dtype. A and B themselves are float32 in training, which keeps small steps."""
        A, B = self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype)
        return self.multiplier * low_rank(x, A, B, self.lora_down, rank_scale)

    def delta(self) -> slider_files.Delta:
        """What a slider file holds of it: A, B, alpha."""
        A, B = self.lora_down.weight.detach(), self.lora_up.weight.detach()
        return slider_files.Delta(A, B, self.multiplier * len(A))


def low_rank(x, A, B, layer, rank_scale=None):
    """B A x: (b, ..., in) -> (b, ..., r) -> (b, ..., out). Of a convolution, with `layer`'s stride
    and padding: (b, in, h, w) -> (b, r, h', w') -> (b, out, h', w'). rank_scale: (b, r) or None."""
    conv = A.ndim == 4
    h = F.conv2d(x, A, None, layer.stride, layer.padding) if conv else F.linear(x, A)
    if rank_scale is not None:
        shape = (*rank_scale.shape, 1, 1) if conv else (len(h), *[1] * (h.ndim - 2), -1)
        h = h * rank_scale.to(h.dtype).view(shape)
    return F.conv2d(h, B) if conv else F.linear(h, B)


class Slider(nn.Module):
    """The low-rank changes of one concept. Its state_dict holds what its file holds:
    <layer>.lora_down.weight (A), <layer>.lora_up.weight (B), <layer>.alpha.

    scale: a number, or a tensor (batch,) with one for each sample, or (batch, r) with one for each
    sample and rank. At 0 it costs nothing: the hooks return at once.
    """

    def __init__(self, layers: dict[str, Layer], rank: int | dict = 4, alpha: float | dict = 1.0):
        """layers: from target_layers. rank, alpha: one for all layers, or a dict by layer name.
        ValueError for one rank that not every layer can have."""
        super().__init__()
        pick = lambda value, name: value[name] if isinstance(value, dict) else value
        full = min((min(len(m.weight), m.weight[0].numel()) for m in layers.values()), default=0)
        if not isinstance(rank, dict) and not 1 <= rank <= full:
            raise ValueError(f"rank: {rank} is not between 1 and {full}, a layer's full rank")
        for name, layer in layers.items():
            self.add_module(kohya_name(name), LowRank(layer, pick(rank, name), pick(alpha, name)))
        self.scale, self.attached = 0.0, False
        self.handles: list = []
        self.metadata: dict[str, str] = {}  # of the file that it was loaded from

    def layers_of(self, unet: nn.Module) -> list[tuple[LowRank, Layer]]:
        """Each LowRank with the layer of `unet` that it changes. ValueError if one is missing."""
        layers = layers_by_kohya_name(unet)
        if missing := [name for name, _ in self.named_children() if name not in layers]:
            raise ValueError(f"this model lacks {len(missing)} layers of it, e.g. {missing[0]}")
        return [(part, layers[name][1]) for name, part in self.named_children()]  # type: ignore

    def attach(self, unet: nn.Module) -> "Slider":
        """Add the change to `unet`'s layers, at `scale`. ValueError if one is missing."""
        for part, layer in self.layers_of(unet):
            self.handles.append(layer.register_forward_hook(self._hook(part)))
        self.attached = True
        return self

    def _hook(self, part: LowRank):
        def add(layer, inputs, y):  # y = W x
            scale, (x,) = self.scale, inputs
            if not torch.is_tensor(scale):
                return y + scale * part(x) if scale else None  # None: y stays as it is
            if scale.ndim == 2:  # (batch, r)
                return y + part(x, scale)
            return y + scale.to(y.dtype).view(-1, *[1] * (y.ndim - 1)) * part(x)  # (batch,)

        return add

    def detach(self):
        """Remove the change; the UNet is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.attached = [], False

    @contextmanager
    def at(self, scale):
        """with slider.at(2.0): ... sets the scale inside, and restores it afterwards."""
        before, self.scale = self.scale, scale
        try:
            yield self
        finally:
            self.scale = before


def by_layer(unet: nn.Module, pairs) -> dict[Layer, list]:
    """pairs (slider, scale) -> {layer of `unet`: [(Delta, scale)]}. ValueError if one does not
    fit."""
    deltas: dict[Layer, list] = {}
    for slider, scale in pairs:
        for part, layer in slider.layers_of(unet):
            deltas.setdefault(layer, []).append((part.delta(), scale))
    return deltas


class Composed:
    """Several sliders at fixed scales as one change of `unet`: on at any scale but 0, off at 0.

    In each layer in the cheaper of two forms: one low-rank change; or, where the ranks add up to
    much and W's dtype keeps 99% of the change, W + sum_i scale_i (alpha_i / r_i) B_i A_i in W's
    place. The latter costs no time however many sliders there are, but memory for a second W."""

    attached = True  # from its construction on

    def __init__(self, unet: nn.Module, pairs, only_low_rank: bool = False):
        """pairs: (slider, scale), sliders not attached. only_low_rank: where another Composed is on
        the same UNet, as only one W can stand in a layer. ValueError if a slider does not fit."""
        self._scale, self.handles, self.replaced = 0.0, [], []
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
        return lambda layer, x, y: y + low_rank(x[0], A, B, layer) if self._scale else None

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


def save(path, slider: Slider, metadata: dict, **options):
    """Write fp16 safetensors in kohya's naming. metadata: JSON values; options:
    slider_files.write's."""
    deltas = {name: part.delta() for name, part in slider.named_children()}  # type: ignore
    slider_files.write(path, deltas, metadata, **options)


def load(path, unet: nn.Module) -> Slider:
    """Read a slider or LoRA file of any common naming, for `unet`; not attached yet. Rank, alpha
    and layers come from the file. ValueError, naming the file, for one that does not fit."""
    file, known = slider_files.read(path, unet), layers_by_kohya_name(unet)
    by_name = {known[stem][0]: delta for stem, delta in file.deltas.items()}
    layers = dict(known[stem] for stem in file.deltas)
    ranks = {name: len(delta.down) for name, delta in by_name.items()}
    slider = Slider(layers, ranks, {name: delta.alpha for name, delta in by_name.items()})
    for stem, delta in file.deltas.items():
        part = getattr(slider, stem)
        part.lora_down.weight.data, part.lora_up.weight.data = delta.down, delta.up
    slider.metadata = file.metadata
    return slider.requires_grad_(False).to(next(unet.parameters()))
