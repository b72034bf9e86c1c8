"""CLIP, for train_space.py: features of pictures and of prompts in one space, and words for the
directions in it."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import sampler

SIDE = 128  # pixels: of what ConvolutionalEncoder takes


class ConvolutionalEncoder(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> (B, outputs). Half the size four times, then two
    linear layers. The bundled miniature's image encoder is one, and so is its measuring stick."""

    def __init__(self, outputs: int, channels=(24, 48, 96, 160)):
        super().__init__()
        norm_relu = lambda c: [nn.BatchNorm2d(c), nn.ReLU()]
        c = channels
        layers = [nn.Conv2d(3, c[0], 5, stride=2, padding=2), *norm_relu(c[0])]  # 64x64
        for c_in, c_out in zip(c, c[1:]):  # 32x32, 16x16, 8x8
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), *norm_relu(c_out)]
            layers += [nn.Conv2d(c_out, c_out, 3, padding=1), *norm_relu(c_out)]
        layers += [nn.Conv2d(c[-1], 48, 1), nn.ReLU(), nn.Flatten()]  # (B, 48 * 8 * 8)
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(48 * 64, 160), nn.ReLU(), nn.Linear(160, outputs))

    def forward(self, x):
        return self.head(self.features(x))


def load_encoder(folder: Path) -> ConvolutionalEncoder:
    """The image encoder in a model's folder image_encoder/, in float32."""
    config = json.loads((folder / "config.json").read_text())
    encoder = ConvolutionalEncoder(config["outputs"], config["channels"])
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return encoder.eval().requires_grad_(False)


def towers(clip: str | None, model):
    """CLIP's two halves: pictures (b, 3, H, W) in [-1, 1] -> (b, d), with gradients; prompts ->
    (b, d).

    clip: a folder or Hub id. None takes the image encoder that the model's own folder brings,
    which was trained with its second text encoder; ValueError if there is none."""
    if clip is None:
        folder = model.folder and model.folder / "image_encoder"
        config = folder / "config.json" if folder else None
        # Another one, such as an IP-Adapter's, is no half of a CLIP that knows words too.
        if not config or not config.exists() or "outputs" not in json.loads(config.read_text()):
            what = "a CLIP model, folder or Hub id, such as openai/clip-vit-large-patch14"
            raise ValueError(f"--clip is needed: {what}")
        encode = lambda prompts: model.encode_prompt(prompts)[1].cpu()
        encoder = load_encoder(folder).to(model.device)
        return lambda x: encoder(F.adaptive_avg_pool2d(x, SIDE)), encode
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    net = CLIPModel.from_pretrained(clip).float().eval().requires_grad_(False).to(model.device)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    side = net.config.vision_config.image_size
    colours = lambda rgb: torch.tensor(rgb, device=model.device).view(1, 3, 1, 1)
    mean, std = colours(OPENAI_CLIP_MEAN), colours(OPENAI_CLIP_STD)

    def see(x):  # average-pooled to CLIP's size: cheap, smooth, and what the paper's code does
        pixels = (F.adaptive_avg_pool2d((x + 1) / 2, side) - mean) / std
        return tensor_of(net.get_image_features(pixel_values=pixels))

    def encode(prompts):
        tokens = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True)
        return tensor_of(net.get_text_features(**tokens.to(model.device))).cpu()

    return see, encode


def tensor_of(output):
    """CLIP's features: transformers 5 wraps what transformers 4 returned bare."""
    return output if torch.is_tensor(output) else output.pooler_output


def features(model, encoder, x_0):
    """Unit-length CLIP features (b, d), float32, of latents x_0 (b, 4, h, w), with gradients.
    encoder: the first of `towers`."""
    pictures = model.vae.decode(x_0.to(next(model.vae.parameters()).dtype))
    return F.normalize(encoder(sampler.at_least_float32(pictures)), dim=-1)


@torch.no_grad()
def name_directions(encode, prompt: str, words: list[str], v) -> list[list[str]]:
    """For each direction v (k, d) the words whose addition to the prompt moves CLIP's text feature
    most along it and most against it: ["+ hat, old, grey", "- young, ..."]. A hint, no more:
    pictures and words lie apart in CLIP's space. encode: prompts -> (n, d)."""
    f = F.normalize(encode([prompt] + [f"{prompt}, {word}" for word in words]).float(), dim=-1)
    along = F.normalize(f[1:] - f[0], dim=-1) @ v.cpu().T  # (words, k)
    top = lambda values: ", ".join(words[j] for j in values.argsort(descending=True)[:3])
    return [[f"+ {top(a)}", f"- {top(-a)}"] for a in along.T]


WORDS = """
old young child smiling serious dark bright colorful gray red green blue yellow white black
indoors outdoors night day winter summer close-up distant man woman crowd alone modern ancient
luxury poor city nature forest beach mountain painting photograph drawing cartoon statue blurry
detailed simple big small hat glasses beard long-hair short-hair uniform casual elegant happy sad
angry
""".split()


def words_of(model, path=None) -> list[str]:
    """Words to name directions with: of the file `path`, one a line; without one those the model
    was trained on, where its folder lists them."""
    if path:
        return [word.strip() for word in Path(path).read_text().splitlines() if word.strip()]
    return sorted(model.known_words) if model.known_words else WORDS
