"""From a StyleGAN neuron to a slider (the paper's Figure 5):

    python -m experiments.stylegan.sliders  # some minutes a channel

A style channel that moves one thing in the generator's faces is moved either way in a hundred of
them. The miniature SDXL draws each picture again from half-way down its noise (SDEdit), both of a
pair with the same noise: what the generator blurs it draws as it is used to, and the difference
stays. Pairs in which the measuring stick sees anything else change are left out, as somebody who
looks at them would; the first --count of the rest train a visual slider by the command that
anybody would use, train_pairs.py, and the slider is measured on seeds and prompts of its own. By
default the best channels that channels.py found for a hat, the size of the eyes, and the shirt.

Another one, and only its pairs:

    python -m experiments.stylegan.sliders --channel 7.17 --attribute eye_size --by 3
    python -m experiments.stylegan.sliders --channel 7.17 --attribute eye_size --by 3 \\
        --only-pairs pairs"""

import json
from pathlib import Path

import numpy as np

import lora
import slider
from experiments.common import Lab
from experiments.defaults import run
from experiments.stylegan.channels import FOUND, Faces, most_moved_other, read, span
from experiments.stylegan.draw import load
from experiments.stylegan.pairs import PROMPT, Channel, draw_pairs
from miniature import effect
from support import cli, images
from support.options import default_help

SCALES = [-3, -2, -1, 0, 1, 2, 3]
# And how far each is moved: eyes vanish beyond.
CHOSEN = {"hat": 8.0, "eye_size": 4.0, "shirt red": 8.0}
START = 0.2  # hats and colours are decided early in the denoising


def train(lab, channel: Channel, count: int, file: Path):
    """The slider in `file`, from pairs in the folder beside it."""
    pairs = file.with_suffix("")
    draw_pairs(lab.model, channel, count, pairs, lab.seed)
    command = ["train_pairs.py", "--neg", pairs / "neg", "--pos", pairs / "pos"]
    command += ["--prompt", PROMPT, "--out", file, "--seed", lab.seed, "--probe", 0, "--overwrite"]
    run(*command)


def measured(columns, attribute: str, direction: float = 0.0) -> dict:
    """What `read` says of a column of pictures for each scale. direction: 1 or -1, which way the
    attribute is to go; 0 for the way it goes."""
    tables = [read(column) for column in columns]
    means = {name: np.array([t[name].mean() for t in tables]) for name in tables[0]}
    moved = {name: float(np.ptp(m)) / span(name) for name, m in means.items()}
    of_it = means[attribute]
    direction = direction or float(np.sign(of_it[-1] - of_it[0]))
    found = {
        "means": of_it.round(3).tolist(),
        "moved": direction * float(of_it[-1] - of_it[0]) / span(attribute),
        "monotonic": bool((direction * np.diff(of_it) > 0).all()),
        "direction": direction,
    }
    return found | most_moved_other(moved, attribute)


def add_options(p):
    each = dict(action="append", default=[])
    channel = "may be repeated, each with its --attribute"
    p.add_argument("--channel", metavar="LAYER.CHANNEL", help=channel, **each)
    p.add_argument("--attribute", help="what it moves, as channels.py calls it", **each)
    by = default_help("with --channel: standard deviations, either way")
    p.add_argument("--by", type=float, default=5.0, help=by)
    p.add_argument("--count", type=int, default=24, help=default_help("pairs"))
    only_pairs = "draw the pairs of one channel there, and train nothing"
    p.add_argument("--only-pairs", metavar="DIR", help=only_pairs)


def chosen_channels(args) -> list[Channel]:
    if len(args.channel) != len(args.attribute):
        what = "what it moves, as channels.py calls it"
        raise ValueError(f"--attribute is needed for each --channel: {what}")
    pairs = zip(args.channel, args.attribute)
    chosen = [Channel(*map(int, place.split(".")), name, args.by) for place, name in pairs]
    if chosen:
        return chosen
    best = {}
    for row in json.loads(FOUND.read_text())["best"]:
        best.setdefault(row["attribute"], row)
    rows = [(best[name], by) for name, by in CHOSEN.items()]
    return [Channel(row["layer"], row["channel"], row["attribute"], by) for row, by in rows]


def main():
    lab = Lab(__doc__, "stylegan", add_options)
    args, model = lab.args, lab.model
    channels = chosen_channels(args)
    if args.only_pairs:
        return draw_pairs(model, channels[0], args.count, Path(args.only_pairs), lab.seed)
    rows, names = [], []
    for channel in channels:
        number, attribute = f"{channel.layer}.{channel.channel}", channel.attribute
        file = Path(args.sliders) / f"stylegan_{number}_seed{lab.seed}.safetensors"
        if not file.exists():
            train(lab, channel, args.count, file)
        one = lora.load(file, model.unet)
        columns = [[(one, scale)] for scale in SCALES]

        def measure():
            drawn = lab.draw(columns, start=START)
            faces = Faces(load(), args.pictures, seed=21)
            generated = [channel.drawn(faces, channel.by * scale / 3) for scale in SCALES]
            of_channel = measured(generated, attribute)
            return {
                "slider": measured(drawn, attribute, of_channel["direction"]),
                "generator": of_channel,
                "prompts": effect.PROMPTS,
            }

        place = f"layer {channel.layer}, channel {channel.channel}"
        lab.once(f"{attribute.replace('_', ' ')}: {place}", measure)
        face = Faces(load(), 1, seed=20)
        rows.append([channel.drawn(face, channel.by * scale / 3)[0] for scale in SCALES])
        prompt, seeds = effect.PROMPTS[5], lab.seeds[5:6]
        drawn = slider.sweep(model, prompt, seeds, columns, start=START)
        rows.append([column[0] for column in drawn])
        names += [f"channel {number}", attribute.replace("_", " ")]
    lab.save_sheet(rows, [images.scale_label(scale) for scale in SCALES], names)


if __name__ == "__main__":
    cli.run(main)
