"""Pictures for the generator to learn from, and pictures that it makes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.stylegan.generator import SIZE, Generator, Z
from miniature import world

WEIGHTS = Path(__file__).parent / "generator.safetensors"


def load(path=WEIGHTS) -> Generator:
    """The trained generator, in float32."""
    G = Generator()
    G.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return G.eval().requires_grad_(False)


def faces(count: int, seed: int) -> torch.Tensor:
    """Drawn faces (count, 3, 64, 64), bytes."""
    rngs = [np.random.default_rng([seed, i]) for i in range(count)]
    pictures = [world.draw(world.sample(rng, kind="face", malformed=0)) for rng in rngs]
    arrays = np.stack([picture.resize((SIZE, SIZE), Image.BOX) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def to_unit(x):
    """Bytes -> [-1, 1]."""
    return x.float() / 127.5 - 1


def enlarged(x) -> list[Image.Image]:
    """Pictures (B, 3, 64, 64) in [-1, 1] at the world's own size."""
    arrays = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a).resize((world.SIZE, world.SIZE), Image.BICUBIC) for a in arrays]


@torch.no_grad()
def drawn(G: Generator, count: int, seed: int, truncation: float = 1.0) -> list[Image.Image]:
    """Pictures that the generator makes of noise."""
    random, pictures = torch.Generator().manual_seed(seed), []
    while len(pictures) < count:
        n = min(64, count - len(pictures))
        styles = G.styles(G.w(torch.randn(n, Z, generator=random), truncation))
        pictures += enlarged(G.synthesis(styles, G.noise(n, random)))
    return pictures
