"""A small style-based generator: StyleGAN2's parts (Karras et al. 2020), each by its own name.

    z (B, 64) --mapping--> w (B, 128) --an affine layer for each convolution--> styles
    styles --synthesis--> pictures (B, 3, 64, 64) in [-1, 1]

A style is one number for each input channel of a convolution: it says how strongly that channel is
read. All of them together are the style space S (Wu et al. 2021), and moving a single number of it
often moves a single thing in the picture, whether or not anybody has a word for it. channels.py
looks for such numbers."""

import math

import torch
import torch.nn.functional as F
from torch import nn

Z, W = 64, 128
CHANNELS = {4: 128, 8: 128, 16: 64, 32: 32, 64: 16}  # side of the feature map -> its channels
SIZE = max(CHANNELS)


class Linear(nn.Module):
    """Linear layer with equalised learning rate: weights of unit variance, scaled as they are used
    (Karras et al. 2018, section 4.1)."""

    def __init__(self, n_in: int, n_out: int, bias: float = 0.0, rate: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / rate)
        self.bias = nn.Parameter(torch.full((n_out,), float(bias)))
        self.gain, self.rate = rate / math.sqrt(n_in), rate

    def forward(self, x):
        return F.linear(x, self.weight * self.gain, self.bias * self.rate)


class ModulatedConv(nn.Module):
    """Convolution whose weights a style s (B, c_in) modulates, w'_ijk = s_i w_ijk, and demodulation
    brings back to unit length for each output channel, w''_ijk = w'_ijk / sqrt(sum_ik w'_ijk^2 +
    1e-8) (StyleGAN2, eqs. 1 and 3).

    Modulating the weights is scaling the input channels, demodulating them is scaling the output
    channels: so one plain convolution serves the whole batch."""

    def __init__(self, c_in: int, c_out: int, kernel: int, demodulate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.affine, self.demodulate = Linear(W, c_in, bias=1.0), demodulate
        self.gain = 1 / math.sqrt(c_in * kernel * kernel)

    def forward(self, x, s):
        weight = self.weight * self.gain
        x = x * s[:, :, None, None].to(x.dtype)
        x = F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2)
        if self.demodulate:
            length_2 = s.to(weight.dtype).square() @ weight.square().sum((2, 3)).T  # (B, c_out)
            x = x * (length_2 + 1e-8).rsqrt()[:, :, None, None].to(x.dtype)
        return x


class StyledConv(nn.Module):
    """Modulated convolution, noise of learned strength, bias, leaky ReLU; with `up` the feature map
    is doubled first."""

    def __init__(self, c_in: int, c_out: int, up: bool = False):
        super().__init__()
        self.conv, self.up = ModulatedConv(c_in, c_out, 3), up
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x, s, noise):
        x = self.conv(doubled(x) if self.up else x, s)
        x = x + self.noise_strength.to(x.dtype) * noise.to(x.dtype)
        x = x + self.bias.to(x.dtype)[:, None, None]
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


def doubled(x):
    """Twice the side. Bilinear is what inserting zeros and filtering with [1, 3, 3, 1] gives, as in
    StyleGAN2."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        # At a hundredth of the learning rate.
        mapping = [Linear(Z if i == 0 else W, W, rate=0.01) for i in range(4)]
        self.mapping = nn.ModuleList(mapping)
        self.constant = nn.Parameter(torch.randn(1, CHANNELS[4], 4, 4))
        self.convs = nn.ModuleList([StyledConv(CHANNELS[4], CHANNELS[4])])
        channels = list(CHANNELS.values())
        for c_in, c_out in zip(channels, channels[1:]):
            self.convs += [StyledConv(c_in, c_out, up=True), StyledConv(c_out, c_out)]
        self.to_rgb = nn.ModuleList([ModulatedConv(c, 3, 1, demodulate=False) for c in channels])
        self.register_buffer("w_mean", torch.zeros(W))

    def w(self, z, truncation: float = 1.0):
        """z (B, 64) -> w (B, 128); truncation < 1 draws w towards its mean: fewer odd pictures,
        less variety."""
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.mapping:
            x = F.leaky_relu(layer(x), 0.2) * math.sqrt(2)
        return self.w_mean + truncation * (x - self.w_mean)

    @property
    def layers(self) -> list[ModulatedConv]:
        """Everything that has a style: the convolutions, then the ones to RGB, each from coarse to
        fine."""
        return [c.conv for c in self.convs] + list(self.to_rgb)

    def styles(self, w) -> list[torch.Tensor]:
        """w (B, 128) -> the style of each layer, (B, c_in)."""
        return [layer.affine(w) for layer in self.layers]

    def noise(self, count: int, generator=None) -> list[torch.Tensor]:
        """A noise picture (count, 1, side, side) for each convolution."""
        sides = [4] + [side for side in list(CHANNELS)[1:] for _ in range(2)]
        settings = dict(generator=generator, device=self.constant.device)
        return [torch.randn(count, 1, side, side, **settings) for side in sides]

    def synthesis(self, styles, noise):
        """Skip connections: what each resolution makes of its features in RGB is added to the
        doubled picture so far."""
        x, rgb = self.constant.expand(len(styles[0]), -1, -1, -1), None
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.bfloat16)
        for i, conv in enumerate(self.convs):
            x = conv(x, styles[i], noise[i])
            if i % 2 == 0:  # the last convolution of its resolution: 4, then 8, 16 ...
                seen = self.to_rgb[i // 2](x, styles[len(self.convs) + i // 2])
                rgb = seen if rgb is None else doubled(rgb) + seen
        return rgb.float()


class Encoder(nn.Module):
    """Pictures (B, 3, 64, 64) -> mean and log variance of z, (B, 64) each. Only training needs
    it."""

    def __init__(self):
        super().__init__()
        sizes, layers = [3, 32, 64, 96, 128], []
        for c_in, c_out in zip(sizes, sizes[1:]):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 2 * Z))

    def forward(self, x):
        return self.layers(x).float().chunk(2, 1)
