"""A text slider against what it imitates, on the miniature:

    python -m miniature.reference age.safetensors --attribute age

Eq. (8) applied at sampling time, without a slider (slider.py --guide), at the eta that the slider
was trained with; and the slider at the scale at which its meter says that it makes all of the
teacher's change, 1 / share at either end."""

import json

import lora
import train_text
from miniature import world
from miniature.effect import SEEDS, readings
from support import cli


def main():
    p = cli.model_parser(__doc__)
    p.add_argument("slider", help="text slider file")
    attribute = "what it is meant to move"
    p.add_argument("--attribute", required=True, choices=world.RANGES, help=attribute)
    seeds = dict(default=SEEDS, help=f"default: {SEEDS[0]}-{SEEDS[-1]}")
    p.add_argument("--seeds", type=cli.seed_list, **seeds)
    p.add_argument("--steps", type=int, default=30)
    args = p.parse_args()
    model = cli.load_model(args)
    slider = lora.load(args.slider, model.unet)
    names = {"settings", "meter", "prompts", "preserved"}
    if missing := names - slider.metadata.keys():
        raise ValueError(f"{args.slider}: not a text slider of ours: it says no {min(missing)}")
    told = {name: json.loads(slider.metadata[name]) for name in names}
    trained, meter = told["settings"], told["meter"]
    eta, scales = trained["eta"], [-1 / meter["minus"], 0.0, 1 / meter["plus"]]
    prompts = (told["prompts"], trained["pos"], trained["neg"], told["preserved"])
    _, ends, _ = train_text.encode(model, *prompts, (model.size,) * 2)
    delta = lambda x_t, t: train_text.ends_difference(model.unet, x_t, t, ends)
    eq_8 = dict(delta=delta, etas=[-eta, 0.0, eta])
    columns = [[(slider, scale)] for scale in scales]
    found = {
        "slider": readings(model, columns, args.seeds, steps=args.steps),
        "eq. (8)": readings(model, [[]] * 3, args.seeds, steps=args.steps, **eq_8),
    }
    shift = {}
    for name, table in found.items():
        means = table[args.attribute].mean(1)
        shift[name] = means[[0, 2]] - means[1]
        print(f"{name:8} {args.attribute} {means.round(3).tolist()}")
    ends_of = {"negative": scales[0], "positive": scales[2]}
    for i, (end, scale) in enumerate(ends_of.items()):
        ours, reference = shift["slider"][i], shift["eq. (8)"][i]
        moves = f"moves {ours:+.3f}, eq. (8) {reference:+.3f}: ratio {ours / reference:.2f}"
        print(f"{end} end: the slider at {scale:+.2f} {moves}")
    print(f"network evaluations for each step and picture: slider 2, eq. (8) {2 + len(ends[0])}")


if __name__ == "__main__":
    cli.run(main)
