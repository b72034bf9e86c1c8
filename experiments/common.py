"""What the experiments share: the concepts, sliders trained once and kept, measures of an edit, results that survive a stop.

Every experiment is `python -m experiments.NAME`; it writes experiments/results/NAME.json and NAME.png. With --model it runs
the same on SDXL, with the prompts of the paper's experiments and real judges (evaluate.py; without the measuring stick).
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lora
import student
import train_text
from extras import evaluate
from miniature import effect
from miniature.compose import PERSON, SLIDERS
from support import cli, images, training

RESULTS = Path(__file__).parent / "results"

# concept -> target prompt, what is added for the positive and the negative end, --preserve, what the measuring stick calls it
NAMES = {
    "eye_size": "eye size",
    "hair red": "red hair",
    "hair_length": "long hair",
    "background blue": "blue background",
}
TEN = {
    NAMES.get(attribute, attribute): (PERSON, *words, attribute)
    for attribute, words in SLIDERS.items()
}
REPAIR = {
    "faces": (
        PERSON,
        "well made, detailed face",
        "distorted, deformed",
        ["man, woman"],
        "malformed",
    ),
    "hands": (
        "a hand",
        "realistic hands, five fingers, 8k hyperrealistic hands",
        "poorly drawn hands, distorted hands, misplaced fingers",
        [],
        "malformed",
    ),
}
MINIATURE = {name: TEN[name] for name in ("age", "smile", "eye size", "red hair")}
PAPER = {  # the paper's text sliders (its Table 1), as its code spells the first
    "age": (
        "male person",
        "very old",
        "very young",
        ["white, black, asian, indian, hispanic", "male, female"],
        None,
    ),
    "curly hair": ("person", "with curly hair", "with straight hair", ["male, female"], None),
    "sky": ("a scenery", "dark, cloudy sky", "clear, blue sky", [], None),
    "rusty": ("car", "rusty, damaged", "pristine, brand new", [], None),
}
PAPER_REPAIR = {
    "faces": (
        "person",
        "realistic, perfect limbs, high detail, high quality",
        "poorly drawn limbs, bad anatomy, disfigured, low quality",
        [],
        None,
    ),
    "hands": ("hands", *REPAIR["hands"][1:4], None),
}
PAPER_PROMPTS = [
    "image of a person, 8k, realistic",
    "a photo of a man in a street",
    "a portrait of a woman, outdoors",
    "a photo of a person, smiling",
]


class Lab:
    """The model, its judges, and the options of an experiment."""

    def __init__(
        self,
        doc: str,
        name: str,
        more=lambda parser: None,
        count: int = 32,
        dtype: str | None = None,
    ):
        """more: adds options of this experiment to the parser. count, dtype: defaults of --pictures and --dtype (bfloat16, as the
        committed results have it, where the processor is quick at it)."""
        p = cli.model_parser(doc)
        more(p)
        p.add_argument(
            "--seed", type=int, default=0, help="of trainings and pictures (default: %(default)s)"
        )
        p.add_argument(
            "--pictures",
            type=int,
            default=count,
            help="seeds that are measured (default: %(default)s)",
        )
        p.add_argument(
            "--out", default=str(RESULTS), help="folder of results (default: %(default)s)"
        )
        p.add_argument(
            "--sliders",
            default="out/experiments",
            help="folder of trained sliders, used again if they are there (default: %(default)s)",
        )
        self.args = p.parse_args()
        self.args.dtype = self.args.dtype or dtype or cli.fast_dtype()
        self.model = cli.load_model(self.args)
        self.small = training.is_small(self.model.unet)
        if self.small:
            from miniature.judges import miniature_judges

            self.judges, self.concepts, self.all_concepts, self.prompts = (
                miniature_judges(self.model),
                MINIATURE,
                TEN | REPAIR,
                effect.PROMPTS,
            )
        else:
            self.judges, self.prompts = (
                evaluate.real_judges(device=str(self.model.device)),
                PAPER_PROMPTS,
            )
            self.concepts, self.all_concepts = PAPER, PAPER | PAPER_REPAIR
        self.recipe = train_text.recipe(self.model.unet)
        self.size = (min(self.model.size, 512),) * 2
        self.seed = self.args.seed
        self.seeds = list(
            range(1000 + 1000 * self.seed, 1000 + 1000 * self.seed + self.args.pictures)
        )
        self.path = Path(self.args.out) / f"{name}{f'_seed{self.seed}' if self.seed else ''}.json"
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
        target, pos, neg, own, _ = self.all_concepts[concept]
        combinations = train_text.combinations(own if preserve is None else preserve)
        return train_text.encode(
            self.model, [target], f"{target}, {pos}", f"{target}, {neg}", combinations, self.size
        )

    def text_slider(
        self,
        concept: str,
        preserve=None,
        full=False,
        rank: int = 4,
        seed: int | None = None,
        **changes,
    ) -> lora.Slider:
        """A text slider of `concept`. preserve: instead of the concept's own; full: every weight of the same layers in place
        of a LoRA; seed: another than the experiment's; changes: of eta, lr, steps, batch, trajectories."""
        preserve = self.all_concepts[concept][3] if preserve is None else preserve
        recipe = self.recipe | {"trajectories": 16} | changes
        seed = self.seed if seed is None else seed
        name = "_".join(
            [
                concept,
                "full" if full else f"r{rank}",
                f"p{len(train_text.combinations(preserve))}",
                f"seed{seed}",
                *(f"{k}{v:g}" for k, v in changes.items()),
            ]
        ).replace(" ", "-")
        teach = lambda: train_text.teach(
            self.model,
            self.encode(concept, preserve),
            eta=recipe["eta"],
            trajectories=recipe["trajectories"],
            size=self.size,
            seed=seed,
            batch=4 * recipe["batch"],
        )
        return self.kept(
            name, teach, recipe, Full if full else lora.Slider, *([] if full else [rank]), seed=seed
        )

    def kept(self, name: str, teach, recipe, kind=lora.Slider, *rank, seed: int) -> lora.Slider:
        """The slider of this name, trained if it is not in the folder."""
        path = Path(self.args.sliders) / f"{name}.safetensors"
        if kind is lora.Slider and path.exists():
            return lora.load(path, self.model.unet)
        torch.manual_seed(seed)
        new = kind(lora.target_layers(self.model.unet), *rank).to(self.model.device)
        train, held_out = teach()
        new.attach(self.model.unet)
        reading = student.fit(
            self.model.unet,
            new,
            train,
            held_out,
            steps=recipe["steps"],
            batch=recipe["batch"],
            lr=recipe["lr"],
            seed=seed,
        )
        new.detach()
        new.requires_grad_(False)
        if kind is lora.Slider:
            lora.save(path, new, {"meter": reading})
            return lora.load(path, self.model.unet)
        return new

    def draw(self, columns, prompts=None, **settings):
        """A list of pictures, one for each seed, for each column (slider.sweep's)."""
        return effect.pictures(self.model, columns, self.seeds, prompts or self.prompts, **settings)

    def edit(self, concept: str, before, after) -> dict:
        """What an edit did: change in CLIP score for the words that describe it, LPIPS, FID; on the miniature how far the
        attribute moved (in its range, towards the positive end) and what else did."""
        target, pos, _, _, attribute = self.all_concepts[concept]
        found = {
            "clip_change": evaluate.interval(
                evaluate.clip_change(self.judges, before, after, f"{target}, {pos}")
            ),
            "lpips": evaluate.interval(evaluate.lpips(self.judges, before, after)),
            "fid": evaluate.fid(self.judges, before, after),
        }
        return found | (moved(before, after, attribute) if self.small else {})

    def sheet(self, columns, names, rows: int = 4):
        """NAME.png: the first seeds' pictures in each column."""
        shown = [list(row) for row in zip(*(column[:rows] for column in columns))]
        images.save_image(
            images.contact_sheet(shown, names, [str(s) for s in self.seeds[:rows]]),
            self.path.with_suffix(".png"),
        )


def moved(before, after, attribute: str) -> dict:
    """The measuring stick: mean change of the attribute in units of its range, with its interval; the mean change of each
    other attribute without its sign: the largest, and their mean; and the share of malformed faces after the edit."""
    a, b = effect.attributes(before), effect.attributes(after)
    change = {name: (b[name] - a[name]) / effect.span(name) for name in a}
    others = {
        name: abs(float(c.mean()))
        for name, c in change.items()
        if name not in (attribute, "malformed") and not effect.related(attribute, name)
    }
    worst = max(others, key=others.get)
    return {
        "moved": evaluate.interval(change[attribute]),
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
        self.like = (
            [layer] if isinstance(layer, nn.Conv2d) else []
        )  # in a list: not a part of this module

    def forward(self, x):
        W = self.weight.to(x.dtype)
        return (
            nn.functional.conv2d(x, W, None, self.like[0].stride, self.like[0].padding)
            if self.like
            else nn.functional.linear(x, W)
        )


class Full(lora.Slider):
    """Full fine-tuning of the same layers, with a scale all the same: W + scale * D."""

    def __init__(self, layers):
        super().__init__({}, {}, {})
        for name, layer in layers.items():
            self.add_module(lora.file_name(name), FullRank(layer))
