"""Pictures, a sweep and many sliders against the diffusers pipeline, on the miniature:  python -m bench.many

Two seeds at 20 steps, guidance 5, from prompt to PIL picture, LoRAs of random weights on from the first step in both: no
slider, one, fifty different ones (diffusers has them as peft adapters), and seven scales of one: ours as a sweep, with the
slider on from the start and with a start of 0.4, theirs as seven calls. All take turns; medians.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

import lora
import slider
from sdxl import MINIATURE, SDXL
from support import cli

PROMPT, SEEDS, STEPS = "a photo of a person", [0, 1], 20
SCALES = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]


def random_slider(unet, seed: int) -> lora.Slider:
    torch.manual_seed(seed)
    out = lora.Slider(lora.target_layers(unet), rank=[2, 4, 8][seed % 3]).to(
        next(unet.parameters())
    )
    for name, p in out.named_parameters():
        if "lora_up" in name:
            p.data.normal_(std=1e-3)
    return out.requires_grad_(False)


def ours(model, sliders) -> dict:
    """name -> what to time."""
    draw = lambda columns, start=0.0: slider.sweep(
        model, PROMPT, SEEDS, columns, steps=STEPS, start=start
    )
    one = sliders[0]
    return {
        "a picture": lambda: draw([[]]),
        "one slider": lambda: draw([[(one, 1.0)]]),
        "50 sliders": lambda: draw([[(s, 0.1) for s in sliders]]),
        "seven scales": lambda: draw([[(one, s)] for s in SCALES]),
        "seven scales, start 0.4": lambda: draw([[(one, s)] for s in SCALES], 0.4),
        "seven scales, start 0.4, one by one": lambda: [draw([[(one, s)]], 0.4) for s in SCALES],
    }


def theirs(dtype, files) -> dict:
    import diffusers

    diffusers.utils.logging.disable_progress_bar(), diffusers.utils.logging.set_verbosity_error()
    load = lambda: diffusers.StableDiffusionXLPipeline.from_pretrained(
        MINIATURE, torch_dtype=dtype, add_watermarker=False
    )
    plain, with_one, with_fifty = load(), load(), load()
    for pipe in (plain, with_one, with_fifty):
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with_one.load_lora_weights(files[0], adapter_name="s0")
    for i, file in enumerate(files):
        with_fifty.load_lora_weights(file, adapter_name=f"s{i}")
    with_fifty.set_adapters([f"s{i}" for i in range(len(files))], [0.1] * len(files))

    def draw(pipe):
        return pipe(
            [PROMPT] * len(SEEDS),
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        ).images

    def at(scale):
        with_one.set_adapters(["s0"], [scale])
        return draw(with_one)

    return {
        "a picture": lambda: draw(plain),
        "one slider": lambda: at(1.0),
        "50 sliders": lambda: draw(with_fifty),
        "seven scales": lambda: [at(s) for s in SCALES],
    }


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        action="append",
        help="may be repeated (default: both)",
    )
    p.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    args = p.parse_args()
    print(
        "| dtype | two seeds, 20 steps | ours, s (range) | diffusers, s (range) | ratio of medians |\n|---|---|---|---|---|"
    )
    for dtype in args.dtype or ["float32", "bfloat16"]:
        model = SDXL.load(device="cpu", dtype=cli.DTYPES[dtype])
        sliders = [random_slider(model.unet, i) for i in range(50)]
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / f"s{i}.safetensors") for i in range(50)]
            for file, s in zip(files, sliders):
                lora.save(file, s, {})
            both = {"ours": ours(model, sliders), "diffusers": theirs(cli.DTYPES[dtype], files)}
        seconds = {}
        for _ in range(args.rounds + 1):
            for what in both["ours"]:
                for who, runs in both.items():
                    if what in runs:
                        started = time.time()
                        runs[what]()
                        seconds.setdefault((who, what), []).append(time.time() - started)
        seconds = {key: s[1:] for key, s in seconds.items()}  # the first is a warm-up
        middle = {key: statistics.median(s) for key, s in seconds.items()}
        cell = (
            lambda key: f"{middle[key]:.2f} ({min(seconds[key]):.2f} to {max(seconds[key]):.2f})"
            if key in middle
            else ""
        )
        for what in both["ours"]:
            mine, other = (
                ("ours", what),
                ("diffusers", what if ("diffusers", what) in middle else "seven scales"),
            )
            print(
                f"| {dtype} | {what} | {cell(mine)} | {cell(('diffusers', what))} | {middle[mine] / middle[other]:.2f} |",
                flush=True,
            )
        print(
            f"\n50 sliders to one: ours {middle['ours', '50 sliders'] / middle['ours', 'one slider']:.2f}, diffusers "
            f"{middle['diffusers', '50 sliders'] / middle['diffusers', 'one slider']:.2f}; a sweep with a start of 0.4 to seven runs with it: "
            f"{middle['ours', 'seven scales, start 0.4'] / middle['ours', 'seven scales, start 0.4, one by one']:.2f}\n"
        )


if __name__ == "__main__":
    cli.run(main)
