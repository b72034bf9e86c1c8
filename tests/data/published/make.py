"""Let the published trainers themselves write a tiny slider file each, on the miniature.

    python tests/data/published/make.py --authors DIR --ai-toolkit DIR --ai-python PYTHON

The options are those of bench.published, which sets the trainers up. One iteration, one layer,
rank 1; written beside this script:

    authors.safetensors     train_lora_xl.py at a465294, method "noxattn-hspace-last": the tensors
                            of the .pt that it wrote (no pickles in a repository)
    ai-toolkit.safetensors  its concept slider at 27a03a91, one attention layer"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from bench import published  # noqa: E402
from miniature import pairs  # noqa: E402
from support import images  # noqa: E402


def main():
    args = published.parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        published.prepare(args, folder)

        out = folder / "authors_out"
        out.mkdir()
        command = published.authors(folder / "authors", out, "eye_size", False, 1, 1)
        config = json.loads((out / "config.yaml").read_text())
        config["network"] |= {"rank": 1, "training_method": "noxattn-hspace-last"}
        (out / "config.yaml").write_text(json.dumps(config))
        rows = published.run(args.python, out / "log", 0, command, folder / "authors")
        save_file(torch.load(rows[-1]["file"], weights_only=True), HERE / "authors.safetensors")

        out = folder / "ai-toolkit_out"
        out.mkdir()
        for i, (picture,) in enumerate(pairs.draw("eye_size", (1.0,), 2)):
            images.save_image(picture, folder / "pictures" / f"{i}.png")
        clone, pictures = folder / "ai-toolkit", folder / "pictures"
        command = published.ai_toolkit(clone, out, pictures, "eye_size", 1, 1, 0)
        config = json.loads((out / "config.json").read_text())
        network = {"linear": 1, "linear_alpha": 0.5}
        network["network_kwargs"] = {
            "only_if_contains": ["mid_block_attentions_0_transformer_blocks_0_attn1_to_q"]
        }
        config["config"]["process"][0]["network"] |= network
        (out / "config.json").write_text(json.dumps(config))
        rows = published.run(args.ai_python, out / "log", 0, command, folder / "ai-toolkit")
        shutil.copy(rows[-1]["file"], HERE / "ai-toolkit.safetensors")


if __name__ == "__main__":
    main()
