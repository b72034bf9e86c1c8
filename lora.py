"""Low-rank adaptors (LoRA, Hu et al. 2022): the slider itself.

A slider adds a low-rank change to each chosen layer W of the frozen UNet. One number turns it up:

    y = W x  +  scale * (alpha / r) * B A x         A: (r, in), B: (out, r), B = 0 at the start

`scale` is the knob that is turned at inference (the paper's alpha); `alpha` is LoRA's constant, set
in training. A forward hook adds the term, so the UNet's own weights are never touched: detached, it
is bit for bit what it was, and any number of sliders can be attached to it.
"""

import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from formats import slider_files
from formats.slider_files import Layer, kohya_name, layers_by_kohya_name
from support import graphs

# The layers that a slider changes, by what their names contain. As in the paper's code, all sets
# stay within attention (attn1: self-, attn2: cross-attention), resnets and up/downsamplers.
LAYERS = {
    "noxattn": r"\.attn1\.|\.resnets\.|samplers\.",  # all but cross-attention: the paper's default
    "attn": r"\.attn[12]\.",
    "xattn": r"\.attn2\.",
    "all": r"\.attn[12]\.|\.resnets\.|samplers\.",  # the paper's code calls it full
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
    """A, B, alpha of a layer; Slider._hook is the forward. A conv's A has its kernel, B is 1x1."""

    def __init__(self, layer: Layer, rank: int, alpha: float):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            kernel = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_down = nn.Conv2d(layer.in_channels, rank, *kernel, bias=False)  # type: ignore
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)  # type: ignore
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)  # type: ignore
        nn.init.kaiming_uniform_(self.lora_down.weight, a=1)  # as the paper's code (peft: 5**0.5)
        nn.init.zeros_(self.lora_up.weight)  # B = 0: an untrained slider changes nothing
        self.alpha = float(alpha)

    A, B = property(lambda self: self.lora_down.weight), property(lambda self: self.lora_up.weight)
    alpha_over_r = property(lambda self: self.alpha / len(self.A))

    def delta(self) -> slider_files.Delta:
        """What a slider file holds of it: A, B, alpha."""
        return slider_files.Delta(self.A.detach(), self.B.detach(), self.alpha)

    def cast_key(self, dtype):
        """Copies in `dtype` are valid while this is unchanged. _version counts in-place changes."""
        return dtype, torch.is_grad_enabled(), self.A._version, self.B._version


def down(x, A, layer):
    """A x: (b, ..., in) -> (b, ..., r); of a convolution (b, in, h, w) -> (b, r, h', w')."""
    return F.conv2d(x, A, None, layer.stride, layer.padding) if A.ndim == 4 else F.linear(x, A)


def add_up(y, h, B):
    """y + B h: (b, ..., out); of a convolution (b, out, h', w')."""
    if B.ndim == 4:
        return y + F.conv2d(h, B)
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.T).view_as(y)  # y + h B^T in one call


def group_by_input(parts) -> list[list]:
    """The LowRanks of pairs (kohya name, LowRank) in groups whose layers see the same x:
    self-attention's q, k, v; cross-attention's k, v; each other layer by itself."""
    groups: dict[str, list] = {}
    for name, part in parts:  # "..._attn1_to_q" -> "..._attn1_to_"
        shared = re.sub(r"(?<=attn1_to_)[qkv]$|(?<=attn2_to_)[kv]$", "", name)
        groups.setdefault(shared, []).append(part)
    return list(groups.values())


class Slider(nn.Module):
    """The low-rank changes of one concept. Its state_dict has the names of its file:
    <layer>.lora_down.weight (A) and <layer>.lora_up.weight (B).

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
        self.scale, self.handles = 0.0, []  # type: ignore[var-annotated]
        self.metadata: dict[str, str] = {}  # of the file that it was loaded from

    attached = property(lambda self: bool(self.handles))

    @property
    def scale(self):
        return self._scale

    @scale.setter
    def scale(self, value):
        self._scale = value
        self._weights = {}  # {LowRank: (cast_key, A of its group, k B)}, see _cast
        self._Ax = {}  # {LowRank: A x}, of one group at a time, each until it is used

    def layers_of(self, unet: nn.Module) -> list[tuple[LowRank, Layer]]:
        """Each LowRank with the layer of `unet` that it changes. ValueError if one is missing."""
        layers = layers_by_kohya_name(unet)  # {kohya name: (name, layer)}
        if missing := [name for name, _ in self.named_children() if name not in layers]:
            raise ValueError(f"this model lacks {len(missing)} layers of it, e.g. {missing[0]}")
        return [(part, layers[name][1]) for name, part in self.named_children()]  # type: ignore

    def attach(self, unet: nn.Module) -> "Slider":
        """Add the change to `unet`'s layers, at `scale`. ValueError if one is missing."""
        layers = dict(self.layers_of(unet))
        self.groups, self.handles = group_by_input(self.named_children()), []
        self.handles.append(graphs.note_attached(unet, self))  # a CUDA graph without it is stale
        for group in self.groups:
            for part in group:
                self.handles.append(layers[part].register_forward_hook(self._hook(part, group)))
        return self

    def _hook(self, part: LowRank, group: list[LowRank]):
        def add(layer, inputs, y):  # y = W x  ->  W x + scale * (alpha / r) * B A x
            if not torch.is_tensor(self.scale) and not self.scale:
                return None  # y stays
            if part not in self._weights or self._weights[part][0] != part.cast_key(y.dtype):
                self._cast(y.dtype)
            _, A, kB = self._weights[part]  # k = scale * alpha / r; A is the whole group's
            if part not in self._Ax:  # the first of its group: A x for all of it, at once
                self._Ax = dict(zip(group, self._scaled_down(inputs[0], A, layer, group)))
            return add_up(y, self._Ax.pop(part), kB)

        return add

    def _cast(self, dtype):
        """Copies in `dtype` to compute with, as training keeps A and B in float32: of each group
        its As stacked, (sum of r, in); of each LowRank k B, with k = scale * alpha / r (a scale
        that is a tensor is left to _scaled_down). Done again when the scale or a weight changes.
        All in a few operations: a GPU takes longer to launch one than to do it."""
        parts = [part for group in self.groups for part in group]
        flat = lambda weights: torch.cat([w.flatten() for w in weights])
        scale = 1.0 if torch.is_tensor(self.scale) else self.scale
        Bs, ks = [p.B for p in parts], [p.alpha_over_r * scale for p in parts]
        # w * k; but * would save a tensor, and what is cast once is gone back through several times
        times = lambda w, k: torch.add(w.new_zeros(()), w, alpha=k)
        kB = times(flat(Bs), ks[0]) if len(set(ks)) == 1 else flat(map(times, Bs, ks))
        kBs = dict(zip(parts, kB.to(dtype).split([B.numel() for B in Bs])))  # {LowRank: k B, flat}
        lengths = [sum(p.A.numel() for p in group) for group in self.groups]
        for group, A in zip(self.groups, flat(p.A for p in parts).to(dtype).split(lengths)):
            for p in group:
                stacked = A.view(-1, *p.A.shape[1:])
                self._weights[p] = p.cast_key(dtype), stacked, kBs[p].view(p.B.shape)

    def _scaled_down(self, x, A, layer, group):
        """A x for each layer of the group: h (b, ..., r). Where each sample has a scale it comes in
        here, where there is least to multiply."""
        h = down(x, A, layer)  # (b, ..., sum of r) or, of a convolution, (b, r, h', w')
        if torch.is_tensor(self.scale):
            ones = [1] * (h.ndim - 2)
            scale = self.scale.to(h.dtype).view(len(h), -1)  # (b, 1) or (b, r)
            scale = scale.repeat(1, len(group)) if scale.shape[1] > 1 else scale
            h = h * scale.view(len(h), *([-1, *ones] if A.ndim == 4 else [*ones, -1]))
        return h.split([len(part.A) for part in group], -1) if len(group) > 1 else [h]

    def detach(self):
        """Remove the change; the UNet is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @contextmanager
    def at(self, scale):
        """with slider.at(2.0): ... sets the scale inside, and restores it afterwards."""
        before, self.scale = self.scale, scale
        try:
            yield self
        finally:
            self.scale = before


def save(path, slider: Slider, metadata: dict, **options):
    """Write fp16 safetensors, named as kohya's. metadata: JSON values. options: write's."""
    deltas = {name: part.delta() for name, part in slider.named_children()}  # type: ignore
    slider_files.write(path, deltas, metadata, **options)


def load(path, unet: nn.Module) -> Slider:
    """Read a slider or LoRA file of any common naming, for `unet`; not attached yet. Rank, alpha
    and layers come from the file. ValueError, naming the file, for one that does not fit."""
    file, known = slider_files.read(path, unet), layers_by_kohya_name(unet)  # stem: (name, layer)
    by_name = {known[stem][0]: delta for stem, delta in file.deltas.items()}
    layers = dict(known[stem] for stem in file.deltas)
    ranks = {name: len(delta.down) for name, delta in by_name.items()}
    slider = Slider(layers, ranks, {name: delta.alpha for name, delta in by_name.items()})
    for stem, delta in file.deltas.items():
        part = getattr(slider, stem)
        part.lora_down.weight.data, part.lora_up.weight.data = delta.down, delta.up
    slider.metadata = file.metadata
    return slider.requires_grad_(False).to(next(unet.parameters()))
