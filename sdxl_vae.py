"""SDXL's autoencoder: pictures (B, 3, H, W) to latents (B, 4, H/8, W/8) and back.

A variational autoencoder (Kingma & Welling 2014) with convolutions and one self-attention at the
bottom (Rombach et al. 2022, section 3.1). Parameter names are the released checkpoint's, so
load_state_dict is the whole loader; every size comes from the folder's vae/config.json. The file
reads in the order in which a picture flows through it."""

import torch
import torch.nn.functional as F
from torch import nn

from sdxl_unet import Resnet, Upsample


class Attention(nn.Module):
    """(B, c, h, w) -> same: one head of self-attention over all h*w places."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # the checkpoint calls it to_out.0

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h*w, c)
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, c)
        out = self.to_out[0](out.squeeze(1))  # (B, h*w, c)
        return x + out.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c, c, None, groups, 1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """(B, c, h, w) -> (B, c, h/2, w/2). One row and column of padding, right and below only."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """One resolution: a few resnets, then the way to the next resolution (none at the last)."""

    def __init__(self, c_in, c_out, resnets, groups, down=None, up=None):
        super().__init__()
        widths = [c_in] + [c_out] * resnets
        pairs = zip(widths, widths[1:])
        self.resnets = nn.ModuleList(Resnet(*pair, None, groups, 1e-6) for pair in pairs)
        self.downsamplers = nn.ModuleList([down] if down else [])
        self.upsamplers = nn.ModuleList([up] if up else [])

    def forward(self, x):
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> mean and log variance of the latents, (B, 8, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(widths[:1] + widths[:-1], widths)):
            down = Downsample(c_out) if i < len(widths) - 1 else None
            level = Level(c_in, c_out, config["layers_per_block"], groups, down=down)
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)  # (B, c0, H, W)
        for level in self.down_blocks:
            x = level(x)  # (B, c_i, H/2^i, W/2^i)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, 4, h, w) -> pictures (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        resnets = config["layers_per_block"] + 1
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(widths[:1] + widths[:-1], widths)):
            up = Upsample(c_out) if i < len(widths) - 1 else None
            self.up_blocks.append(Level(c_in, c_out, resnets, groups, up=up))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))  # (B, c3, h, w)
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """VAE(config): config is the dict in vae/config.json. `factor` is how many pixels a latent is
    wide (SDXL: 8)."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.tile = 128  # latents: SDXL's 1024 pixels; a smaller tile takes less memory to decode
        c = config["latent_channels"]
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def moments(self, pictures):
        """pictures (B, 3, H, W) in [-1, 1] -> mean, log variance of the unscaled latents,
        (B, 4, h, w) each."""
        return self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)

    def decode_unscaled(self, z):
        """Unscaled latents (B, 4, h, w) -> pictures (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, pictures):
        """pictures (B, 3, H, W) in [-1, 1] -> latents (B, 4, h, w): the mean, scaled to unit
        variance."""
        return self.moments(pictures)[0] * self.config["scaling_factor"]

    def decode(self, latents):
        """latents (B, 4, h, w) -> pictures (B, 3, H, W), about in [-1, 1]; a few at a time, and
        those larger than `tile` in overlapping tiles."""
        z = latents / self.config["scaling_factor"]
        few = max(1, 8 * 32**2 // z[0, 0].numel())  # large ones one by one
        decode = self.decode_unscaled if max(z.shape[2:]) <= self.tile else self.decode_in_tiles
        return torch.cat([decode(part) for part in z.split(few)])

    def decode_in_tiles(self, z):
        """The same a tile at a time, so that memory does not grow with the picture. Each tile
        fades out over a quarter of its side into the next; group norms and attention see only the
        tile, so colours may differ by a shade."""
        tile, f, (h, w) = self.tile, self.factor, z.shape[2:]
        starts = lambda n: [*range(0, n - tile, tile - tile // 4), max(n - tile, 0)]

        def fade(n):  # (n,): up from the edges to 1
            i = torch.arange(n, device=z.device) + 0.5
            return (i.minimum(n - i) / (tile // 4 * f)).clamp(max=1)

        total = picture = 0
        for top in starts(h):
            for left in starts(w):
                part = self.decode_unscaled(z[:, :, top : top + tile, left : left + tile])
                below, right = part.shape[2:]  # <= tile * f
                window = fade(below)[:, None] * fade(right)
                x, y = left * f, top * f
                around = (x, w * f - x - right, y, h * f - y - below)
                picture = picture + F.pad(part * window.to(part.dtype), around)
                total = total + F.pad(window, around)
        return picture / total.to(picture.dtype)
