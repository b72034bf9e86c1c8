"""Files that people who have SDXL bring along: whole ones by names and shapes alone (no gigabytes),
small ones read, and what is fetched from the Hub."""

import json
import shutil
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_weights import one_file, same

from formats import single_file, weights
from sdxl import MINIATURE, SDXL

FACTS = Path(__file__).parent / "facts"
FULL = json.loads((FACTS / "sdxl_single_file_keys.json").read_text())
ENCODERS = ("conditioner.embedders.0.", "conditioner.embedders.1.")
PROJECTION = "conditioner.embedders.1.model.text_projection"


def sparse_file(path, shapes: dict) -> Path:
    """A .safetensors file with these names and shapes, float16, whose contents are a hole."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


def without(names: dict, *prefixes) -> dict:
    return {name: value for name, value in names.items() if not name.startswith(prefixes)}


LEFTOVERS = {
    "first_stage_model.loss.discriminator.main.0.weight": [64, 3, 4, 4],
    "first_stage_model.loss.logvar": [],
    "first_stage_model.model_ema.decay": [],
    "model.diffusion_model.betas": [1000],
    "model.diffusion_model.posterior_mean_coef1": [1000],
    "model_ema.diffusion_modelinput_blocks00weight": [320, 4, 3, 3],
    "denoiser.sigmas": [1000],
    "alphas_cumprod": [1000],
    "conditioner.embedders.0.transformer.text_projection.weight": [768, 768],
    "conditioner.embedders.0.text_projection": [768, 768],
    "conditioner.embedders.1.model.attn_mask": [77, 77],
    "v_pred": [0],
    "anything.a.merger.wrote": [3],
}


@pytest.mark.parametrize("more", [{}, LEFTOVERS], ids=["published", "with leftovers"])
def test_a_full_size_file_is_read_whatever_was_left_in_it(more, tmp_path):
    path = sparse_file(tmp_path / "m.safetensors", FULL | more)
    found = weights.find_weights(path, MINIATURE)
    for part in weights.PARTS:
        expected = json.loads((FACTS / f"sdxl_{part}_keys.json").read_text())
        assert found.tensors(part).keys() == {n for n in expected if "position_ids" not in n}


def test_the_projection_has_two_names(tmp_path, model):
    """A matrix to be transposed, or a linear layer's weight."""
    other = without(FULL, PROJECTION) | {f"{PROJECTION}.weight": FULL[PROJECTION]}
    found = weights.find_weights(sparse_file(tmp_path / "m.safetensors", other), MINIATURE)
    assert found.configs["text_encoder_2"]["projection_dim"] == 1280
    rename = lambda tensors: without(tensors, PROJECTION) | {
        f"{PROJECTION}.weight": tensors[PROJECTION].T.contiguous()
    }
    file = one_file(tmp_path / "small.safetensors", rename)
    assert same(model, SDXL.load(file, device="cpu", base=MINIATURE))


@pytest.mark.parametrize(
    "more, what",
    [
        ({"edm_mean": [4], "edm_std": [4]}, "an EDM checkpoint .as Playground v2.5 or CosXL."),
        ({"edm_vpred.sigma_max": [1], "edm_vpred.sigma_min": [1]}, "an EDM checkpoint"),
        ({"scaled_fp8": [2]}, "scaled float8.*multiply each weight by its scale"),
        ({"model.diffusion_model.out.2.scale_weight": []}, "scaled float8"),
        ({"model.diffusion_model.extra.weight": [4, 4]}, "1 tensors that SDXL does not have"),
    ],
)
def test_another_formulation_is_named(more, what, tmp_path):
    with pytest.raises(ValueError, match=f"m.safetensors: .*{what}"):
        weights.find_weights(sparse_file(tmp_path / "m.safetensors", FULL | more), MINIATURE)


def test_plain_float8_is_read(tmp_path, inputs, model):
    to_8 = lambda tensors: {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}
    file = one_file(tmp_path / "m.safetensors", to_8)
    read = SDXL.load(file, device="cpu", dtype=torch.float32, base=MINIATURE)
    with torch.no_grad():
        error = (read.unet(*inputs) - model.unet(*inputs)).norm() / model.unet(*inputs).norm()
    assert 1e-3 < error < 0.3  # three digits of a mantissa are left
    assert torch.equal(
        read.unet.conv_in.weight, model.unet.conv_in.weight.to(torch.float8_e4m3fn).float()
    )


@pytest.fixture
def sixteen_groups(monkeypatch):
    """What no shape tells is SDXL's, but for this: the miniature's layers have 16 groups."""
    monkeypatch.setitem(single_file.SDXL["unet"], "norm_num_groups", 16)


def copy_tokenizers(to: Path):
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MINIATURE / folder, to / folder)


def test_a_tokenizer_that_knows_no_end_has_sdxls(tmp_path, model):
    """Without tokenizer_config.json transformers' takes prompts of any length."""
    folder = tmp_path / "m"
    shutil.copytree(MINIATURE, folder)
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name / "tokenizer_config.json").unlink()
    read = SDXL.load(folder, device="cpu", vae=False)
    context, _ = read.encode_prompt(["an old man"])
    assert context.shape == model.encode_prompt(["an old man"])[0].shape


def test_the_vae_s_dtype_and_the_empty_prompt_are_as_the_configs_say(tmp_path):
    """SDXL's VAE overflows in half precision, and says so. Its empty prompt is all zeros, others'
    is what the text encoders make of it."""
    shutil.copytree(MINIATURE, tmp_path / "m")
    said = {"vae/config.json": "force_upcast", "model_index.json": "force_zeros_for_empty_prompt"}
    for value in (True, False):
        for name, key in said.items():
            file = tmp_path / "m" / name
            file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        read = SDXL.load(tmp_path / "m", device="cpu", dtype=torch.bfloat16)
        dtypes = {p.dtype for p in read.vae.parameters()}
        assert dtypes == {torch.float32 if value else torch.bfloat16}
        assert {p.dtype for p in read.unet.parameters()} == {torch.bfloat16}
        context, pooled = read.encode_prompt([""])
        assert bool(context.any()) == bool(pooled.any()) == (not value)


def test_groups_that_a_file_does_not_tell_are_asked_for(tmp_path):
    file = one_file(tmp_path / "m.safetensors")
    copy_tokenizers(tmp_path)
    with pytest.raises(ValueError, match=r"unet: its config.json .*without --base.* \(48\)"):
        SDXL.load(file, device="cpu", vae=False)


def test_parts_that_a_file_lacks_are_the_bases(tmp_path, model, sixteen_groups):
    for name, prefixes in (("vae", ("first_stage_model.",)), ("encoders", ENCODERS)):
        file = one_file(tmp_path / f"{name}.safetensors", lambda t: without(t, *prefixes))
        assert same(model, SDXL.load(file, device="cpu", base=MINIATURE))
    copy_tokenizers(tmp_path)
    lacks = "vae.safetensors: holds no vae: --base names"
    with pytest.raises(ValueError, match=lacks):
        SDXL.load(tmp_path / "vae.safetensors", device="cpu")
    assert SDXL.load(tmp_path / "vae.safetensors", device="cpu", vae=False).vae is None
    with pytest.raises(ValueError, match="encoders.safetensors: holds no text_encoder: --base"):
        SDXL.load(tmp_path / "encoders.safetensors", device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"transformer_layers_per_block": [0, [2, 2], [4, 4]]},
        {"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0]},
        {"mid_block_type": None},
    ],
)
def test_pruned_sdxl_is_named(change, tmp_path):
    shutil.copytree(MINIATURE, tmp_path / "m")
    config = tmp_path / "m" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match="a pruned SDXL, as Segmind's SSD-1B and Vega"):
        SDXL.load(tmp_path / "m")


@pytest.mark.parametrize(
    "part, name",
    [("unet", "sample_size"), ("unet", "addition_time_embed_dim"), ("vae", "scaling_factor")],
)
@pytest.mark.parametrize("value", [None, 0, "left out"])
def test_what_is_read_after_the_model_is_built_is_checked_before(part, name, value, tmp_path):
    shutil.copytree(MINIATURE, tmp_path / "m")
    path = tmp_path / "m" / part / "config.json"
    config = json.loads(path.read_text()) | {name: value}
    if value == "left out":
        del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"{part}: .*config.json .*{'' if value is None else name}"
    ):
        SDXL.load(tmp_path / "m")


# ------------------------------------------------------------------------------------------ the Hub

SMALL = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in weights.PARTS),
    *(f"tokenizer{n}/{name}" for n in ("", "_2") for name in ("vocab.json", "merges.txt")),
]
PLAIN = [f"{part}/{weights.stem_of(part)}.safetensors" for part in weights.PARTS]
HALF = [file.replace(".safetensors", ".fp16.safetensors") for file in PLAIN]
OTHERS = [
    "README.md",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_1_0/config.json",
    "vae_decoder/model.onnx",
    "unet/model.onnx_data",
    "unet/openvino_model.bin",
    "text_encoder/flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_flax_model.msgpack",
]
SHARDS = [
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
]


def test_one_precision_is_fetched_and_nothing_else():
    both = SMALL + PLAIN + HALF + OTHERS
    assert sorted(weights.needed_files(both, half=True)) == sorted(SMALL + HALF)
    assert sorted(weights.needed_files(both, half=False)) == sorted(SMALL + PLAIN)
    assert sorted(weights.needed_files(both, parts=())) == sorted(SMALL)
    assert sorted(weights.needed_files(both, ("vae",), True)) == sorted([*SMALL, HALF[1]])
    one = SMALL + HALF + OTHERS
    assert sorted(weights.needed_files(one, half=False)) == sorted(SMALL + HALF)
    sharded = SMALL + SHARDS + PLAIN[1:]
    assert sorted(weights.needed_files(sharded, half=True)) == sorted(sharded)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub: "someone/model" is the miniature in both precisions, with more beside
    it. Yields the files that were fetched, for each call."""
    source, fetched = tmp_path / "hub", []
    shutil.copytree(MINIATURE, source, ignore=shutil.ignore_patterns("image_encoder"))
    for plain, half in zip(PLAIN, HALF):
        shutil.copy(source / plain, source / half)
    (source / "one.safetensors").touch()
    files = [str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)

    def snapshot_download(name, allow_patterns=None, local_files_only=False):
        target = tmp_path / "cache"
        for file in allow_patterns or ():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, target / file)
        fetched.append(sorted(allow_patterns or ()))
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize("dtype, suffix", [(torch.float32, ""), (torch.bfloat16, ".fp16")])
def test_a_model_comes_from_the_hub(hub, dtype, suffix):
    model = SDXL.load("someone/model", device="cpu", dtype=dtype)
    assert model.dtype == dtype
    (files,) = hub
    loaded = [file for file in files if file.endswith(".safetensors")]
    assert loaded == sorted(f.replace(".safetensors", f"{suffix}.safetensors") for f in PLAIN)


def test_a_base_from_the_hub_lends_configs_and_tokenizers_alone(hub, tmp_path, model):
    file = one_file(tmp_path / "m.safetensors")
    assert same(model, SDXL.load(file, device="cpu", base="someone/model"))
    assert not any(name.endswith(".safetensors") for name in hub[0])
    file = one_file(tmp_path / "no_vae.safetensors", lambda t: without(t, "first_stage_model."))
    assert same(model, SDXL.load(file, device="cpu", base="someone/model"))
    assert [name for name in hub[1] if name.endswith(".safetensors")] == [PLAIN[1]]


@pytest.mark.parametrize("where", [("tokenizer", "tokenizer_2"), ("",), ("tokenizer",)])
def test_tokenizers_of_any_model_in_the_hubs_cache(
    where, tmp_path, monkeypatch, model, sixteen_groups
):
    """SDXL's own two, CLIP's at the root of its repository, Stable Diffusion 1's one."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--clip" / "snapshots" / "abc"
    for folder in where:
        shutil.copytree(MINIATURE / "tokenizer", snapshot / folder)
    other = cache / "models--another--gpt2" / "snapshots" / "abc"  # a tokenizer of another kind
    other.mkdir(parents=True)
    (other / "vocab.json").write_text('{"a": 0}')
    (other / "merges.txt").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    loaded = SDXL.load(one_file(tmp_path / "m.safetensors"), device="cpu", vae=False)
    pads = [tokenizer.pad_token for tokenizer in loaded.tokenizers]
    assert pads[0] == "<|endoftext|>" and (len(where) > 1 or pads[1] == "!")
    if len(where) == 1:
        padded = dict(padding="max_length", max_length=77)
        ids = lambda m: [tokenize("an old man", **padded).input_ids for tokenize in m.tokenizers]
        assert ids(loaded) == ids(model)
