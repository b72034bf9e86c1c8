"""The options of the trainers and of slider.py, their checks, and the prompts made of them."""

import argparse
import itertools
import warnings
from pathlib import Path

import lora
from formats import slider_files
from invert import METHODS
from support import cli, distributed, images, sizes
from support.training import ETA, LARGE, PUBLISHED, SMALL


def default_help(what: str) -> str:
    return f"{what} (default: %(default)s)"


def add_training_options(p, small=SMALL, large=LARGE, out="slider.safetensors"):
    """The options of every trainer. small, large: defaults by the UNet's size
    (training.prepare)."""

    def option(name, what, fixed=None, **more):
        """With the default `fixed`, or one that small and large hold."""
        said = fixed
        if name in small:
            fixed, said = None, f"{small[name]}; for a UNet of SDXL's size {large[name]}"
        p.add_argument(f"--{name}", default=fixed, help=f"{what} (default: {said})", **more)

    what = "slider file" if out.endswith(".safetensors") else "folder"
    p.add_argument("--out", default=out, help=default_help(f"{what} to write"))
    layers = "layers that change: attention (attn), cross-attention (xattn), all but that, or all"
    option("layers", layers, "noxattn", choices=lora.LAYERS)
    p.add_argument("--no-conv", action="store_true", help="leave convolutions out")
    option("rank", "the LoRA's rank", 4, type=int)
    option("alpha", "the LoRA's constant alpha", 1.0, type=cli.number)
    option("steps", "optimizer steps", type=int)
    option("batch", "samples in a step, of all processes together", type=int)
    option("lr", "learning rate", type=cli.number)
    flags = {
        "checkpointing": "gradient checkpointing: less memory, more time",
        "resume": "go on with a training of the same command that was stopped",
        "overwrite": "replace --out, or the checkpoint of a training that was stopped",
    }
    for name, what in flags.items():
        p.add_argument(f"--{name}", action="store_true", help=what)
    size = "pixels, 1024 or width x height as 832x1216 (default: the model's own, at most 512"
    size += "; of pairs its nearest size to their proportions)"
    p.add_argument("--size", type=sizes.size, help=size)
    p.add_argument("--seed", type=cli.seed, default=0)


def add_watching_options(p):
    """Options of text and pair trainers, to look at a training before, while and after it runs."""
    preview = "draw a strip every so many steps, beside the slider file (default: never)"
    p.add_argument("--preview", type=int, default=0, metavar="STEPS", help=preview)
    probe = default_help("pictures to find the useful range of scales with; 0: none")
    p.add_argument("--probe", type=int, default=4, metavar="SEEDS", help=probe)
    recipe = (
        "defaults of --steps, --batch, --lr and --eta: as measured here, or the published code's"
    )
    p.add_argument("--recipe", choices=["measured", "published"], default="measured", help=recipe)
    dry_run = "train nothing: say how many network evaluations, how long and how much memory"
    p.add_argument("--dry-run", action="store_true", help=dry_run)


def check_numbers(args, *positive):
    """ValueError unless these options, and those of every trainer, can be."""
    for name in (*positive, "rank", "alpha", "steps", "batch", "lr"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    processes = distributed.world_size()
    if args.batch is not None and args.batch < processes:
        raise ValueError(f"--batch must be at least {processes}, one sample for each process")
    for name in ("preview", "probe"):
        if getattr(args, name, 0) < 0:
            raise ValueError(f"--{name} must be 0 or more, not {getattr(args, name)}")


# ----------------------------------------------------------------------------------- train_text.py


def text_slider(doc: str):
    """The arguments of train_text.py. ValueError for what cannot be trained."""
    p = cli.model_parser(doc)
    p.add_argument("--pos", required=True, help="prompt of the slider's positive end, c+")
    p.add_argument("--neg", required=True, help="prompt of its negative end, c-")
    prompt = (
        "target prompt c_t; may be repeated (default: what --pos and --neg share before a comma)"
    )
    p.add_argument("--prompt", action="append", help=prompt)
    add_preserve(p, "concepts P that must stay")
    eta = f"strength of the teacher's change (default: {ETA}; published: {PUBLISHED['eta']:g})"
    p.add_argument("--eta", type=cli.number, help=eta)
    positive_only = "eq. (8) as printed: train scale +1 alone, not both ends"
    p.add_argument("--positive-only", action="store_true", help=positive_only)
    numbers = [
        ("trajectories", int, 16, "noises that the teacher denoises"),
        ("per-trajectory", int, 4, "x_t kept from each"),
        ("denoising-steps", int, 20, "DDIM steps of each trajectory"),
        ("guidance", cli.guidance, 3.0, "guidance scale of the trajectories"),
    ]
    for name, kind, default, what in numbers:
        p.add_argument(f"--{name}", type=kind, default=default, help=default_help(what))
    add_training_options(p)
    add_watching_options(p)
    args = cli.parse_args(p)

    prompts = [("prompt", words) for words in args.prompt or []]
    for name, words in [("pos", args.pos), ("neg", args.neg), *prompts]:
        if not words.strip():
            raise ValueError(f"--{name} is empty: give it some words")
    if args.pos.strip() == args.neg.strip():
        raise ValueError("--pos and --neg are the same: a slider needs two ends")
    numbers = ("eta", "guidance", "trajectories", "per_trajectory", "denoising_steps")
    check_numbers(args, *numbers)
    if args.per_trajectory > args.denoising_steps:
        raise ValueError(
            f"--per-trajectory {args.per_trajectory}: a trajectory of --denoising-steps "
            f"{args.denoising_steps} has no more x_t than that"
        )
    if args.trajectories > 1000:
        raise ValueError("--trajectories can be at most 1000: then come the meter's noises")
    if args.trajectories < distributed.world_size():
        at_least = f"at least {distributed.world_size()}, one for each process"
        raise ValueError(f"--trajectories must be {at_least}")
    target_prompts(args)
    for group in args.preserve:
        if len(combinations([group])) == 1:
            remedy = "name its absence, or what else there is, too: 'with a hat, without a hat'"
            warnings.warn(f"--preserve {group!r} is one alternative alone: {remedy}", stacklevel=2)
    return args


def add_preserve(p, what: str):
    text = f'{what}, "with a hat, without a hat"; repeated, P is every combination of one from each'
    p.add_argument("--preserve", action="append", default=[], help=text)


def combinations(groups: list[str]) -> list[str]:
    """P from the --preserve options, each a list of alternatives: one of each, every combination.
    ["man, woman", "with a hat"] -> ["man, with a hat", "woman, with a hat"]. [] -> []."""
    groups = [[c.strip() for c in text.split(",") if c.strip()] for text in groups]
    return [", ".join(p) for p in itertools.product(*filter(None, groups)) if p]


def target_prompts(args) -> list[str]:
    """--prompt, or what --pos and --neg share before their first comma. ValueError if nothing."""
    if args.prompt:
        return args.prompt
    first, other = args.pos.split(",")[0].strip(), args.neg.split(",")[0].strip()
    if first != other:
        raise ValueError(
            "--prompt is needed: what should the slider act on? (it can be left out only if --pos "
            'and --neg differ after a comma, as in "a photo of a person, very old")'
        )
    return [first]


# ---------------------------------------------------------------------------------- train_pairs.py


def pair_slider(doc: str):
    """The arguments of train_pairs.py. ValueError for what cannot be trained."""
    p = cli.model_parser(doc)
    p.add_argument("--neg", metavar="DIR", help="pictures of the slider's negative end (scale -1)")
    pos = "pictures of its positive end (scale 1), of the same names"
    p.add_argument("--pos", metavar="DIR", help=pos)
    at = dict(nargs=2, action="append", default=[], metavar=("SCALE", "DIR"))
    p.add_argument("--at", help="pictures at another strength; may be repeated", **at)
    prompt = "what the pictures show (default: nothing, the empty prompt)"
    p.add_argument("--prompt", default="", help=prompt)
    target = default_help("what both ends are taught to predict")
    p.add_argument("--target", choices=["shared", "noise"], default="shared", help=target)
    p.add_argument("--noises", type=int, default=32, help=default_help("noisings of each pair"))
    add_training_options(p)
    add_watching_options(p)
    args = cli.parse_args(p)
    check_numbers(args, "noises")
    scales_and_folders(args)
    return args


def scales_and_folders(args) -> tuple[list[float], list[Path]]:
    """What --neg, --pos and --at name, in the order of the scales. ValueError unless it can be
    fitted."""
    try:
        given = [(cli.number(scale), Path(folder)) for scale, folder in args.at]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--at wants a number and a folder: {error}") from None
    ends = ((-1.0, args.neg), (1.0, args.pos))
    given += [(scale, Path(folder)) for scale, folder in ends if folder]
    if len(given) < 2 or len({scale for scale, _ in given}) < len(given):
        raise ValueError(
            "two folders at least, each at a scale of its own, are needed: --neg DIR --pos DIR, "
            "or --at SCALE DIR for each"
        )
    if len({folder.resolve() for _, folder in given}) < len(given):
        raise ValueError("one folder is named twice: the ends of a slider differ")
    given.sort()
    return [scale for scale, _ in given], [folder for _, folder in given]


# ---------------------------------------------------------------------------------- train_space.py


def space(doc: str, small: dict, large: dict, start: float, held_out: int):
    """The arguments of train_space.py. small, large: its defaults by the UNet's size. start: its
    --start. held_out: pictures that only the meter sees. ValueError for what cannot be trained."""
    p = cli.model_parser(doc)
    prompt = "what is varied; may be repeated: samples take them in turn"
    p.add_argument("--prompt", action="append", required=True, help=prompt)
    numbers = [
        ("sliders", 8, "directions, a slider each"),
        ("samples", 512, "pictures whose spread is looked at"),
        ("train-samples", 128, "how many of --samples are trained on"),
        ("per-sample", 5, "x_t kept from each"),
    ]
    for name, default, what in numbers:
        p.add_argument(f"--{name}", type=int, default=default, help=default_help(what))
    clip = "CLIP, a folder or Hub id (default: what --model brings in image_encoder/)"
    p.add_argument("--clip", help=clip)
    principal = "principal directions as they are, as in the paper, not turned to independent ones"
    p.add_argument("--principal", action="store_true", help=principal)
    words = "file of words, one a line, to name directions with (default: a list of its own)"
    p.add_argument("--words", help=words)
    steps = default_help("DDIM steps, or the levels of a distilled model: 999,749,499,249")
    p.add_argument("--denoising-steps", type=cli.steps_or_levels, default=20, help=steps)
    guidance = default_help("guidance scale while drawing; 1 for a distilled model")
    p.add_argument("--guidance", type=cli.guidance, default=5.0, help=guidance)
    train_guidance = default_help("guidance scale in the predicted x_0")
    p.add_argument("--train-guidance", type=cli.guidance, default=1.0, help=train_guidance)
    what = "share of the denoising after which the sliders are on; 0 for a distilled model"
    p.add_argument("--start", type=cli.fraction, default=start, help=default_help(what))
    raw = "leave the sliders as strong as they come: scale 2 is then no standard deviation"
    p.add_argument("--raw-scale", action="store_true", help=raw)
    add_training_options(p, small, large, out="space")
    p.set_defaults(dry_run=False)
    args = p.parse_args()
    check_numbers(args, "sliders", "samples", "train_samples", "per_sample")
    if (fewest := min(args.samples, args.train_samples)) <= held_out:
        needed = f"more than {held_out} are needed, {held_out} of them for the meter alone"
        raise ValueError(f"--train-samples {fewest}: {needed}")
    out, new = Path(args.out), not (args.overwrite or args.resume)
    sliders = [out / f"{i + 1}.safetensors" for i in range(args.sliders)]
    if new and not (out / "space.json.checkpoint").exists():
        for path in filter(Path.exists, [out / "space.json", out / "sheet.png", *sliders]):
            raise ValueError(f"{path}: is there already: --overwrite replaces it")
    if args.samples <= args.sliders:
        needed = f"more pictures than --sliders {args.sliders} are needed"
        raise ValueError(f"--samples {args.samples}: {needed}")
    return args


# ---------------------------------------------------------------------------------------- slider.py


def slider(doc: str):
    """The arguments of slider.py. ValueError for what does not go together."""
    p = cli.model_parser(doc)

    def option(name, what, **more):
        what = default_help(what) if more.get("default") not in (None, [], "") else what
        p.add_argument(f"--{name}", help=what, **more)

    def flag(name, what):
        p.add_argument(f"--{name}", action="store_true", help=what)

    option("prompt", "what the pictures show", required=True)
    option("image", "edit this picture instead of drawing new ones; --prompt says what it shows")
    how = dict(choices=METHODS, default="null-text")
    option("invert", "with --image: how it is inverted", **how)
    flag("checkpointing", "with --image: gradient checkpointing in null-text inversion")
    sdedit = "with --image: do not invert it; noise it this far, 0 to 1, and draw it again (SDEdit)"
    option("strength", sdedit, type=cli.number)
    file = dict(type=cli.file_scale_start, metavar="FILE[:SCALE][@START]")
    option("slider", "slider file; may be repeated", action="append", default=[], **file)
    scales = (
        "scales to sweep over (default: seven over the sliders' useful range, as their files say)"
    )
    option("scales", scales, type=cli.numbers)
    flag("even", "seven scales over the same range, each picture as far from the next to the eye")
    flag("grid", "two sliders: the first one's scales across, the second's down, for each seed")
    flag("each", "a sheet for each seed with a row for each slider, one at a time")
    at_random = (
        "each seed N times, all sliders at random between the lowest and highest of --scales"
    )
    option("random", at_random, type=int, metavar="N")
    guide = "no slider: apply eq. (8) itself, between these prompts, at the scales times --eta"
    option("guide", guide, nargs=2, metavar=("POS", "NEG"))
    add_preserve(p, "with --guide: concepts that must stay")
    option(
        "eta", "with --guide: its strength at scale 1 (default: train_text.py's)", type=cli.number
    )
    seeds = "0,5,7 or 0-3 (default: 0-3)"
    p.add_argument("--seeds", type=cli.seed_list, default=[0, 1, 2, 3], help=seeds)
    option("negative", "negative prompt", default="")
    option("guidance", "classifier-free guidance", type=cli.guidance, default=5.0)
    steps = "DDIM steps, or the noise levels of a distilled model, such as 999,749,499,249"
    option("steps", steps, type=cli.steps_or_levels, default=30)
    start = "share of the denoising after which the sliders switch on"
    option("start", start, type=cli.fraction, default=0.3)
    size = "pixels, 1024 or width x height as 832x1216 (default: the model's own; with --image the"
    size += " nearest of its sizes to the picture's proportions)"
    option("size", size, type=sizes.size)
    batch = "pictures denoised at once (default: 16; for a UNet of SDXL's size 4)"
    option("batch", batch, type=int)
    tile = "decode larger pictures in tiles of this side; a smaller one takes less memory"
    option("vae-tile", tile, type=int, default=1024, metavar="PIXELS")
    page = "also write a page with the slider to drag, pictures inside; with --grid a plane of two"
    option("html", page, metavar="FILE")
    option("out", "folder to write to", default="out")
    no_metadata = "pictures do not say how they were made (the PNG text `parameters`)"
    p.add_argument("--no-metadata", action="store_true", help=no_metadata)
    args = p.parse_args()
    check_slider(args)
    return args


def check_slider(args):
    """ValueError for options of slider.py that do not go together, and for missing files: before a
    model is loaded, which can take a minute."""
    # A folder stands for all its files.
    files = lambda given: slider_files.list_files(given) if Path(given).is_dir() else [given]
    sweeping = sum(len(files(given)) for given, scale, _ in args.slider if scale is None)
    modes = {"each": args.each, "random": args.random is not None, "even": args.even}
    modes["grid"] = args.grid
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: say what the pictures should show")
    for _, _, start in args.slider:
        if start is not None and not 0 <= start <= 1:
            raise ValueError(f"--slider ...@START must be between 0 and 1, not {start}")
    for name, least in (("vae_tile", 64), ("batch", 1), ("random", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {least}, not {value}")
    if args.guide and args.slider:
        raise ValueError("--guide shows eq. (8) without a slider: leave --slider out")
    if (args.eta is not None or args.preserve) and not args.guide:
        raise ValueError("--eta and --preserve belong to --guide")
    if args.eta is not None and not args.eta > 0:
        raise ValueError(f"--eta must be above 0, not {args.eta}")
    if args.scales and not args.guide and not sweeping:
        raise ValueError("--scales: no slider to sweep; give one without a scale of its own")
    names = [images.scale_label(scale) for scale in args.scales or ()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--scales: two of them are {min(twice)} in the names of the pictures")
    if not args.image and (args.strength is not None or args.invert != "null-text"):
        name = "invert" if args.strength is None else "strength"
        raise ValueError(f"--{name} belongs to --image")
    if args.strength is not None and args.invert != "null-text":
        raise ValueError("--strength does not invert: leave --invert out")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise ValueError(f"--strength must be above 0 and at most 1, not {args.strength}")
    if sum(modes.values()) > 1:
        raise ValueError("--even, --grid, --each and --random: one of them at a time")
    for name in ("each", "random"):
        if modes[name] and not sweeping:
            raise ValueError(f"--{name} needs sliders without a scale of their own")
    if args.even and not (sweeping or args.guide):
        raise ValueError("--even needs sliders without a scale of their own, or --guide")
    if args.grid and sweeping != 2:
        raise ValueError("--grid needs two sliders without a scale of their own")
    if args.html and (args.each or args.random):
        raise ValueError("--html shows a sweep or a --grid, not --each or --random")
    if args.html:
        cli.output_file(args.html, ".html")
    if args.html and not (sweeping or args.guide):
        raise ValueError("--html needs something to drag: a slider without a scale of its own")
    if args.image and not Path(args.image).exists():
        raise ValueError(f"{args.image}: no such file")
    if args.image and Path(args.image).resolve().parent == Path(args.out).resolve():
        why = "the picture itself is in there, and could be drawn over"
        raise ValueError(f"--out {args.out}: {why}: name another folder")
    for given, _, _ in args.slider:
        slider_files.list_files(given)
    cli.output_folder(args.out)
