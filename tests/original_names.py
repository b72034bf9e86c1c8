"""The other way round: a folder's tensors under the names of the original single-file form.
Written on its own, from the layout of the latent-diffusion and OpenCLIP code, so that the reader
in single_file.py has something to be tested on."""

import re

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE = [
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("samplers.0.", "sample."),
    ("resnets", "block"),
    ("down_blocks", "down"),
    ("up_blocks", "up"),
]
LAYER = [
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
]
IN_LAYER = r"encoder\.layers\.(\d+)"
TOPS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet(state: dict, layers: int = 2) -> dict:
    found = (re.match(r"(up_blocks\.\d+)\.attentions", name) for name in state)
    with_attention = {m[1] for m in found if m}

    def name(module):
        if module in ENDS:
            return ENDS[module]
        blocks = r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)"
        block, kind, i, rest = re.match(rf"{blocks}\.(\w+)\.(\d+)\.(.*)", module).groups()
        i, level = int(i), int(block[-1]) if block[-1].isdigit() else 0
        if block == "mid_block":
            place = "middle_block." + ("1" if kind == "attentions" else str(2 * i))
        elif block.startswith("down"):
            layer = layers if kind == "downsamplers" else i
            place = f"input_blocks.{1 + level * (layers + 1) + layer}"
        else:
            layer = layers if kind == "upsamplers" else i
            place = f"output_blocks.{level * (layers + 1) + layer}"
        if kind == "downsamplers":
            return place + ".0.op"
        if kind == "upsamplers":
            return place + (".2.conv" if block in with_attention else ".1.conv")
        slot = "" if block == "mid_block" else ".1" if kind == "attentions" else ".0"
        return f"{place}{slot}.{rest if kind == 'attentions' else RESNET[rest]}"

    out = {}
    for released, tensor in state.items():
        module, _, leaf = released.rpartition(".")
        out[f"model.diffusion_model.{name(module)}.{leaf}"] = tensor
    return out


def vae(state: dict, levels: int) -> dict:
    out = {}
    for k, v in state.items():
        if ".attentions." in k and v.ndim == 2:
            v = v[:, :, None, None]
        k = re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", k)
        for new, old in VAE:
            k = k.replace(new, old)
        out["first_stage_model." + k] = v
    return out


def text_encoder(state: dict) -> dict:
    return {"conditioner.embedders.0.transformer." + k: v for k, v in state.items()}


def text_encoder_2(state: dict) -> dict:
    out, thirds = {}, {}
    for k, v in state.items():
        short = k.removeprefix("text_model.")
        if k == "text_projection.weight":
            out["text_projection"] = v.T
        elif short in TOPS:
            out[TOPS[short]] = v
        elif m := re.match(rf"{IN_LAYER}\.self_attn\.([qkv])_proj\.(weight|bias)", short):
            thirds.setdefault(f"transformer.resblocks.{m[1]}.attn.in_proj_{m[3]}", {})[m[2]] = v
        else:
            short = short.replace("encoder.layers", "transformer.resblocks")
            for new, old in LAYER:
                short = short.replace(new, old)
            out[short] = v
    out |= {k: torch.cat([t[c] for c in "qkv"]) for k, t in thirds.items()}
    return {"conditioner.embedders.1.model." + k: v.contiguous() for k, v in out.items()}
