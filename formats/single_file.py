"""SDXL as one .safetensors file in the original naming, the form most fine-tunes are shared in.

The same tensors as in the released folder under other names (Rombach et al.'s latent-diffusion
code for UNet and VAE, OpenCLIP for the second text encoder), so reading one is renaming: `rename`
gives for each tensor of the file the part it belongs to, its released name, and what else is to be
done to it. `configs` reads every size from the shapes.

What the file does not hold (tokenizers, noise schedule, what shapes cannot tell) comes from a base
folder, or is SDXL 1.0's; see weights.from_single_file."""

import re

import torch

PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}

# What each part is made of. All else in a file is left from training or merging, and left out: a
# VAE's loss, sampling constants, an EMA, marks such as v_pred (schedule.of_single_file).
MODULES = re.compile(
    r"model\.diffusion_model\."
    r"|first_stage_model\.(encoder|decoder|(post_)?quant_conv)\."
    r"|conditioner\.embedders\.0\.transformer\.text_model\."
    r"|conditioner\.embedders\.1\.model\."
)
# Never used: integers 0 ... 76, the contrastive temperature, a mask that is made anew; constants
# beside the UNet's layers.
UNUSED = re.compile(
    r"(.*\.)?(position_ids|logit_scale|attn_mask)$"
    r"|model\.diffusion_model\.(?!.*\.(weight|bias)$)"
)


def is_left_out(name: str) -> bool:
    """Whether this is a tensor that no part of SDXL needs."""
    return bool(UNUSED.match(name) or not MODULES.match(name))


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
OPENCLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def rename(shapes: dict[str, tuple]) -> dict[str, list[tuple[str, str, str]]]:
    """{name in the file: shape} -> {part: [(released name, name in the file, what to do)]}.

    What to do: "" nothing; "squeeze" a 1x1 convolution to a matrix; "transpose"; "q", "k" or "v":
    that third of the rows. Raises ValueError for a tensor that belongs to no part of SDXL."""
    out: dict[str, list] = {part: [] for part in PARTS.values()}
    strangers: list[str] = []
    per_level = _blocks_per_level(shapes)
    vae_levels = 1 + max(_indices(r"first_stage_model\.decoder\.up\.(\d+)\.", shapes), default=-1)
    for name, shape in shapes.items():
        if is_left_out(name):
            continue
        prefix = next((p for p in PARTS if name.startswith(p)), "")
        short = name.removeprefix(prefix)
        module, _, leaf = short.rpartition(".")
        renamed = []
        if prefix == "model.diffusion_model.":
            new = _unet(module, per_level)
            renamed = [(f"{new}.{leaf}", "")] if new else []
        elif prefix == "first_stage_model.":
            new = _vae(module, vae_levels)
            action = "squeeze" if new and ".attentions." in new and len(shape) == 4 else ""
            renamed = [(f"{new}.{leaf}", action)] if new else []
        elif prefix == "conditioner.embedders.0.transformer.":
            renamed = [(short, "")]
        elif prefix == "conditioner.embedders.1.model.":
            renamed = _openclip(short)
        if not renamed:
            strangers.append(name)
        for new, action in renamed:
            out[PARTS[prefix]].append((new, name, action))
    if strangers:
        raise ValueError(
            f"{len(strangers)} tensors that SDXL does not have, such as {strangers[0]}"
        )
    return out


def _indices(pattern: str, names) -> set[int]:
    """The numbers that the pattern's one group finds in those names that begin with the pattern."""
    return {int(m[1]) for name in names if (m := re.match(pattern, name))}


def _blocks_per_level(shapes) -> int:
    """Input blocks in a level of the UNet: its layers and a downsampler, 3 in SDXL. input_blocks.0
    is conv_in, so the first downsampler's number says it."""
    downsampler = r"model\.diffusion_model\.input_blocks\.(\d+)\.0\.op\.weight"
    return min(_indices(downsampler, shapes), default=3)


def missing_parts(names) -> list[str]:
    """Those of PARTS of which there is no tensor."""
    there = lambda prefix: any(name.startswith(prefix) for name in names)
    return [part for prefix, part in PARTS.items() if not there(prefix)]


def _unet(module: str, per_level: int) -> str | None:
    """input_blocks.4.1.norm -> down_blocks.1.attentions.0.norm and so on; None for no module of
    SDXL's."""
    if module in UNET_ENDS:
        return UNET_ENDS[module]
    if m := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.*)", module):
        down, n, slot, rest = m[1] == "input", int(m[2]), int(m[3]), m[4]
        level, layer = divmod(n - 1 if down else n, per_level)  # input block 0 is conv_in
        where = f"down_blocks.{level}" if down else f"up_blocks.{level}"
        if rest == "op":
            return f"{where}.downsamplers.0.conv"
        if rest == "conv":
            return f"{where}.upsamplers.0.conv"
        kind = "attentions" if slot else "resnets"
    elif m := re.match(r"middle_block\.(\d)\.(.*)", module):
        where, layer, rest = "mid_block", int(m[1]) // 2, m[2]  # resnet, transformer, resnet
        kind = "attentions" if m[1] == "1" else "resnets"
    else:
        return None
    if kind == "resnets":
        rest = RESNET.get(rest)
    return rest and f"{where}.{kind}.{layer}.{rest}"


def original_names(layers, per_level: int) -> dict[str, str]:
    """{released name of a UNet's layer: its original one}, the way back of `_unet`."""
    back = {new: old for old, new in UNET_ENDS.items()}
    inside = {new: old for old, new in RESNET.items()}
    out = {}
    kinds = r"(resnets|attentions|downsamplers|upsamplers)"
    for name in layers:
        m = re.match(rf"(down|mid|up)_blocks?\.(?:(\d+)\.)?{kinds}\.(\d+)\.(.*)", name)
        if not m:
            out[name] = back[name]
            continue
        side, level, kind, layer, rest = m[1], int(m[2] or 0), m[3], int(m[4]), m[5]
        rest = inside[rest] if kind == "resnets" else rest
        slot = int(kind == "attentions")
        if side == "mid":
            out[name] = f"middle_block.{1 if slot else 2 * layer}.{rest}"
        elif kind == "downsamplers":
            out[name] = f"input_blocks.{(level + 1) * per_level}.0.op"
        elif kind == "upsamplers":
            # After the level's last resnet and, where there is one, transformer.
            transformers = f"up_blocks.{level}.attentions."
            slot = 2 if any(other.startswith(transformers) for other in layers) else 1
            out[name] = f"output_blocks.{(level + 1) * per_level - 1}.{slot}.conv"
        elif side == "down":
            out[name] = f"input_blocks.{1 + level * per_level + layer}.{slot}.{rest}"
        else:
            out[name] = f"output_blocks.{level * per_level + layer}.{slot}.{rest}"
    return out


def _vae(module: str, levels: int) -> str | None:
    """decoder.up.3.block.0.conv1 -> decoder.up_blocks.0.resnets.0.conv1: the original counts its
    decoder backwards."""
    module = module.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    if m := re.match(
        r"(encoder|decoder)\.(down|up)\.(\d+)\.(block\.(\d+)\.(\w+)|(?:down|up)sample\.conv)$",
        module,
    ):
        side, way, level, rest, layer, leaf = m.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        return f"{side}.{way}_blocks.{level}." + (
            f"resnets.{layer}.{leaf}" if layer else f"{way}samplers.0.conv"
        )
    if m := re.match(r"(encoder|decoder)\.mid\.block_([12])\.(\w+)$", module):
        return f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.{m[3]}"
    if m := re.match(r"(encoder|decoder)\.mid\.attn_1\.(\w+)$", module):
        layer = VAE_ATTENTION.get(m[2])
        return layer and f"{m[1]}.mid_block.attentions.0.{layer}"
    known = re.fullmatch(
        r"(post_)?quant_conv|(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)", module
    )
    return module if known else None


def _openclip(name: str) -> list[tuple[str, str]]:
    """OpenCLIP's name -> transformers' names; its q, k and v are one matrix, so that one can
    become three."""
    if name == "text_projection":
        return [("text_projection.weight", "transpose")]
    if name == "text_projection.weight":  # of a linear layer: as it is
        return [(name, "")]
    if name in OPENCLIP:
        return [("text_model." + OPENCLIP[name], "")]
    m = re.match(r"transformer\.resblocks\.(\d+)\.(.*?)[._](weight|bias)$", name)
    if not m:
        return []
    layer = f"text_model.encoder.layers.{m[1]}."
    if m[2] == "attn.in_proj":
        return [(f"{layer}self_attn.{c}_proj.{m[3]}", c) for c in "qkv"]
    return [(f"{layer}{OPENCLIP_LAYER[m[2]]}.{m[3]}", "")] if m[2] in OPENCLIP_LAYER else []


def transform(tensor: torch.Tensor, action: str) -> torch.Tensor:
    """Do to a tensor what `rename` said. Views where possible: no copy of the mapped file."""
    if action == "squeeze":
        return tensor.flatten(1)
    if action == "transpose":
        return tensor.T.contiguous()
    if action:
        return tensor.chunk(3)["qkv".index(action)]
    return tensor


# -------------------------------------------------------------------------------------------- sizes

CLIP = dict(max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, vocab_size=49408)
SDXL = {  # the configurations of SDXL 1.0, for what shapes do not tell
    "model_index": dict(_class_name="StableDiffusionXLPipeline", force_zeros_for_empty_prompt=True),
    "scheduler": dict(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    ),
    "unet": dict(
        sample_size=128,
        in_channels=4,
        out_channels=4,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[320, 640, 1280],
        layers_per_block=2,
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
        norm_num_groups=32,
        norm_eps=1e-5,
    ),
    "vae": dict(
        in_channels=3,
        out_channels=3,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=True,
    ),
    "text_encoder": CLIP
    | dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_act="quick_gelu",
        projection_dim=768,
        pad_token_id=49407,
    ),
    "text_encoder_2": CLIP
    | dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
        pad_token_id=0,
    ),
}


def configs(shapes: dict[str, tuple], base: dict[str, dict]) -> dict[str, dict]:
    """base: {part: config}, SDXL's or a folder's -> the same with every size that shapes tell, of
    the parts that are there. shapes: by names in the file."""
    prefixes = {part: prefix for prefix, part in PARTS.items()}
    shape = lambda part, name: shapes[prefixes[part] + name]
    count = lambda pattern: len(_indices(pattern, shapes))
    out = {part: dict(config) for part, config in base.items()}
    missing = missing_parts(shapes)

    unet, per_level = out["unet"], _blocks_per_level(shapes)
    inputs = r"model\.diffusion_model\.input_blocks"
    levels = -(-(count(rf"{inputs}\.(\d+)\.") - 1) // per_level)
    widths, depths = [], []
    for level in range(levels):
        i = 1 + level * per_level  # the level's first resnet, and its transformer's blocks
        widths.append(shape("unet", f"input_blocks.{i}.0.out_layers.3.weight")[0])
        depths.append(count(rf"{inputs}\.{i}\.1\.transformer_blocks\.(\d+)\.") or 1)
    # Channels in a head: no shape tells.
    head = unet["block_out_channels"][0] // unet["attention_head_dim"][0]
    to_k = [n for n in shapes if n.startswith(prefixes["unet"]) and n.endswith("attn2.to_k.weight")]
    if not to_k:
        raise KeyError("attn2.to_k.weight")
    unet |= dict(
        block_out_channels=widths,
        layers_per_block=per_level - 1,
        transformer_layers_per_block=depths,
        attention_head_dim=[w // head for w in widths],
        in_channels=shape("unet", "input_blocks.0.0.weight")[1],
        out_channels=shape("unet", "out.2.weight")[0],
        projection_class_embeddings_input_dim=shape("unet", "label_emb.0.0.weight")[1],
        cross_attention_dim=shapes[to_k[0]][1],
    )

    if "vae" not in missing:
        vae_levels = count(r"first_stage_model\.encoder\.down\.(\d+)\.")
        width = lambda i: shape("vae", f"encoder.down.{i}.block.0.conv1.weight")[0]
        out["vae"] |= dict(
            block_out_channels=[width(i) for i in range(vae_levels)],
            layers_per_block=count(r"first_stage_model\.encoder\.down\.0\.block\.(\d+)\."),
            latent_channels=shape("vae", "decoder.conv_in.weight")[1],
        )

    encoders = {
        "text_encoder": (
            "text_model.embeddings.token_embedding.weight",
            "text_model.encoder.layers.0.mlp.fc1.weight",
            r"transformer\.text_model\.encoder\.layers\.(\d+)\.",
        ),
        "text_encoder_2": (
            "token_embedding.weight",
            "transformer.resblocks.0.mlp.c_fc.weight",
            r"model\.transformer\.resblocks\.(\d+)\.",
        ),
    }
    for i, (part, (embedding, mlp, layers)) in enumerate(encoders.items()):
        if part in missing:
            continue
        encoder = out[part]
        head = encoder["hidden_size"] // encoder["num_attention_heads"]
        vocabulary, hidden = shape(part, embedding)
        encoder |= dict(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_attention_heads=hidden // head,
            intermediate_size=shape(part, mlp)[0],
            num_hidden_layers=count(rf"conditioner\.embedders\.{i}\.{layers}"),
        )
    projection = prefixes["text_encoder_2"] + "text_projection"
    if projection in shapes:
        out["text_encoder_2"]["projection_dim"] = shapes[projection][1]
    elif f"{projection}.weight" in shapes:
        out["text_encoder_2"]["projection_dim"] = shapes[f"{projection}.weight"][0]
    return out


# ----------------------------------------------------------------------------------- what a file is


def identify(shapes: dict[str, tuple]) -> str:
    """ "sdxl", or in words what else a file with these tensors is."""
    starts = lambda *prefixes: any(name.startswith(prefixes) for name in shapes)
    lora = r"lora_(up|down|[AB])\b|\.lora\.|lokr_|hada_|\.dora_scale|\.lora_"
    transformers = ("joint_blocks.", "double_blocks.")
    if any(re.search(lora, name) for name in shapes):
        use = "(--slider takes sliders, --merge other LoRAs)"
        return f"a LoRA or slider file, which changes a model and is none {use}"
    if starts("cond_stage_model.model."):
        return "a Stable Diffusion 2 checkpoint; only SDXL is supported"
    if starts("cond_stage_model."):
        return "a Stable Diffusion 1.x checkpoint; only SDXL is supported"
    if starts(*transformers, *(f"model.diffusion_model.{name}" for name in transformers)):
        return "a diffusion transformer (SD 3 or Flux); only SDXL is supported"
    if "conditioner.embedders.0.model.ln_final.weight" in shapes:
        return "the SDXL refiner, which has one text encoder; sliders need the base model"
    if starts("edm_mean", "edm_std", "edm_vpred."):
        what = "an EDM checkpoint (as Playground v2.5 or CosXL)"
        return f"{what}, which is noised and scaled in another way"
    if any(name.endswith(("scaled_fp8", ".scale_weight", ".weight_scale")) for name in shapes):
        how = "multiply each weight by its scale and save it in float16 (plain float8 is read)"
        return f"a checkpoint in scaled float8, whose weights need their scales; {how}"
    missing = missing_parts(shapes)
    if len(missing) == len(PARTS):
        if "conv_in.weight" in shapes and "add_embedding.linear_1.weight" in shapes:
            return "one part (the UNet) of an SDXL folder; give the folder"
        return "no SDXL checkpoint: none of its tensors has a name that SDXL's have"
    if "unet" in missing:
        return "an incomplete SDXL checkpoint: it lacks the unet"
    return "sdxl"
