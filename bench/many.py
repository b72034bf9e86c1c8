"""Pictures, a sweep and many sliders against the diffusers pipeline, on the miniature:

    python -m bench.many

Two seeds at 20 steps, guidance 5, from prompt to PIL picture, LoRAs of random weights on from the
first step in both: no slider, one, fifty different ones (diffusers has them as peft adapters), and
seven scales of one: ours as a sweep, with the slider on from the start and with a start of 0.4,
theirs as seven calls. All take turns; medians."""

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
    made = lora.Slider(lora.target_layers(unet), rank=[2, 4, 8][seed % 3])
    made = made.to(next(unet.parameters()))
    for name, p in made.named_parameters():
        if "lora_up" in name:
            p.data.normal_(std=1e-3)
    return made.requires_grad_(False)


def ours(model, sliders) -> dict:
    """{name: function to time}"""
    one, every = sliders[0], [(s, 0.1) for s in sliders]
    scales = [[(one, scale)] for scale in SCALES]

    def draw(columns, start=0.0):
        return slider.sweep(model, PROMPT, SEEDS, columns, steps=STEPS, start=start)

    return {
        "a picture": lambda: draw([[]]),
        "one slider": lambda: draw([[(one, 1.0)]]),
        "50 sliders": lambda: draw([every]),
        "seven scales": lambda: draw(scales),
        "seven scales, start 0.4": lambda: draw(scales, 0.4),
        "seven scales, start 0.4, one by one": lambda: [draw([scale], 0.4) for scale in scales],
    }


def theirs(dtype, files) -> dict:
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()

    def load():
        kind, settings = diffusers.StableDiffusionXLPipeline, dict(add_watermarker=False)
        pipe = kind.from_pretrained(MINIATURE, torch_dtype=dtype, **settings)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe

    plain, with_one, with_fifty = load(), load(), load()
    with_one.load_lora_weights(files[0], adapter_name="s0")
    names = [f"s{i}" for i in range(len(files))]
    for name, file in zip(names, files):
        with_fifty.load_lora_weights(file, adapter_name=name)
    with_fifty.set_adapters(names, [0.1] * len(names))

    def draw(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        settings = dict(num_inference_steps=STEPS, guidance_scale=5.0, generator=generators)
        return pipe([PROMPT] * len(SEEDS), **settings).images

    def at(scale):
        with_one.set_adapters(["s0"], [scale])
        return draw(with_one)

    return {
        "a picture": lambda: draw(plain),
        "one slider": lambda: at(1.0),
        "50 sliders": lambda: draw(with_fifty),
        "seven scales": lambda: [at(scale) for scale in SCALES],
    }


def measure(dtype, rounds: int) -> dict:
    """{(who, what): seconds, one for each round}"""
    model = SDXL.load(device="cpu", dtype=dtype)
    sliders = [random_slider(model.unet, i) for i in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"s{i}.safetensors") for i in range(50)]
        for file, one in zip(files, sliders):
            lora.save(file, one, {})
        both = {"ours": ours(model, sliders), "diffusers": theirs(dtype, files)}
    seconds = {}
    for _ in range(rounds + 1):
        for what in both["ours"]:
            for who, runs in both.items():
                if what in runs:
                    started = time.time()
                    runs[what]()
                    seconds.setdefault((who, what), []).append(time.time() - started)
    return {key: taken[1:] for key, taken in seconds.items()}  # the first is a warm-up


def print_table(dtype: str, seconds: dict):
    middle = {key: statistics.median(taken) for key, taken in seconds.items()}

    def cell(key):
        if key not in middle:
            return ""
        return f"{middle[key]:.2f} ({min(seconds[key]):.2f} to {max(seconds[key]):.2f})"

    def ratio(key, other):
        return f"{middle[key] / middle[other]:.2f}"

    for who, what in middle:
        if who == "ours":
            their_key = ("diffusers", what)
            cells = [cell(("ours", what)), cell(their_key)]
            against = their_key if their_key in middle else ("diffusers", "seven scales")
            cells.append(ratio(("ours", what), against))
            print(f"| {dtype} | {what} | {' | '.join(cells)} |", flush=True)
    fifty = {who: ratio((who, "50 sliders"), (who, "one slider")) for who in ("ours", "diffusers")}
    late = ("ours", "seven scales, start 0.4")
    sweep = ratio(late, ("ours", "seven scales, start 0.4, one by one"))
    print(
        f"\n50 sliders to one: ours {fifty['ours']}, diffusers {fifty['diffusers']}; "
        f"a sweep with a start of 0.4 to seven runs with it: {sweep}\n"
    )


def main():
    p = cli.plain_parser(__doc__)
    dtypes = dict(choices=["float32", "bfloat16"], action="append")
    p.add_argument("--dtype", help="may be repeated (default: both)", **dtypes)
    p.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    args = p.parse_args()
    head = "dtype | two seeds, 20 steps | ours, s (range) | diffusers, s (range) | ratio of medians"
    print(f"| {head} |\n|---|---|---|---|---|")
    for dtype in args.dtype or ["float32", "bfloat16"]:
        print_table(dtype, measure(cli.DTYPES[dtype], args.rounds))


if __name__ == "__main__":
    cli.run(main)
