"""Low-rank adaptors (Hu et al. 2022): the slider itself.

A slider adds to each chosen layer W of the frozen UNet a low-rank change whose strength is one number:

    y = W x  +  scale * (alpha / r) * B A x            A: (r, in), B: (out, r), B = 0 at the start

`scale` is the knob that is turned at inference (the paper's alpha); `alpha` is the LoRA's usual constant, fixed in
training. The term is added by a forward hook: the UNet's own modules and weights are never touched or replaced, so a
detached UNet is the untouched UNet, bit for bit, and any number of sliders can hang on one UNet.
"""

import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from formats import slider_files
from formats.slider_files import Layer, file_name, layers_by_file_name

# Which layers a slider changes, by what their names contain. Like the paper's code, all sets stay within attention
# projections (attn1 is self-, attn2 cross-attention), resnet blocks and up/down-samplers; the feed-forward layers,
# the time embedding and the UNet's first and last convolutions are left alone.
LAYERS = {
    "noxattn": r"\.attn1\.|\.resnets\.|samplers\.",  # everything but cross-attention: the paper's default
    "attn": r"\.attn[12]\.",
    "xattn": r"\.attn2\.",
    "all": r"\.attn[12]\.|\.resnets\.|samplers\.",
}


def target_layers(unet: nn.Module, layers: str = "noxattn", conv: bool = True) -> dict[str, Layer]:
    """Name -> Linear or Conv2d of the layer set `layers` (a key of LAYERS); conv=False leaves convolutions out."""
    if layers not in LAYERS:
        raise ValueError(f"layers: {layers!r} is not one of {', '.join(LAYERS)}")
    found = {name: m for name, m in unet.named_modules() if isinstance(m, Layer) and re.search(LAYERS[layers], name)}
    return {name: m for name, m in found.items() if conv or isinstance(m, nn.Linear)}


class LowRank(nn.Module):
    """(alpha / r) B A for one layer. A convolution's A has its kernel, stride and padding; its B is 1x1."""

    lora_down: Layer  # A
    lora_up: Layer  # B

    def __init__(self, layer: Layer, rank: int, alpha: float):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.lora_down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)  # type: ignore[arg-type]
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=1)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.factor = float(alpha) / rank  # alpha / r, as a number: no tensor read in the hot path

    def forward(self, x, each=None):
        # In the UNet's dtype, whatever A's and B's: in training they stay in float32, where small steps are not lost.
        return self.factor * low_rank(x, self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype), self.lora_down, each)

    def part(self) -> slider_files.Part:
        """What a file holds of it."""
        return slider_files.Part(self.lora_down.weight.detach(), self.lora_up.weight.detach(), self.factor * len(self.lora_down.weight))

    def change(self):
        """(alpha / r) B A in the shape of the layer's weight, float32."""
        return self.factor * slider_files.dense(self.lora_down.weight.detach(), self.lora_up.weight.detach())


def low_rank(x, A, B, layer, each=None):
    """B A x: (..., in) -> (..., r) -> (..., out), or (B, in, h, w) -> (B, r, h', w') -> (B, out, h', w'), moving as `layer` does.

    each: B diag(each) A x, with a factor for each sample and rank, (batch, r)."""
    if A.ndim == 2:
        h = F.linear(x, A)
        return F.linear(h if each is None else h * each.to(h.dtype).view(len(each), *[1] * (h.ndim - 2), -1), B)
    h = F.conv2d(x, A, None, layer.stride, layer.padding)
    return F.conv2d(h if each is None else h * each.to(h.dtype)[:, :, None, None], B)


class Slider(nn.Module):
    """The low-rank changes of one concept. Its state_dict is the slider file: <layer>.lora_down.weight (A),
    <layer>.lora_up.weight (B), <layer>.alpha.

    scale: a number, or a tensor (batch,) with one scale for each sample, or (batch, r) with one for each sample and rank: r
    sliders of rank 1 in one. 0 costs nothing: the hooks return at once.
    """

    def __init__(self, layers: dict[str, Layer], rank: int | dict = 4, alpha: float | dict = 1.0):
        """layers: from target_layers. rank, alpha: one for all layers, or a dict by layer name (files may hold more than a
        layer's full rank, as merged ones do). Raises ValueError for one rank that not every layer can have."""
        super().__init__()
        pick = lambda value, name: value[name] if isinstance(value, dict) else value
        # A layer's full rank is min(out, in), a kernel's places counted as in.
        most = min((min(m.weight.shape[0], m.weight[0].numel()) for m in layers.values()), default=0)
        if not isinstance(rank, dict) and not 1 <= rank <= most:
            raise ValueError(f"rank: {rank} is not between 1 and {most}, the full rank of one of the layers")
        for name, layer in layers.items():
            self.add_module(file_name(name), LowRank(layer, pick(rank, name), pick(alpha, name)))
        self.scale = 0.0
        self.handles: list = []
        self.metadata: dict[str, str] = {}  # what the file said that it was loaded from: strings

    def attach(self, unet: nn.Module) -> "Slider":
        """Hook onto the layers of `unet` that this slider has parts for. Raises ValueError if one is missing."""
        self.handles += [layer.register_forward_hook(self._hook(getattr(self, name))) for name, layer in self.layers_of(unet)]
        return self

    def layers_of(self, unet: nn.Module) -> list[tuple[str, Layer]]:
        """(name of a part of this slider, the layer of `unet` that it changes). Raises ValueError if one is missing."""
        modules = layers_by_file_name(unet)
        missing = [name for name, _ in self.named_children() if name not in modules]
        if missing:
            raise ValueError(f"the slider changes {len(missing)} layers that this model does not have, e.g. {missing[0]}")
        return [(name, modules[name][1]) for name, _ in self.named_children()]

    def _hook(self, part):
        def add(layer, inputs, y):  # y = W x
            scale = self.scale
            if not torch.is_tensor(scale):
                return y + scale * part(inputs[0]) if scale else None  # None: y stays as it is
            if scale.ndim == 2:
                return y + part(inputs[0], scale)
            return y + scale.to(y.dtype).view(-1, *[1] * (y.ndim - 1)) * part(inputs[0])

        return add

    def detach(self):
        """Unhook; the UNet is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @torch.no_grad()
    def merge(self, unet: nn.Module, scale: float = 1.0):
        """W <- W + scale * (alpha / r) B A, for good: what follows trains or draws on top of the changed model."""
        for name, layer in self.layers_of(unet):
            part = getattr(self, name)
            layer.weight = nn.Parameter((layer.weight.float() + scale * part.change()).to(layer.weight.dtype), requires_grad=False)

    def parts(self) -> dict[str, slider_files.Part]:
        """By kohya name."""
        return {name: getattr(self, name).part() for name, _ in self.named_children()}

    @contextmanager
    def at(self, scale):
        """with slider.at(2.0): ... sets the scale inside, and puts the old one back."""
        old, self.scale = self.scale, scale
        try:
            yield self
        finally:
            self.scale = old


# ------------------------------------------------------------------------------------------------ several at once


class Composed:
    """Several sliders, each at a fixed scale, as one change of `unet`: off at `scale` 0, on at any other.

    Exact, and in each layer in the cheaper of two forms. Where the ranks add up to little, one low-rank change
    (slider_files.stacked); it keeps small changes apart from bfloat16 weights, which would round them. Where they add up to
    much, W + sum of scale * (alpha / r) B A takes W's place, which costs nothing however many they are, but rounds, and memory
    for a second W. Off, each W is the tensor that it was.
    """

    def __init__(self, unet: nn.Module, pairs, only_low_rank: bool = False):
        """pairs: (slider, scale), sliders not attached. only_low_rank: where another Composed switches on the same UNet, as
        only one W can stand in a layer. Raises ValueError if a slider does not fit `unet`."""
        self._scale, self.handles, self.changed = 0.0, [], []
        parts: dict[str, tuple] = {}
        for slider, scale in pairs:
            for name, layer in slider.layers_of(unet):
                parts.setdefault(name, (layer, []))[1].append((getattr(slider, name).part(), scale))
        for layer, here in parts.values():
            A, B = slider_files.stacked(here)
            if only_low_rank or 4 * len(A) <= min(layer.weight.shape[:2]):
                self.handles.append(layer.register_forward_hook(self._hook(A.to(layer.weight.dtype), B.to(layer.weight.dtype))))
            else:
                W = layer.weight.float() + slider_files.dense(A, B)
                self.changed.append((layer, layer.weight, nn.Parameter(W.to(layer.weight.dtype), requires_grad=False)))

    def _hook(self, A, B):
        return lambda layer, inputs, y: y + low_rank(inputs[0], A, B, layer) if self._scale else None

    @property
    def scale(self):
        return self._scale

    @scale.setter
    def scale(self, value):
        self._scale = value
        for layer, W, changed in self.changed:
            layer.weight = changed if value else W

    def detach(self):
        self.scale = 0.0
        for handle in self.handles:
            handle.remove()


@contextmanager
def hung(unet: nn.Module, sliders):
    """with hung(unet, sliders) as switches: ... hangs triples (slider, scale, start) on `unet` inside, all at scale 0.

    Yields what to switch: triples (slider, scale, start) again, those with a number as scale and the same start in one.
    """
    alike: dict = {}
    switches: list[tuple] = []
    attached: list[Slider | Composed] = []
    if len({id(slider) for slider, _, _ in sliders}) < len(sliders):
        raise ValueError("the same slider is given twice: load its file once for each")
    for slider, scale, start in sliders:
        slider.scale = 0.0
        if torch.is_tensor(scale):
            switches.append((slider, scale, start))
        elif scale:
            alike.setdefault(start, []).append((slider, scale))
    try:
        several = [start for start, pairs in alike.items() if len(pairs) > 1]
        for start, pairs in alike.items():
            if len(pairs) > 1:
                together = Composed(unet, pairs, only_low_rank=len(several) > 1)
                attached.append(together)
                switches.append((together, 1.0, start))
            else:
                switches.append((*pairs[0], start))
        for slider, _, _ in switches:
            if isinstance(slider, Slider) and not slider.handles:
                attached.append(slider.attach(unet))
        yield switches
    finally:
        for slider, _, _ in switches:
            slider.scale = 0.0
        for slider in attached:
            slider.detach()


# ------------------------------------------------------------------------------------------------ slider files


def save(path, slider: Slider, metadata: dict, **options):
    """Write `slider` as fp16 safetensors in kohya's naming. metadata: any JSON values; options: slider_files.write's."""
    slider_files.write(path, slider.parts(), metadata, **options)


def load(path, unet: nn.Module) -> Slider:
    """Read a slider or LoRA file of any common naming for `unet`; rank, alpha and layers come from the file itself. Not yet
    attached. Its metadata, all strings, is the returned slider's `.metadata`. Raises ValueError, naming the file."""
    file, known = slider_files.read(path, unet), layers_by_file_name(unet)
    parts = {known[stem][0]: part for stem, part in file.parts.items()}  # by the layer's name in the UNet
    slider = Slider(
        {known[stem][0]: known[stem][1] for stem in file.parts},
        {name: len(part.down) for name, part in parts.items()},
        {name: part.alpha for name, part in parts.items()},
    )
    for stem, part in file.parts.items():
        low = getattr(slider, stem)
        low.lora_down.weight.data, low.lora_up.weight.data = part.down, part.up
    slider.metadata = file.metadata
    return slider.requires_grad_(False).to(next(unet.parameters()))
