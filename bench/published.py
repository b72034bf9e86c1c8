"""The published trainers themselves beside ours, on the miniature, on the CPU:

    python -m bench.published --authors ../sliders --ai-toolkit ../ai-toolkit --ai-python PYTHON

--authors names a clone of github.com/rohitgandikota/sliders: its text trainer (train_lora_xl.py)
and its image trainer (train_lora-scale-xl.py). --ai-toolkit names a clone of
github.com/ostris/ai-toolkit: its concept slider, for which the frozen model draws the pictures that
it noises. They run in processes of their own, on temporary copies in which SUBSTITUTIONS are made
and nothing else; they are printed. All have the same words, rank, layers and eta, and the same
preserved concepts, which ai-toolkit has no place for. Each has its own defaults for the rest:
ai-toolkit its interface's; the authors' their config files', but 500 iterations, the default of
their config class, where those files say 1000. Left out are what does not change weights: samples
while training, gradient checkpointing, our search for the useful range. Ours is trained anew for
each number of steps, theirs are read as they train.

What passes through the UNet is counted by a hook (driver.py); the pictures that ai-toolkit noises
are not, as a user has some. Sliders are read by our loader and measured by the measuring stick on
the same seeds and prompts, which no training used. A UNet evaluation is one sample; one with
gradients counts as three. --python and --ai-python are the interpreters that have what their code
imports. What --json holds is not run again; with --jobs each training has its share of the cores,
and all its seconds mean that. The meter (student.py) reads all on the same x_t, which no training
used: how much of eq. (8)'s change a slider makes at +1 and at -1, of pairs that of the mean."""

import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

import lora
import student
import train_pairs
import train_text
from miniature import compose, effect, pairs
from miniature.compose import PERSON, SLIDERS
from miniature.world import RANGES
from sdxl import MINIATURE, SDXL
from slider import generate
from support import cli, images, options, training
from support.jobs import at_once
from support.options import default_help

ROOT = Path(__file__).parent.parent
COLOURS = {"ours": "tab:blue", "authors": "tab:orange", "ai-toolkit": "tab:green"}
MEASURING = threading.Lock()  # one slider at a time on the one model
X_AXES = {  # what a point has -> its name, ticks
    "cost": ("network evaluations", (1_000, 3_000, 10_000, 30_000)),
    "seconds": ("seconds", (20, 60, 200, 600, 2_000)),
}
SETTINGS = ("iterations", "every", "ai_steps", "ai_every", "precision")  # of theirs
CURVES = {"moved": ("o-", "moved"), "worst_other_moved": ("x--", "most moved other")}
DRIVER = Path(__file__).with_name("driver.py")
OUR_STEPS = (15, 30, 60, 120)  # 60 is the default
SEEDS = effect.SEEDS[:32]  # of the pictures that are measured
SCALES = (-3, 0, 3)
KINDS = [("age", False), ("smile", False), ("eye_size", False), ("eye_size", True)]  # from pairs?
UNSEEN, SIGNS = 77, torch.tensor([-1.0, 1.0])  # the meter's seed; the ends of pairs
PICTURES = list(range(5000, 5032))  # seeds of those that ai-toolkit noises

CONCEPT_SLIDER = "extensions_built_in/concept_slider"
TEXT, IMAGE = "trainscripts/textsliders", "trainscripts/imagesliders"
CPU = ('torch.device(f"cuda:{args.device}")', 'torch.device("cpu")')
NO_WANDB = ("import wandb\n", "")  # the settings leave it off
SUBSTITUTIONS = {  # file -> (what it says, what it says instead)
    f"{TEXT}/train_lora_xl.py": [CPU, NO_WANDB],
    f"{IMAGE}/train_lora-scale-xl.py": [
        CPU,
        NO_WANDB,
        (".resize((512,512))", ".resize((128,128))"),
    ],
    # where today's diffusers has it
    f"{IMAGE}/train_util.py": [
        (
            "from diffusers.utils import randn_tensor",
            "from diffusers.utils.torch_utils import randn_tensor",
        )
    ],
}


def copied(clone: Path, copy: Path, option: str, needed: str):
    """A copy of a clone. ValueError where it has no file or folder `needed`."""
    if not (clone / needed).exists():
        raise ValueError(f"{option}: {clone} has no {needed}: it names a clone of their repository")
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git", "ui", "assets"))


def substitute(copy: Path):
    """Make SUBSTITUTIONS in a copy of the authors' trainers; each is printed. ValueError where it
    does not have the text."""
    for name, changes in SUBSTITUTIONS.items():
        code = (copy / name).read_text(encoding="utf-8")
        for old, new in changes:
            if old not in code:
                raise ValueError(f"--authors: {name} does not say {old!r}: another version")
            print(f"{name}: {old!r} becomes {new!r}, {code.count(old)} times")
            code = code.replace(old, new)
        (copy / name).write_text(code, encoding="utf-8")


# ------------------------------------------------------------------------------------- the trainers


def prompts_of(attribute: str, from_pairs: bool) -> list[dict]:
    """The authors' prompts file: an entry for each preserved concept, as their own loader makes of
    its --attributes; the words stand where ours stand."""
    if from_pairs:
        same = {"target": PERSON, "positive": PERSON, "neutral": PERSON, "unconditional": ""}
        return [same | {"action": "enhance", "resolution": 128, "batch_size": 1}]
    pos, neg, preserve = SLIDERS[attribute]
    entries = []
    for p in options.combinations(preserve):
        target, *ends = (
            f"{words}, {p}" for words in (PERSON, f"{PERSON}, {pos}", f"{PERSON}, {neg}")
        )
        entry = {"target": target, "positive": ends[0], "unconditional": ends[1], "neutral": target}
        entry |= {"action": "enhance", "guidance_scale": training.ETA, "resolution": 128}
        entries.append(entry | {"dynamic_resolution": False, "batch_size": 1})
    return entries


def authors(
    copy: Path,
    out: Path,
    attribute: str,
    from_pairs: bool,
    iterations: int,
    every: int,
    precision: str = "bfloat16",
):
    """The command of the authors' trainer. JSON is YAML too."""
    config = {
        "prompts_file": str(out / "prompts.yaml"),
        "pretrained_model": {"name_or_path": str(MINIATURE), "v2": False, "v_pred": False},
        "network": {"type": "c3lier", "rank": 4, "alpha": 1.0, "training_method": "noxattn"},
        "train": {
            "precision": precision,
            "noise_scheduler": "ddim",
            "iterations": iterations,
            "lr": 0.0002,
            "optimizer": "AdamW",
            "lr_scheduler": "constant",
            "max_denoising_steps": 50,
        },
        # It saves after iterations 1, 1 + per_steps, ... but the first.
        "save": {"name": "slider", "path": str(out), "per_steps": every, "precision": precision},
        "logging": {"use_wandb": False, "verbose": False},
        "other": {"use_xformers": False},
    }
    (out / "prompts.yaml").write_text(json.dumps(prompts_of(attribute, from_pairs)))
    (out / "config.yaml").write_text(json.dumps(config))
    if not from_pairs:
        return [copy / TEXT / "train_lora_xl.py", "--config_file", out / "config.yaml"]
    folders = ["--folder_main", out / "pairs", "--folders", "neg, pos", "--scales", "-1, 1"]
    about = ["--config_file", out / "config.yaml", "--alpha", 1.0, "--rank", 4]
    return [copy / IMAGE / "train_lora-scale-xl.py", *about, *folders]


def ai_toolkit(
    copy: Path, out: Path, pictures: Path, attribute: str, steps: int, every: int, seed: int
):
    """The command of ai-toolkit's concept slider, which noises `pictures`: the defaults of its
    interface (jobConfig.ts) but for what is the same for all, the resolution, and the 8-bit
    optimizer, of which AdamW is the whole.

    It has one target and nothing like eq. (8)'s P: its anchor is a prompt whose picture must not
    change at all, by default the empty one. Its target is brought to the mean and deviation of what
    it is added to. Alpha is the rank, as the interface sets it."""
    pos, neg, _ = SLIDERS[attribute]
    words = {"positive_prompt": f"{PERSON}, {pos}", "negative_prompt": f"{PERSON}, {neg}"}
    rank = {"linear": 4, "linear_alpha": 4, "conv": 4, "conv_alpha": 4}
    as_ours = {"ignore_if_contains": ["attn2", ".ff.", "proj_in", "proj_out"]}
    strengths = {"guidance_strength": training.ETA, "anchor_strength": 1.0, "anchor_class": ""}
    process = {
        "type": "concept_slider",
        "training_folder": str(out),
        "training_seed": seed,
        "network": {"type": "lora", **rank, "network_kwargs": as_ours},
        "save": {"dtype": "bf16", "save_every": every, "max_step_saves_to_keep": steps},
        "datasets": [{"folder_path": str(pictures), "resolution": [128]}],
        "train": {
            "batch_size": 1,
            "steps": steps,
            "lr": 0.0001,
            "optimizer": "adamw",
            "optimizer_params": {"weight_decay": 1e-4},
            "noise_scheduler": "ddpm",  # as the interface has it for SDXL
            "dtype": "bf16",
            "gradient_checkpointing": False,  # less memory for more time: not needed here
            "disable_sampling": True,
        },
        "model": {"name_or_path": str(MINIATURE), "arch": "sdxl"},
        "slider": {"target_class": PERSON, **words, **strengths},
    }
    job = {"job": "extension", "config": {"name": "slider", "process": [process]}}
    (out / "config.json").write_text(json.dumps(job | {"meta": {"name": "slider"}}))
    return [copy / "run.py", out / "config.json"]


def ours(out: Path, attribute: str, from_pairs: bool, steps: int, seed: int):
    """The command of our trainer, with its defaults but for the number of steps."""
    about = ["--steps", steps, "--seed", seed, "--probe", 0]
    about += ["--device", "cpu", "--out", out / f"{steps}.safetensors", "--overwrite"]
    if from_pairs:
        ends = ["--neg", out / "pairs" / "neg", "--pos", out / "pairs" / "pos"]
        return ["train_pairs.py", *ends, "--prompt", PERSON, *about]
    return [*compose.command(attribute), *about]


def run(python: str, log: Path, seed: int, command: list, cwd: Path = ROOT) -> list[dict]:
    """Run a trainer's command under driver.py; the lines of its log, one for each slider file."""
    words = [str(word) for word in [DRIVER, log, seed, *command]]
    print("$", " ".join(words), flush=True)
    if os.sep in python:
        python = os.path.abspath(python)  # not resolved: a virtual environment's is a link
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, *words], cwd=cwd, env=no_gpu, check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


# ---------------------------------------------------------------------------------------- measuring


@functools.cache
def unseen(model, attribute: str, from_pairs: bool) -> student.Targets:
    """What the meter reads a slider on: our own teacher's targets."""
    if from_pairs:
        groups = pairs.draw(attribute, RANGES[attribute], 8, UNSEEN)
        latents = torch.stack([model.encode(group) for group in groups])
        cond = model.condition([PERSON], (model.size,) * 2)
        return train_pairs.collect(model, latents, SIGNS, cond, noises=4, seed=UNSEEN, batch=16)
    pos, neg, preserve = SLIDERS[attribute]
    size, preserved = (model.size,) * 2, options.combinations(preserve)
    ends = f"{PERSON}, {pos}", f"{PERSON}, {neg}"
    prompts = train_text.encode(model, [PERSON], *ends, preserved, size)
    few = dict(trajectories=8, per_trajectory=4, seed=UNSEEN, batch=16)
    return train_text.collect(model, prompts, eta=training.ETA, size=size, **few)


@functools.cache
def without_slider(model, attribute: str) -> list:
    """The pictures at scale 0."""
    return effect.pictures(model, [[]], SEEDS, effect.prompts_without(attribute))[0]


def measured(model, row: dict, attribute: str, from_pairs: bool) -> dict:
    """A line of the log, with what the slider in its file does in place of the file's name."""
    slider = lora.load(row["file"], model.unet)
    slider.attach(model.unet)
    meter = student.meter(model.unet, slider, unseen(model, attribute, from_pairs), 16)
    slider.detach()
    columns = [[(slider, SCALES[0])], [(slider, SCALES[-1])]]
    drawn = effect.pictures(model, columns, SEEDS, effect.prompts_without(attribute))
    drawn.insert(1, without_slider(model, attribute))
    found = effect.summary(effect.table(drawn), attribute)
    keep = ("means", "moved", "monotonic", "worst_other", "worst_other_moved")
    cost = row["frozen"] + 3 * row["trained"]
    kept = {k: v for k, v in row.items() if k != "file"} | {k: found[k] for k in keep}
    return kept | {"cost": cost, "meter": meter}


def train_and_measure(
    model, args, folder: Path, attribute: str, from_pairs: bool, seed: int, who: str
) -> list[dict]:
    """The points of one trainer's curve."""
    out = folder / f"{who}_{attribute}_{'pairs' if from_pairs else 'text'}_{seed}"
    out.mkdir()
    if from_pairs:
        for i, group in enumerate(pairs.draw(attribute, RANGES[attribute], 16, seed)):
            for end, picture in zip(("neg", "pos"), group):
                images.save_image(picture, out / "pairs" / end / f"{i:03}.png")
    log, common = out / "log", (attribute, from_pairs)
    if who == "authors":
        settings = (*common, args.iterations, args.every, args.precision)
        command = authors(folder / who, out, *settings)
        rows = run(args.python, log, seed, command, folder / who)
    elif who == "ai-toolkit":
        settings = (attribute, args.ai_steps, args.ai_every, seed)
        command = ai_toolkit(folder / who, out, folder / "pictures", *settings)
        rows = run(args.ai_python, log, seed, command, folder / who)
    else:
        rows = []
        for steps in OUR_STEPS:
            log = out / f"log{steps}"
            rows += run(sys.executable, log, seed, ours(out, *common, steps, seed))[-1:]
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(rows):
            shutil.copy(row["file"], args.keep / f"{out.name}_{i}{Path(row['file']).suffix}")
    with MEASURING:
        return [measured(model, row, attribute, from_pairs) for row in rows]


# ------------------------------------------------------------------------------------------ results


def print_table(done: list[dict]):
    """Ours at its default number of steps, and theirs where they end, and where they move the
    attribute as far as ours for the first time: means of the seeds, and each of them."""
    print(
        "| slider | trainer | cost | s | share (+1, -1) | cosine | moved | most moved other |\n"
        + "|---" * 8
        + "|"
    )
    for name in dict.fromkeys(run["slider"] for run in done):
        of_this = [run for run in done if run["slider"] == name]
        readings = {}  # of each trainer, a list for each point of its curve: one of each seed
        for who in COLOURS:
            if curves := [run["points"] for run in of_this if run["who"] == who]:
                readings[who] = list(zip(*curves))
        default = readings.pop("ours")[OUR_STEPS.index(60)]
        print(f"| {name} | ours | {cells(default)} |")
        for who, points in readings.items():
            as_far = [rows for rows in points if mean(rows, "moved") >= mean(default, "moved")]
            if as_far and as_far[0] is not points[-1]:
                print(f"| {name} | {who}, when as far | {cells(as_far[0])} |")
            print(f"| {name} | {who} | {cells(points[-1])} |")


def mean(rows, key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def cells(rows) -> str:
    """Of one point of a trainer's curves, one of each seed."""
    meters = [row["meter"] for row in rows]
    share = f"{mean(meters, 'plus'):.2f}, {mean(meters, 'minus'):.2f}"
    moved = ", ".join(f"{row['moved']:.0%}" for row in rows)
    named = [(row["worst_other"].replace("_", " "), row["worst_other_moved"]) for row in rows]
    others = ", ".join(f"{name} {moved_by:.0%}" for name, moved_by in named)
    cost = f"{mean(rows, 'cost'):,.0f} | {mean(rows, 'seconds'):.0f}"
    return f"{cost} | {share} | {mean(meters, 'cosine'):.2f} | {moved} | {others}"


def plot(plt, done: list[dict], path: Path):
    """Attribute moved (full lines) and the most moved other (dashed) over evaluations and over
    seconds: a row for each slider, a line for each training."""
    names = list(dict.fromkeys(run["slider"] for run in done))
    figure, axes = plt.subplots(len(names), 2, figsize=(9, 2.4 * len(names)), squeeze=False)
    for run_ in done:
        row = axes[names.index(run_["slider"])]
        row[0].set_ylabel(f"{run_['slider']}\nshare of the range")
        for axis, (key, (label, ticks)) in zip(row, X_AXES.items()):
            for what, (style, meaning) in CURVES.items():
                xs, ys = zip(*((point[key], point[what]) for point in run_["points"]))
                label_ = f"{run_['who']}: {meaning}"
                axis.plot(xs, ys, style, color=COLOURS[run_["who"]], markersize=3, label=label_)
            axis.set(xscale="log", ylim=(0, 1), xlabel=label)
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    by_label = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1]))  # one of each
    figure.legend(by_label.values(), by_label.keys(), ncols=3, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.7 / (2.4 * len(names))))
    figure.savefig(path, dpi=80)


def parser():
    p = cli.plain_parser(__doc__)
    p.add_argument("--authors", type=Path, metavar="DIR", help="clone of the authors' code")
    p.add_argument("--ai-toolkit", type=Path, metavar="DIR", help="clone of ai-toolkit")
    for option, whose in (("--python", "the authors' code"), ("--ai-python", "ai-toolkit")):
        what = default_help(f"interpreter that runs {whose}")
        p.add_argument(option, default=sys.executable, metavar="PYTHON", help=what)
    of_trainings = dict(default=[0, 1], help="of trainings (default: 0,1)")
    p.add_argument("--seeds", type=cli.seed_list, **of_trainings)
    for option, default, what in (
        ("--iterations", 500, "of the authors' trainers"),
        ("--every", 100, "of them between readings"),
        ("--ai-steps", 3000, "of ai-toolkit's"),
        ("--ai-every", 500, "of them between readings"),
    ):
        p.add_argument(option, type=int, default=default, help=default_help(what))
    what = default_help("in which the authors' trainers keep everything, their LoRA too")
    precisions = dict(choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--precision", **precisions, help=what)
    p.add_argument("--jobs", type=int, default=1, help=default_help("trainings at once"))
    p.add_argument("--keep", type=Path, metavar="DIR", help="folder for all sliders")
    p.add_argument("--json", type=Path, default=Path("bench/published.json"), help="results")
    return p


def prepare(args, folder: Path) -> list[str]:
    """Copy the clones that are named into `folder`, ready to run; the trainers' names. ValueError
    where one is not such a clone, or none is named."""
    whose = ["ours"]
    if args.authors:
        copied(args.authors, folder / "authors", "--authors", TEXT)
        substitute(folder / "authors")
        whose.append("authors")
    if args.ai_toolkit:
        copied(args.ai_toolkit, folder / "ai-toolkit", "--ai-toolkit", CONCEPT_SLIDER)
        print("ai-toolkit: nothing is changed")
        whose.append("ai-toolkit")
    if len(whose) == 1:
        raise ValueError("--authors DIR or --ai-toolkit DIR is needed: a clone of theirs")
    return whose


def about(attribute: str, from_pairs: bool, seed: int, who: str) -> dict:
    """What names a curve in the results."""
    name = attribute.replace("_", " ") + (", 16 pairs" if from_pairs else "")
    return {"slider": name, "who": who, "seed": seed}


def place(run: dict) -> tuple:
    """Of a curve in the results, which are in the order of KINDS, seeds and COLOURS."""
    names = [about(*kind, 0, "")["slider"] for kind in KINDS]
    return names.index(run["slider"]), run["seed"], list(COLOURS).index(run["who"])


def main():
    p = parser()
    args = p.parse_args()
    changed = [name for name in SETTINGS if getattr(args, name) != p.get_default(name)]
    if changed and args.json == p.get_default("json"):
        options_ = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise ValueError(f"{args.json} holds what the defaults do: {options_} needs --json FILE")
    done = json.loads(args.json.read_text()) if args.json.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whose = prepare(args, folder)
        try:
            import matplotlib.pyplot as plt  # before hours of training, not after them
        except ImportError:
            remedy = "pip install matplotlib"
            raise ValueError(f"matplotlib is needed for the picture: {remedy}") from None
        model = SDXL.load(device="cpu")
        if "ai-toolkit" in whose:
            for picture, i in zip(generate(model, PERSON, seeds=PICTURES), PICTURES):
                images.save_image(picture, folder / "pictures" / f"{i}.png")
        tasks = []
        for (attribute, from_pairs), seed, who in itertools.product(KINDS, args.seeds, whose):
            run_ = about(attribute, from_pairs, seed, who)
            # ai-toolkit's is from words alone.
            is_done = any(run_.items() <= one.items() for one in done)
            if not is_done and not (who == "ai-toolkit" and from_pairs):
                tasks.append((attribute, from_pairs, seed, who))
        tasks.sort(key=lambda task: task[3] == "ai-toolkit")  # the longest last
        run_one = functools.partial(train_and_measure, model, args, folder)
        for task, points in at_once(args.jobs, run_one, tasks):
            done.append(about(*task) | {"points": points})
            done.sort(key=place)
            cli.write_text(args.json, json.dumps(done, indent=1))
    print_table(done)
    plot(plt, done, args.json.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
