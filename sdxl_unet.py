"""SDXL's UNet (Podell et al. 2023): eps_theta(x_t, c, t), the noise it sees in the latents x_t.

Parameter names are the released checkpoint's, so load_state_dict is the whole loader; every size
comes from unet/config.json, so the miniature and the real model are the same code. In comments B is
the batch, c channels, h and w the height and width of the latents at that level."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support import graphs


def sinusoids(values, width: int):
    """values (B,) -> (B, width): cosines, then sines, of geometrically spaced frequencies (Vaswani
    et al. 2017). In float32: t = 999 and t = 998 are the same number in bfloat16."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=values.device) / half)
    angles = values.float()[:, None] * frequencies  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], -1)


class Embedding(nn.Module):
    """(B, c_in) -> (B, c_out): two linear layers."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c_in, c_out), nn.Linear(c_out, c_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class Checkpointed(nn.Module):
    """Where `checkpointing` is set, activations are not kept for the backward pass but computed
    again there: less memory, more time (gradient checkpointing, Chen et al. 2016)."""

    checkpointing = False

    def __call__(self, *args):
        if self.checkpointing and torch.is_grad_enabled():
            how = dict(use_reentrant=False, preserve_rng_state=False)  # there is no dropout
            return checkpoint(super().__call__, *args, **how)
        return super().__call__(*args)


class Resnet(Checkpointed):
    """(B, c_in, h, w), time (B, c_time) -> (B, c_out, h, w): two convolutions beside a shortcut."""

    def __init__(self, c_in, c_out, c_time, groups, eps):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out) if c_time else None  # the VAE has no time
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, h, w)
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]  # the same at every place
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """(B, c, h, w) -> (B, c, h/2, w/2)"""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """(B, c, h, w) -> (B, c, 2h, 2w)"""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """x (B, n, c) -> (B, n, c): cross-attention to context (B, m, c_context), or self-attention."""

    def __init__(self, c, c_context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # the checkpoint calls it to_out.0

    def forward(self, x, context=None):
        context = x if context is None else context
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, n, c/heads)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, n, c)


class GEGLU(nn.Module):
    """(B, n, c) -> (B, n, c_out), gated (Shazeer 2020)."""

    def __init__(self, c, c_out):
        super().__init__()
        self.proj = nn.Linear(c, 2 * c_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        dropout = nn.Identity()  # so that net.2 stays net.2
        self.net = nn.Sequential(GEGLU(c, 4 * c), dropout, nn.Linear(4 * c, c))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(Checkpointed):
    """Self-attention (attn1), cross-attention to the prompt (attn2), feed-forward (ff)."""

    def __init__(self, c, c_context, heads):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(c), Attention(c, c, heads)
        self.norm2, self.attn2 = nn.LayerNorm(c), Attention(c, c_context, heads)
        self.norm3, self.ff = nn.LayerNorm(c), FeedForward(c)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))  # (B, h*w, c)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """(B, c, h, w) and context (B, 77, d) -> (B, c, h, w): every place is a token."""

    def __init__(self, c, c_context, heads, depth, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c)
        block = lambda: TransformerBlock(c, c_context, heads)
        self.transformer_blocks = nn.ModuleList(block() for _ in range(depth))
        self.proj_out = nn.Linear(c, c)

    def forward(self, x, context):
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, h*w, c)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """A level of the U: resnets, each followed by a transformer where it has them."""

    def __init__(self, channels, c_time, groups, eps, transformer=None):
        """channels: (c_in, c_out) of each resnet. transformer: function c -> Transformer."""
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(*pair, c_time, groups, eps) for pair in channels)
        transformers = [transformer(c_out) for _, c_out in channels] if transformer else None
        self.attentions = transformers and nn.ModuleList(transformers)

    def step(self, i, x, time, context):
        x = self.resnets[i](x, time)
        return x if self.attentions is None else self.attentions[i](x, context)


class Down(Level):
    """Returns x at half the size (the same in the last level), and the skips for the way up."""

    def __init__(self, channels, last, *args):
        super().__init__(channels, *args)
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels[-1][1])])

    def forward(self, x, time, context):
        skips = []
        for i in range(len(self.resnets)):
            x = self.step(i, x, time, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class Mid(nn.Module):
    """The bottom: resnet, transformer, resnet."""

    def __init__(self, c, c_time, groups, eps, transformer):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c, c, c_time, groups, eps) for _ in range(2))
        self.attentions = nn.ModuleList([transformer(c)])

    def forward(self, x, time, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class Up(Level):
    """Each resnet also sees a skip. Returns x at twice the size (the same in the last level)."""

    def __init__(self, channels, last, *args):
        super().__init__(channels, *args)
        self.upsamplers = None if last else nn.ModuleList([Upsample(channels[-1][1])])

    def forward(self, x, skips, time, context):
        for i, skip in enumerate(reversed(skips)):  # the newest first
            x = self.step(i, torch.cat([x, skip], 1), time, context)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class UNet(nn.Module):
    """UNet(config): config is the dict in unet/config.json. ValueError if it is not of SDXL's kind.
    factor: latents' height and width must be multiples of it."""

    def __init__(self, config: dict):
        super().__init__()
        check_config(config)
        self.config = config
        widths, depths = config["block_out_channels"], config["transformer_layers_per_block"]
        heads = config["attention_head_dim"]  # how many heads, not their width: diffusers' misnomer
        layers, groups = config["layers_per_block"], config["norm_num_groups"]
        c_context, c_time, levels = config["cross_attention_dim"], 4 * widths[0], len(widths)
        self.factor = 2 ** (levels - 1)
        common = (c_time, groups, config["norm_eps"])

        def transformer(level, kind="CrossAttn"):
            make = lambda c: Transformer(c, c_context, heads[level], depths[level], groups)
            return make if "CrossAttn" in kind else None

        self.time_embedding = Embedding(widths[0], c_time)
        self.add_embedding = Embedding(config["projection_class_embeddings_input_dim"], c_time)
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips, c = [widths[0]], widths[0]  # skips: channels of all that the way down leaves
        for level, kind in enumerate(config["down_block_types"]):
            last, width = level == levels - 1, widths[level]
            channels = [(c, width)] + [(width, width)] * (layers - 1)
            self.down_blocks.append(Down(channels, last, *common, transformer(level, kind)))
            skips += [width] * (layers if last else layers + 1)  # a downsampler's output too
            c = width

        self.mid_block = Mid(c, *common, transformer(-1))

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(levels)), config["up_block_types"]):
            channels = []
            for _ in range(layers + 1):
                channels.append((c + skips.pop(), widths[level]))
                c = widths[level]
            self.up_blocks.append(Up(channels, level == 0, *common, transformer(level, kind)))

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], config["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], config["out_channels"], 3, padding=1)

    @graphs.replayed  # on a GPU: launched as one operation where there are no gradients
    def forward(self, latents, t, context, pooled, time_ids):
        """The predicted noise eps, or v (sampler.convert_v_to_eps), (B, 4, h, w).

        latents   (B, 4, h, w)   x_t
        t         (B,)           noise level, 0 ... 999
        context   (B, 77, d)     the prompt, token by token
        pooled    (B, p)         the prompt as a whole
        time_ids  (B, 6)         original height, width, crop top, left, target height, width
        """
        time = sinusoids(t, self.config["block_out_channels"][0]).to(pooled.dtype)  # (B, c0)
        time = self.time_embedding(time)  # (B, c_time)
        sizes = sinusoids(time_ids.flatten(), self.config["addition_time_embed_dim"])  # (6 B, 256)
        sizes = sizes.view(len(time_ids), -1).to(pooled.dtype)  # (B, 6 * 256)
        time = time + self.add_embedding(torch.cat([pooled, sizes], -1))  # (B, c_time)
        time = F.silu(time)  # once for all resnets; diffusers does it in each, before time_emb_proj

        x = self.conv_in(latents.to(self.conv_in.weight.dtype))  # (B, c0, h, w)
        skips = [x]
        for level in self.down_blocks:
            x, left = level(x, time, context)
            skips += left
        x = self.mid_block(x, time, context)  # (B, c2, h/4, w/4)
        for level in self.up_blocks:
            n = len(level.resnets)
            skips, here = skips[:-n], skips[-n:]
            x = level(x, here, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 4, h, w)


def check_config(config: dict):
    """ValueError, one line, unless `config` describes a UNet of SDXL's kind."""
    try:
        down, up = config["down_block_types"], config["up_block_types"]
        known = {f"{kind}{way}Block2D" for kind in ("", "CrossAttn") for way in ("Down", "Up")}
        per_level = ("attention_head_dim", "block_out_channels", "transformer_layers_per_block")
        fits = (
            {*down, *up} <= known
            and config["mid_block_type"] == "UNetMidBlock2DCrossAttn"
            and config["addition_embed_type"] == "text_time"
            and config["use_linear_projection"]
            and {len(up), *(len(config[name]) for name in per_level)} == {len(down)}
        )
        c_in, c_out = config["in_channels"], config["out_channels"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"unet config: not SDXL's kind of UNet (odd: {error})") from None
    if c_in != c_out:
        use = "a model for inpainting or editing, which wants a picture too"
        raise ValueError(f"unet config: {c_in} channels in, {c_out} out: {use}")
    if not fits:
        blocks = ", ".join([*down, config["mid_block_type"], *up])
        raise ValueError(f"unet config: not SDXL's kind of UNet: {blocks}")
