"""A folder of SDXL's full size with random weights, float16, 7 GB: what it takes can be measured
with it, and nothing drawn.

    python -m bench.full_size FOLDER
    python train_text.py --model FOLDER --pos "an old person" --neg "a young person" --dry-run"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from formats.single_file import SDXL
from sdxl import MINIATURE, best_device
from support import cli

FACTS = Path(__file__).parent.parent / "tests" / "facts"  # names and shapes of released SDXL


def random_weights(shapes: dict, device) -> dict:
    """Of a size at which activations stay near 1."""
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            fill = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            state[name] = torch.full(shape, fill, dtype=torch.float16)
            continue
        table = name.endswith(("token_embedding.weight", "position_embedding.weight"))
        std = 0.02 if table else torch.Size(shape[1:]).numel() ** -0.5
        state[name] = (std * torch.randn(shape, device=device)).half().cpu().contiguous()
    return state


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("folder")
    folder = cli.output_folder(p.parse_args().folder)
    torch.manual_seed(0)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / part).mkdir(exist_ok=True)
        name = "model" if "text" in part else "diffusion_pytorch_model"
        shapes = json.loads((FACTS / f"sdxl_{part}_keys.json").read_text())
        state = random_weights(shapes, best_device())
        save_file(state, folder / part / f"{name}.safetensors", metadata={"format": "pt"})
        cli.write_text(folder / part / "config.json", json.dumps(SDXL[part]))
    for tokenizer in ("tokenizer", "tokenizer_2"):
        without = shutil.ignore_patterns("known_words.txt")
        shutil.copytree(MINIATURE / tokenizer, folder / tokenizer, ignore=without)
    (folder / "scheduler").mkdir(exist_ok=True)
    settings = folder / "scheduler" / "scheduler_config.json"
    cli.write_text(settings, json.dumps(SDXL["scheduler"]))
    second = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    cli.write_text(folder / "model_index.json", json.dumps(SDXL["model_index"] | second))


if __name__ == "__main__":
    cli.run(main)
