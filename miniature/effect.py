"""What a slider does on the miniature, by the measuring stick:

    python -m miniature.effect age.safetensors --attribute age

Generates the same seeds at scales -3 ... 3, on prompts that no slider here is trained on. Prints
the mean of every attribute at every scale, and how far each moves: its largest less its smallest
mean, as a share of its range."""

import json

import numpy as np
from tqdm import tqdm

import lora
import slider
from miniature import world
from miniature.measure import WORDS, measure
from sdxl import split_words
from support import cli

PROMPTS = [
    "a portrait of a woman with brown hair",
    "a picture of a man, green background",
    "a person with short hair, medium skin",
    "a portrait of a female person on a pink background",
    "a man with long hair",
    "a picture of a person, light skin",
    "a woman, blue background",
    "a portrait of a male person with black hair",
]
# What PROMPTS say of these they hold fast.
SEX = {"man", "woman", "male", "female"}
NAMED = {"hair_length": {"long", "short"}, "skin": {"skin"}, "sex": SEX}
NAMED |= {f"hair {word}": set(WORDS["hair"]) for word in WORDS["hair"]}
NAMED |= {f"background {word}": {"background"} for word in WORDS["background"]}
SCALES = [-3, -2, -1, 0, 1, 2, 3]
# Noises that no training begins with: those of train_text.py are 1000 and up, of train_space.py
# 0 to 511, of train_pairs.py 100,000 and up.
SEEDS = list(range(600, 664))


def prompts_without(attribute: str) -> list[str]:
    """Those of PROMPTS that hold nothing of this attribute fast."""
    named = NAMED.get(attribute, set())
    return [prompt for prompt in PROMPTS if not named & set(split_words(prompt))]


def readings(model, columns, seeds, prompts=PROMPTS, **settings):
    """{attribute: array (columns, seeds)}. columns, settings: of slider.sweep. Seeds take the
    prompts in turn."""
    return table(pictures(model, columns, seeds, prompts, **settings))


def table(columns) -> dict[str, np.ndarray]:
    """What the measuring stick reads in columns of pictures: {attribute: array (columns,
    pictures)}."""
    tables = [attributes(drawn) for drawn in columns]
    return {name: np.array([one[name] for one in tables]) for name in tables[0]}


def pictures(model, columns, seeds, prompts=PROMPTS, **settings):
    """As slider.sweep, but the seeds take the prompts in turn: a list of pictures, one for each
    seed, for each column."""
    by_seed = [{} for _ in columns]
    for i, prompt in enumerate(tqdm(prompts, unit="prompt", desc="pictures")):
        its_seeds = seeds[i :: len(prompts)]
        if len(its_seeds):
            drawn = slider.sweep(model, prompt, its_seeds, columns, **settings)
            for column, pictures_of_column in zip(by_seed, drawn):
                column.update(zip(its_seeds, pictures_of_column))
    return [[column[seed] for seed in seeds] for column in by_seed]


def attributes(drawn) -> dict[str, np.ndarray]:
    """What the measuring stick reads in N pictures, all as numbers: {attribute: array (N,)}. Hair
    and background become one yes/no attribute for each of their words."""
    read = measure(drawn)
    found = {name: read[name] for name in world.RANGES}
    for name in ("hair", "background"):
        found |= {f"{name} {word}": (read[name] == word).astype(float) for word in WORDS[name]}
    return found | {"face": (read["kind"] == "face").astype(float)}


def captions(columns, count: int) -> list[list[str]]:
    """For each picture of each column what the measuring stick reads of the `count` attributes that
    move most from column to column: "measured age 0.31 (0 to 1), smile -0.20 (-1 to 1)"."""
    rows = table(columns)

    def movement(name):
        """In the middle picture first: a hat that comes and goes in one picture does not count."""
        reach = float(np.median(np.ptp(rows[name], 0))) / span(name)
        return reach, moved(rows[name], name)

    def reading(name, value):
        low, high = world.RANGES.get(name, (0, 1))
        return f"{name.replace('_', ' ')} {value:.2f} ({low:g} to {high:g})"

    most = sorted(rows, key=movement, reverse=True)[:count]
    texts = []
    for c, column in enumerate(columns):
        of = lambda i: ", ".join(reading(name, rows[name][c, i]) for name in most)
        texts.append([f"measured {of(i)}" for i in range(len(column))])
    return texts


def span(name: str) -> float:
    """The length of an attribute's range."""
    low, high = world.RANGES.get(name, (0, 1))
    return high - low


def moved(rows, name) -> float:
    """How far an attribute's mean moves over the scales, as a share of its range."""
    return float(np.ptp(rows.mean(1))) / span(name)


def others(values: dict, attribute: str) -> dict:
    """Of {attribute: value} those that are no words of the same one: what becomes red hair was hair
    of another colour."""
    related = lambda name: " " in attribute and name.split()[0] == attribute.split()[0]
    return {name: v for name, v in values.items() if name != attribute and not related(name)}


def summary(table, attribute) -> dict:
    """moved: how far the attribute rises from the first scale to the last, of its range (below 0:
    it falls). Of the others how far each moves at all."""
    means = table[attribute].mean(1)
    others = {name: moved(rows, name) for name, rows in table.items() if name != attribute}
    return {
        "means": [round(float(m), 4) for m in means],
        "moved": float(means[-1] - means[0]) / span(attribute),
        "monotonic": bool((np.diff(means) > 0).all()),
        "worst_other": max(others, key=others.get),
        "worst_other_moved": max(others.values()),
    }


def order(means) -> str:
    steps = np.diff(means)
    if (steps > 0).all():
        return "rises at every scale"
    return "FALLS at every scale" if (steps < 0).all() else "NOT in order of the scales"


def main():
    p = cli.model_parser(__doc__)
    p.add_argument("slider", help="slider file")
    attribute = "what it is meant to move"
    p.add_argument("--attribute", required=True, choices=world.RANGES, help=attribute)
    prompt = (
        "instead of the eight, less those that name the attribute; "
        "may be repeated, seeds take them in turn"
    )
    p.add_argument("--prompt", action="append", help=prompt)
    seeds = dict(default=SEEDS, help=f"default: {SEEDS[0]}-{SEEDS[-1]}")
    p.add_argument("--seeds", type=cli.seed_list, **seeds)
    p.add_argument("--scales", type=cli.numbers, default=SCALES)
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--start", type=cli.fraction, default=0.3)
    p.add_argument("--guidance", type=cli.guidance, default=5.0)
    p.add_argument("--json", help="also write the summary and the means to this file")
    args = p.parse_args()
    args.scales = sorted(set(args.scales))
    if len(args.scales) < 2:
        raise ValueError("--scales: two at least, or nothing can move")
    model = cli.load_model(args)
    loaded = lora.load(args.slider, model.unet)
    prompts = args.prompt or prompts_without(args.attribute)
    settings = {name: getattr(args, name) for name in ("steps", "start", "guidance")}
    columns = [[(loaded, scale)] for scale in args.scales]
    table = readings(model, columns, args.seeds, prompts, **settings)
    print(f"{'':18}" + "".join(f"{s:+8g}" for s in args.scales) + "   moved")
    for name, rows in table.items():
        means = "".join(f"{mean:8.2f}" for mean in rows.mean(1))
        print(f"{name:18}{means}{moved(rows, name):8.0%}")
    result = summary(table, args.attribute)
    print(
        f"{args.attribute}: moves {result['moved']:.0%} of its range, {order(result['means'])}; "
        f"most moved of the others: {result['worst_other']}, {result['worst_other_moved']:.0%}"
    )
    if args.json:
        means = {name: [round(float(m), 4) for m in rows.mean(1)] for name, rows in table.items()}
        result |= {"seeds": len(args.seeds), "all": means}
        cli.write_text(args.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    cli.run(main)
