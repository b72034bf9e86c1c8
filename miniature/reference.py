"""A text slider against what it imitates, on the miniature:  python -m miniature.reference age.safetensors --attribute age

Eq. (8) applied at sampling time, without a slider (slider.py --guide), at the eta that the slider was trained with, and the
slider at the scale at which its meter says that it makes all of the teacher's change, 1 / share at either end.
"""

import json

import lora
import train_text
from miniature import world
from miniature.effect import readings
from support import cli


def main():
    p = cli.model_parser(__doc__)
    p.add_argument("slider", help="text slider file")
    p.add_argument(
        "--attribute", required=True, choices=world.RANGES, help="what it is meant to move"
    )
    p.add_argument(
        "--seeds", type=cli.seed_list, default=list(range(1000, 1064)), help="default: 1000-1063"
    )
    p.add_argument("--steps", type=int, default=30)
    args = p.parse_args()
    model = cli.load_model(args)
    slider = lora.load(args.slider, model.unet)
    trained, meter = json.loads(slider.metadata["settings"]), json.loads(slider.metadata["meter"])
    eta, scales = trained["eta"], [-1 / meter["minus"], 0.0, 1 / meter["plus"]]
    _, ends, _ = train_text.encode(
        model,
        json.loads(slider.metadata["prompts"]),
        trained["pos"],
        trained["neg"],
        json.loads(slider.metadata["preserved"]),
        (model.size,) * 2,
    )
    found = {
        "slider": readings(model, [[(slider, s)] for s in scales], args.seeds, steps=args.steps),
        "eq. (8)": readings(
            model, [[]] * 3, args.seeds, steps=args.steps, ends=ends, etas=[-eta, 0.0, eta]
        ),
    }
    shift = {}
    for name, table in found.items():
        means = table[args.attribute].mean(1)
        shift[name] = means[[0, 2]] - means[1]
        print(f"{name:8} {args.attribute} {means.round(3).tolist()}")
    for end, ours, reference in zip(("negative", "positive"), shift["slider"], shift["eq. (8)"]):
        print(
            f"{end} end: the slider at {scales[0 if end == 'negative' else 2]:+.2f} moves {ours:+.3f}, eq. (8) {reference:+.3f}: ratio {ours / reference:.2f}"
        )
    print(f"network evaluations for each step and picture: slider 2, eq. (8) {2 + len(ends[0])}")


if __name__ == "__main__":
    cli.run(main)
