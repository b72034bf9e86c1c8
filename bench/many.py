"""What many sliders and a sweep cost, on the miniature or any --model:  python -m bench.many

The same sampling with no slider, with one, and with 50 different ones; and a sweep over seven scales against seven
separate runs. All take turns; ratios of medians.
"""

import statistics
import time

import torch

import cli
import lora
import slider


def random_slider(unet, seed: int) -> lora.Slider:
    torch.manual_seed(seed)
    out = lora.Slider(lora.target_layers(unet), rank=[2, 4, 8][seed % 3]).to(next(unet.parameters()))
    for name, p in out.named_parameters():
        if "lora_up" in name:
            p.data.normal_(std=1e-3)
    return out.requires_grad_(False)


def main():
    p = cli.parser(__doc__)
    p.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    p.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    p.add_argument("--start", type=float, default=0.4, help="default: %(default)s")
    args = p.parse_args()
    model = cli.load_model(args)
    fifty = [random_slider(model.unet, i) for i in range(50)]
    draw = lambda columns: slider.sweep(model, "a photo of a person", [0, 1], columns, steps=args.steps, start=args.start)
    scales = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    runs = {"no slider": lambda: draw([[]]),
            "one slider": lambda: draw([[(fifty[0], 1.0)]]),
            "50 sliders": lambda: draw([[(s, 0.1) for s in fifty]]),
            "seven scales, a sweep": lambda: draw([[(fifty[0], s)] for s in scales]),
            "seven scales, seven runs": lambda: [draw([[(fifty[0], s)]]) for s in scales]}
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            started = time.time()
            run()
            seconds[name].append(time.time() - started)
    print("| two seeds | s (median, range) |\n|---|---|")
    for name, s in seconds.items():
        s = s[1:]  # the first is a warm-up
        seconds[name] = statistics.median(s)
        print(f"| {name} | {seconds[name]:.2f} ({min(s):.2f} to {max(s):.2f}) |")
    print(f"50 sliders to one: {seconds['50 sliders'] / seconds['one slider']:.2f}; "
          f"a sweep to seven runs: {seconds['seven scales, a sweep'] / seconds['seven scales, seven runs']:.2f}")


if __name__ == "__main__":
    cli.run(main)
