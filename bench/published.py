"""The published trainers themselves beside ours, on the miniature, on the CPU:

    python -m bench.published --authors ../sliders

--authors names a clone of github.com/rohitgandikota/sliders. Its text trainer (train_lora_xl.py)
and its image trainer (train_lora-scale-xl.py) run in processes of their own, on a temporary copy
in which SUBSTITUTIONS are made and nothing else; they are printed. All have the same words, the
same preserved concepts, rank, layers and eta; each has its own defaults for the rest. Ours is
trained anew for each number of steps, theirs is read every --every iterations.

What passes through the UNet is counted by a hook (driver.py), sliders are read by our loader and
measured by the measuring stick on the same seeds and prompts, which no training used. A UNet
evaluation is one sample; one with gradients counts as three. --python is the interpreter that has
what their code imports (diffusers, pydantic, pyyaml). What --json holds is not run again."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import lora
from miniature import compose, effect, pairs
from miniature.compose import PERSON, SLIDERS
from sdxl import MINIATURE, SDXL
from support import cli, images, options, training
from support.options import default_help

ROOT = Path(__file__).parent.parent
DRIVER = Path(__file__).with_name("driver.py")
OUR_STEPS = (15, 30, 60, 120)  # 60 is the default
SEEDS = list(range(2000, 2032))  # of the pictures that are measured

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


def prepared(clone: Path, folder: Path) -> Path:
    """A copy of the clone's trainers in `folder` with SUBSTITUTIONS made; each is printed.
    ValueError where the clone does not have the text."""
    copy = folder / "authors"
    if not (clone / TEXT).is_dir():
        raise ValueError(f"--authors: {clone} has no {TEXT}: it names a clone of their repository")
    shutil.copytree(clone / "trainscripts", copy / "trainscripts")
    for name, changes in SUBSTITUTIONS.items():
        code = (copy / name).read_text(encoding="utf-8")
        for old, new in changes:
            if old not in code:
                raise ValueError(f"--authors: {name} does not say {old!r}: another version")
            print(f"{name}: {old!r} becomes {new!r}, {code.count(old)} times")
            code = code.replace(old, new)
        (copy / name).write_text(code, encoding="utf-8")
    return copy


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


def authors(copy: Path, out: Path, attribute: str, from_pairs: bool, iterations: int, every: int):
    """The command of the authors' trainer. JSON is YAML too."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "prompts_file": str(out / "prompts.yaml"),
        "pretrained_model": {"name_or_path": str(MINIATURE), "v2": False, "v_pred": False},
        "network": {"type": "c3lier", "rank": 4, "alpha": 1.0, "training_method": "noxattn"},
        "train": {
            "precision": "bfloat16",
            "noise_scheduler": "ddim",
            "iterations": iterations,
            "lr": 0.0002,
            "optimizer": "AdamW",
            "lr_scheduler": "constant",
            "max_denoising_steps": 50,
        },
        # It saves after iterations 1, 1 + per_steps, ... but the first.
        "save": {"name": "slider", "path": str(out), "per_steps": every, "precision": "bfloat16"},
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


def ours(out: Path, attribute: str, from_pairs: bool, steps: int, seed: int):
    """The command of our trainer, with its defaults but for the number of steps."""
    about = ["--steps", steps, "--seed", seed, "--probe", 0]
    about += ["--device", "cpu", "--out", out / f"{steps}.safetensors", "--overwrite"]
    if from_pairs:
        ends = ["--neg", out / "pairs" / "neg", "--pos", out / "pairs" / "pos"]
        return ["train_pairs.py", *ends, "--prompt", PERSON, *about]
    return [*compose.command(attribute), *about]


def run(python: str, log: Path, seed: int, command: list) -> list[dict]:
    """Run a trainer's command under driver.py; the lines of its log, one for each file."""
    words = [str(word) for word in [DRIVER, log, seed, *command]]
    print("$", " ".join(words), flush=True)
    subprocess.run([python, *words], cwd=ROOT, check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


# ---------------------------------------------------------------------------------------- measuring


def measured(model, row: dict, attribute: str) -> dict:
    """A line of the log, with what the slider in its file does in place of the file's name."""
    slider = lora.load(row["file"], model.unet)
    columns = [[(slider, scale)] for scale in effect.SCALES]
    prompts = effect.prompts_without(attribute)
    found = effect.summary(effect.readings(model, columns, SEEDS, prompts), attribute)
    keep = ("means", "moved", "monotonic", "worst_other", "worst_other_moved")
    cost = row["frozen"] + 3 * row["trained"]
    kept = {k: v for k, v in row.items() if k != "file"} | {k: found[k] for k in keep}
    return kept | {"cost": cost}


def train_and_measure(model, args, copy, folder, who, attribute, from_pairs, seed) -> list[dict]:
    """The points of one trainer's curve."""
    out = folder / f"{who}_{attribute}_{'pairs' if from_pairs else 'text'}_{seed}"
    if from_pairs:
        for i, group in enumerate(pairs.draw(attribute, (0.7, 1.5), 16)):
            for end, picture in zip(("neg", "pos"), group):
                images.save_image(picture, out / "pairs" / end / f"{i:03}.png")
    common = (attribute, from_pairs)
    if who == "authors":
        command = authors(copy, out, *common, args.iterations, args.every)
        rows = run(args.python, out / "log", seed, command)
    else:
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        for steps in OUR_STEPS:
            log = out / f"log{steps}"
            rows += run(sys.executable, log, seed, ours(out, *common, steps, seed))[-1:]
    return [measured(model, row, attribute) for row in rows]


# ------------------------------------------------------------------------------------------ results


def print_table(done: list[dict]):
    """The last reading of theirs, and ours at its default number of steps: the mean of the seeds,
    then each."""
    print(
        "| slider | trainer | cost | s | moved | in order | most moved other |\n" + "|---" * 7 + "|"
    )
    for name in dict.fromkeys(run["slider"] for run in done):
        for who in ("ours", "authors"):
            runs = [r["points"] for r in done if (r["slider"], r["who"]) == (name, who)]
            at = [points[OUR_STEPS.index(60) if who == "ours" else -1] for points in runs]
            if at:
                print(f"| {name} | {who} | {' | '.join(cells(at))} |")


def cells(rows: list[dict]) -> list[str]:
    mean = lambda key: statistics.mean(row[key] for row in rows)
    others = ", ".join(
        f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}" for r in rows
    )
    moved = ", ".join(f"{row['moved']:.0%}" for row in rows)
    ordered = "yes" if all(row["monotonic"] for row in rows) else "no"
    return [f"{mean('cost'):,.0f}", f"{mean('seconds'):.0f}", moved, ordered, others]


def plot(done: list[dict], path: Path):
    """Attribute moved (full lines) and the most moved other (dashed) over evaluations and over
    seconds, a row for each slider."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(run["slider"] for run in done))
    _, axes = plt.subplots(len(names), 2, figsize=(8, 2.2 * len(names)), squeeze=False)
    colours = {"ours": "tab:blue", "authors": "tab:orange"}
    for run_ in done:
        row = axes[names.index(run_["slider"])]
        for axis, key in zip(row, ("cost", "seconds")):
            for what, style in (("moved", "o-"), ("worst_other_moved", "x--")):
                xs, ys = zip(*((point[key], point[what]) for point in run_["points"]))
                axis.plot(xs, ys, style, color=colours[run_["who"]], markersize=3, lw=1)
            axis.set(xscale="log", ylim=(0, 1), xlabel=key, title=run_["slider"])
    plt.tight_layout()
    plt.savefig(path, dpi=80)


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("--authors", required=True, type=Path, metavar="DIR", help="clone of their code")
    python = default_help("interpreter that runs it")
    p.add_argument("--python", default=sys.executable, help=python)
    p.add_argument(
        "--seeds", type=cli.seed_list, default=[0, 1], help="of trainings (default: 0,1)"
    )
    p.add_argument("--iterations", type=int, default=500, help=default_help("of theirs"))
    p.add_argument("--every", type=int, default=100, help=default_help("theirs between readings"))
    p.add_argument("--json", type=Path, default=Path("bench/published.json"), help="results")
    args = p.parse_args()
    done = json.loads(args.json.read_text()) if args.json.exists() else []
    sliders = [(attribute, False) for attribute in ("age", "smile", "eye_size")]
    with tempfile.TemporaryDirectory() as folder:
        copy = prepared(args.authors, Path(folder))
        model = SDXL.load(device="cpu")
        for attribute, from_pairs in [*sliders, ("eye_size", True)]:
            name = attribute.replace("_", " ") + (", 16 pairs" if from_pairs else "")
            for seed in args.seeds:
                for who in ("ours", "authors"):
                    about = {"slider": name, "who": who, "seed": seed}
                    if any(about.items() <= run.items() for run in done):
                        continue
                    of = (who, attribute, from_pairs, seed)
                    points = train_and_measure(model, args, copy, Path(folder), *of)
                    done.append(about | {"points": points})
                    cli.write_text(args.json, json.dumps(done, indent=1))
    print_table(done)
    plot(done, args.json.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
