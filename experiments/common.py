"""What the experiments share: the concepts, sliders that are trained once, measures of an edit,
results that survive a stop.

Every experiment is `python -m experiments.NAME`. It writes experiments/results/NAME.json and
NAME.png. With --model it runs the same on SDXL, with the prompts of the paper's experiments and
real judges (extras/metrics.py), without the measuring stick."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import lora
import train_text
from extras import metrics
from miniature import effect
from miniature.compose import PERSON, SLIDERS
from sdxl import MINIATURE
from support import cli, images, options, training
from support.options import default_help

RESULTS = Path(__file__).parent / "results"


class Concept(NamedTuple):
    """What a text slider is trained for."""

    target: str  # prompt
    pos: str  # what is added to it at the positive end
    neg: str
    preserve: list[str]  # --preserve
    attribute: str | None = None  # as the measuring stick calls it


NAMES = {
    "eye_size": "eye size",
    "hair red": "red hair",
    "hair_length": "long hair",
    "background blue": "blue background",
}
TEN = {
    NAMES.get(attribute, attribute): Concept(PERSON, *words, attribute)
    for attribute, words in SLIDERS.items()
}
CONCEPTS = {name: TEN[name] for name in ("age", "smile", "eye size", "red hair")}

WELL_MADE = "well made, detailed face"
GOOD_HANDS = "realistic hands, five fingers, 8k hyperrealistic hands"
BAD_HANDS = "poorly drawn hands, distorted hands, misplaced fingers"
REPAIR = {
    "faces": Concept(PERSON, WELL_MADE, "distorted, deformed", ["man, woman"], "malformed"),
    "hands": Concept("a hand", GOOD_HANDS, BAD_HANDS, [], "malformed"),
}

# The paper's text sliders (its Table 1), as its code spells the first.
PEOPLE = ["white, black, asian, indian, hispanic", "male, female"]
PAPER = {
    "age": Concept("male person", "very old", "very young", PEOPLE),
    "curly hair": Concept("person", "with curly hair", "with straight hair", ["male, female"]),
    "sky": Concept("a scenery", "dark, cloudy sky", "clear, blue sky", []),
    "rusty": Concept("car", "rusty, damaged", "pristine, brand new", []),
}
GOOD_PEOPLE = "realistic, perfect limbs, high detail, high quality"
BAD_PEOPLE = "poorly drawn limbs, bad anatomy, disfigured, low quality"
PAPER_REPAIR = {
    "faces": Concept("person", GOOD_PEOPLE, BAD_PEOPLE, []),
    "hands": Concept("hands", GOOD_HANDS, BAD_HANDS, []),
}
PAPER_PROMPTS = [
    "image of a person, 8k, realistic",
    "a photo of a man in a street",
    "a portrait of a woman, outdoors",
    "a photo of a person, smiling",
]


class Lab:
    """The model, its judges, and the options of an experiment."""

    def __init__(self, doc, name, add_options=lambda parser: None, count=32, dtype=None):
        """add_options: adds options of this experiment to the parser. count, dtype: defaults of
        --pictures and --dtype (bfloat16, as the committed results have it, where the processor is
        quick at it)."""
        p = cli.model_parser(doc)
        add_options(p)
        seed = default_help("of trainings and pictures")
        p.add_argument("--seed", type=int, default=0, help=seed)
        pictures = default_help("seeds that are measured")
        p.add_argument("--pictures", type=int, default=count, help=pictures)
        results = "folder of results (default: experiments/results; out/MODEL of another model)"
        p.add_argument("--out", help=results)
        sliders = "folder of trained sliders, used again (default: out/experiments; out/MODEL)"
        p.add_argument("--sliders", help=sliders)
        self.args = p.parse_args()
        bundled = Path(self.args.model).resolve() == MINIATURE
        of_other = f"out/{Path(self.args.model).stem}"
        self.args.out = self.args.out or (str(RESULTS) if bundled else of_other)
        self.args.sliders = self.args.sliders or ("out/experiments" if bundled else of_other)
        self.args.dtype = self.args.dtype or dtype or cli.fast_dtype()
        self.model = cli.load_model(self.args)
        self.small = training.is_small(self.model.unet)
        if self.small:
            from miniature.judges import miniature_judges

            self.judges, self.prompts = miniature_judges(self.model), effect.PROMPTS
            self.concepts, self.all_concepts = CONCEPTS, TEN | REPAIR
        else:
            self.judges = metrics.real_judges(device=str(self.model.device))
            self.prompts = PAPER_PROMPTS
            self.concepts, self.all_concepts = PAPER, PAPER | PAPER_REPAIR
        self.recipe = training.text_recipe(self.model.unet)
        self.size = (min(self.model.size, 512),) * 2
        self.seed = self.args.seed
        first = effect.SEEDS[0] + 1000 * self.seed
        self.seeds = list(range(first, first + self.args.pictures))
        name += f"_seed{self.seed}" if self.seed else ""
        name += f"_{self.args.pictures}_pictures" if self.args.pictures != count else ""
        self.path = Path(self.args.out) / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}

    def once(self, key: str, make):
        """results[key], made only if no earlier run has: an experiment that was stopped goes on."""
        if key not in self.results:
            self.results[key] = make()
            cli.write_text(self.path, json.dumps(self.results, indent=1))
        print(f"{key}: {json.dumps(self.results[key])}", flush=True)
        return self.results[key]

    def encode(self, concept: str, preserve=None):
        """train_text.encode's three parts for `concept`. preserve: instead of its own."""
        target, pos, neg, its_own, _ = self.all_concepts[concept]
        preserved = options.combinations(its_own if preserve is None else preserve)
        ends = (f"{target}, {pos}", f"{target}, {neg}")
        return train_text.encode(self.model, [target], *ends, preserved, self.size)

    def text_slider(
        self, concept: str, preserve=None, full=False, rank=4, seed=None, **changes
    ) -> lora.Slider:
        """A text slider of `concept`. preserve: instead of the concept's own. full: every weight
        of the same layers in the place of a LoRA. seed: another than the experiment's. changes: of
        eta, lr, steps, batch, trajectories."""
        preserve = self.all_concepts[concept].preserve if preserve is None else preserve
        recipe = self.recipe | {"trajectories": 16} | changes
        seed = self.seed if seed is None else seed
        words = [concept, "full" if full else f"r{rank}"]
        words += [f"p{len(options.combinations(preserve))}", f"seed{seed}"]
        words += [f"{k}{v:g}" for k, v in changes.items()]
        name = "_".join(words).replace(" ", "-")

        def teach():
            settings = {k: recipe[k] for k in ("eta", "trajectories")}
            settings |= dict(size=self.size, seed=seed, batch=4 * recipe["batch"])
            return train_text.teach(self.model, self.encode(concept, preserve), **settings)

        return self.load_or_train(name, teach, recipe, None if full else rank, seed)

    def load_or_train(self, name: str, teach, recipe: dict, rank: int | None, seed: int):
        """The slider `name`, trained if it is not in the folder. teach: function that returns the
        targets to train on and the meter's. recipe: steps, batch, lr. rank: None for a change of
        every weight, which no file holds."""
        path, unet = Path(self.args.sliders) / f"{name}.safetensors", self.model.unet
        if rank is not None and path.exists():
            return lora.load(path, unet)
        torch.manual_seed(seed)
        layers = lora.target_layers(unet)
        slider = Full(layers) if rank is None else lora.Slider(layers, rank)
        slider.to(self.model.device)
        train, held_out = teach()
        slider.attach(unet)
        settings = {k: recipe[k] for k in ("steps", "batch", "lr")}
        reading = training.fit_targets(unet, slider, train, held_out, seed=seed, **settings)
        slider.detach()
        slider.requires_grad_(False)
        if rank is None:
            return slider
        lora.save(path, slider, {"meter": reading})
        return lora.load(path, unet)

    def prompts_for(self, concept: str) -> list[str]:
        """Those of the prompts that do not hold the concept's attribute fast."""
        attribute = self.all_concepts[concept].attribute
        return effect.prompts_without(attribute) if self.small else self.prompts

    def draw(self, columns, prompts=None, **settings):
        """A list of pictures, one for each seed, for each of `columns` (slider.sweep's)."""
        return effect.pictures(self.model, columns, self.seeds, prompts or self.prompts, **settings)

    def clip_change(self, concept: str, before, after):
        """(N,): change in CLIP score for the words of the concept's positive end."""
        target, pos, *_ = self.all_concepts[concept]
        return metrics.clip_change(self.judges, before, after, f"{target}, {pos}")

    def lpips(self, before, after) -> dict:
        """The mean with its interval."""
        return metrics.interval(metrics.lpips(self.judges, before, after))

    def edit(self, concept: str, before, after) -> dict:
        """What an edit did: change in CLIP score, LPIPS, FID; on the miniature how far the
        attribute moved, and what else did (`moved`)."""
        found = {
            "clip_change": metrics.interval(self.clip_change(concept, before, after)),
            "lpips": self.lpips(before, after),
            "fid": metrics.fid(self.judges, before, after),
        }
        attribute = self.all_concepts[concept].attribute
        return found | (moved(before, after, attribute) if self.small else {})

    def sheet(self, columns, names, rows: int = 4):
        """NAME.png: the first seeds' pictures in each column."""
        shown = [list(row) for row in zip(*(column[:rows] for column in columns))]
        self.save_sheet(shown, names, [str(seed) for seed in self.seeds[:rows]])

    def save_sheet(self, rows, columns: list[str], row_names: list[str], name: str = ""):
        """Write images.contact_sheet's sheet beside the results: NAME.png, or NAME_name.png."""
        path = self.path.with_name(f"{self.path.stem}{'_' * bool(name)}{name}.png")
        images.save_image(images.contact_sheet(rows, columns, row_names), path)


def moved(before, after, attribute: str, among: tuple[str, ...] = ()) -> dict:
    """By the measuring stick: mean change of the attribute in units of its range, with its
    interval; of the other attributes' mean changes, without their signs, the largest and the mean;
    the share of malformed pictures after the edit. among: beginnings of the names of the others
    that the pictures have."""
    a, b = effect.attributes(before), effect.attributes(after)
    change = {name: (b[name] - a[name]) / effect.span(name) for name in a}
    others = {
        name: abs(float(c.mean()))
        for name, c in effect.others(change, attribute).items()
        if name != "malformed" and (not among or name.startswith(among))
    }
    worst = max(others, key=others.get)
    return {
        "moved": metrics.interval(change[attribute]),
        "worst_other": worst,
        "worst_other_moved": others[worst],
        "mean_other_moved": float(np.mean(list(others.values()))),
        "malformed": float((b["malformed"] > 0.5).mean()),
    }


class FullRank(nn.Module):
    """A change of one layer's every weight, 0 at the start, in the place of lora.LowRank."""

    def __init__(self, layer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.float32))


class Full(lora.Slider):
    """Full fine-tuning of the same layers, with a scale all the same: W + scale * D."""

    def __init__(self, layers):
        super().__init__({}, {}, {})
        for name, layer in layers.items():
            self.add_module(lora.kohya_name(name), FullRank(layer))

    def _hook(self, part, group):
        def add(layer, inputs, y):
            (x,) = inputs
            return y + self.scale_of(y) * lora.down(x, part.weight.to(x.dtype), layer)

        return add

    def scale_of(self, y):
        scale = torch.as_tensor(self.scale, dtype=y.dtype, device=y.device)
        return scale.view(-1, *[1] * (y.ndim - 1))
