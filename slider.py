"""Apply sliders:  python slider.py --prompt "a photo of a person" --slider age.safetensors --scales -2,0,2 --seeds 0-3

Writes a labelled strip (rows are seeds, columns are scales), the same as a GIF, and every picture as a file of its own.
`--slider FILE` may be repeated; FILE:1.5 keeps that one at 1.5 while the others sweep over the scales, FILE:1.5@0.5 also
switches it on after half of the denoising. Two sliders that sweep, with --grid, make a grid for each seed.

FILE may be a folder: all sliders in it, as train_space.py writes them. --each gives every slider a row of its own, --random 5
draws each seed five times with all sliders at scales drawn at random.

    python slider.py --image photo.jpg --prompt "a photo of a person" --slider age.safetensors --scales -2,0,2

edits a real picture: it is inverted first (invert.py; the inversion is kept in the output folder for the next time). With
--strength 0.6 it is instead noised to 60% of the way and drawn again from there (SDEdit), once for each seed.

From Python:

    model = SDXL.load()
    age = lora.load("age.safetensors", model.unet)
    pictures = slider.generate(model, "a photo of a person", seeds=[0, 1], sliders=[(age, 2.0)])
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cli
import invert
import lora
import page
import parallel
import pictures
import sampler
import train_text
import training
from formats import slider_files
from sdxl import MINIATURE
from sdxl_unet import checkpointing


def generate(model, prompt: str, seeds, sliders=(), **settings) -> list[Image.Image]:
    """One picture for each seed. sliders: pairs (slider, scale) or triples with a start of its own; settings: as in `sweep`."""
    return sweep(model, prompt, seeds, [sliders], **settings)[0]


def sweep(
    model, prompt: str, seeds, columns, *, negative: str = "", size: tuple[int, int] | None = None, batch: int = 16, start_from=None, uncond=None, **settings
) -> list[list[Image.Image]]:
    """The same seeds in several settings: a list of pictures, one for each seed, for each of `columns`. size: (height,
    width) in pixels; batch: pictures denoised at once. start_from: function of a few seeds, the latents to begin with instead
    of their noise; uncond: in the place of `negative`'s conditioning. columns and settings are sampler.sweep's."""
    cond, uncond = model.condition([prompt], size), uncond or model.condition([negative], size)
    start_from = start_from or (lambda some: sampler.noise(some, model.latent_shape(size), model.device, model.dtype))
    mine, out = parallel.mine(seeds), [[] for _ in columns]
    for i in range(0, len(mine), batch):
        x_T = start_from(mine[i : i + batch])
        for column, x_0 in sampler.sweep(model.unet, x_T, cond, uncond, columns, alpha_bar=model.alpha_bar, batch=batch, **settings):
            out[column] += model.pictures(x_0)
    return [parallel.gather(column, len(seeds)) for column in out]


# ------------------------------------------------------------------------------------------------ real pictures


def opened(model, path, side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture in the file `path` as the model can take it, and its size (height, width): of the proportions that are
    nearest to its own, in multiples of 64 and of about side x side pixels, as SDXL was trained on (Podell et al. 2023,
    section 2.3). The miniature knows squares only. What sticks out is cut off; nothing is distorted."""
    picture, side = pictures.read(path), side or model.size
    square = training.is_small(model.unet)
    sizes = [(h, side**2 // h // 64 * 64) for h in range(64, 4 * side, 64) if side**2 // h >= 64]
    h, w = (side, side) if square else min(sizes, key=lambda hw: abs(np.log(hw[1] / hw[0]) - np.log(picture.width / picture.height)))
    if picture.size != (w, h):
        print(f"{path}: {picture.width}x{picture.height}, brought to {w}x{h}" + ", its middle square: this model knows nothing else" * square)
    return pictures.fit(picture, h, w), (h, w)


def half_way(model, latents, strength: float, steps) -> dict:
    """SDEdit (Meng et al. 2022): where `sweep` begins in order to draw pictures again that are noised to `strength`, 0 to 1, of the way.
    latents: function of a few seeds, the latents (b, 4, h, w) of their pictures, or (1, 4, h, w) of one for all."""
    ts = sampler.timesteps(steps)
    skip = len(ts) - max(1, round(strength * len(ts)))

    def noised(seeds):
        z, t = latents(seeds), torch.full((len(seeds),), ts[skip], device=model.device)
        return sampler.add_noise(z, sampler.noise(seeds, z.shape[1:], model.device, model.dtype), t, model.alpha_bar)

    return dict(start_from=noised, skip=skip)


def begin_with(model, args, picture, size) -> dict:
    """Where `sweep` begins in order to draw `picture`, or to edit it: its settings start_from, uncond, skip."""
    z = model.latents([picture])
    if args.strength:
        return half_way(model, lambda seeds: z, args.strength, args.steps)
    settings = dict(method=args.invert, steps=args.steps, guidance=args.guidance)
    path = Path(args.out) / f"inversion-{invert.key(model, z, args.prompt, args.negative, settings)}.safetensors"

    def make(unfinished):
        most = invert.evaluations(args.invert, len(sampler.timesteps(args.steps)))
        print(f"{args.invert} inversion: {'at most ' * (args.invert == 'null-text')}{most} network evaluations")
        made = invert.invert(
            model.unet,
            z,
            model.condition([args.prompt], size),
            model.condition([args.negative], size),
            alpha_bar=model.alpha_bar,
            unfinished=unfinished,
            **settings,
        )
        print(f"{made.evaluations} network evaluations; kept in {path} for the next time")
        return made

    found = invert.kept(path, make)
    to = lambda c: c.to(model.device, model.dtype)
    return dict(start_from=lambda seeds: to(found.x_T), uncond=[tuple(map(to, u)) for u in found.uncond])


# ------------------------------------------------------------------------------------------------ scales


def useful_scales(sliders) -> list[float]:
    """Seven scales, 0 in the middle, over the range in which every one of `sliders` is useful, as their files say
    (training.probe); -3 to 3 where they do not."""
    ranges = [probed for s in sliders if (probed := slider_files.useful_range(s.metadata))]
    low, high = max([r[0] for r in ranges], default=-3.0), min([r[1] for r in ranges], default=3.0)
    return [round(float(s), 2) for s in (*np.linspace(low, 0, 4), *np.linspace(0, high, 4)[1:])]


def even_scales(draw, low: float, high: float, count: int = 7) -> list[float]:
    """`count` scales from low to high, 0 among them if it lies between, at which each picture looks as far from the next.

    draw: scales -> columns of pictures (sweep). Draws a finer sweep, adds up the mean absolute differences of the pixels
    from scale to scale, and divides the way into even steps, on either side of 0 as many as it has of the way.
    """
    fine = sorted({float(s) for s in (*np.linspace(low, high, 2 * count - 1), min(max(0.0, low), high))})
    values = [np.stack([np.asarray(p, dtype=np.float32) for p in column]) for column in draw(fine)]
    way = np.cumsum([0.0] + [np.abs(b - a).mean() for a, b in zip(values, values[1:])])
    middle = way[fine.index(min(max(0.0, low), high))]
    left = round((count - 1) * middle / max(way[-1], 1e-9))
    left = min(max(left, int(low < 0)), count - 1 - int(high > 0))
    at = [*np.linspace(0, middle, left + 1), *np.linspace(middle, way[-1], count - left)[1:]]
    return [round(float(s), 2) for s in np.interp(at, way, fine)]


# ------------------------------------------------------------------------------------------------ command line


def parse_args():
    p = cli.parser(__doc__)
    p.add_argument("--prompt", required=True, help="what the pictures show")
    p.add_argument("--image", help="edit this picture instead of drawing new ones; --prompt says what it shows")
    p.add_argument("--invert", choices=invert.METHODS, default="null-text", help="with --image: how it is inverted (default: %(default)s)")
    p.add_argument("--checkpointing", action="store_true", help="with --image: less memory, more time in null-text inversion")
    p.add_argument("--strength", type=cli.number, help="with --image: do not invert it; noise it this far, 0 to 1, and draw it again (SDEdit)")
    p.add_argument("--slider", action="append", default=[], type=cli.file_scale_start, metavar="FILE[:SCALE][@START]", help="slider file; may be repeated")
    p.add_argument("--scales", type=cli.numbers, help="scales to sweep over (default: seven over the sliders' useful range, as their files say)")
    p.add_argument("--even", action="store_true", help="seven scales over the same range, so spaced that each picture looks as far from the next")
    p.add_argument("--grid", action="store_true", help="two sliders: the first one's scales across, the second one's down, a grid for each seed")
    p.add_argument("--each", action="store_true", help="a sheet for each seed with a row for each slider, one at a time")
    p.add_argument("--random", type=int, metavar="N", help="each seed N times, every slider at a scale drawn between the lowest and the highest of --scales")
    p.add_argument("--guide", nargs=2, metavar=("POS", "NEG"), help="no slider: apply eq. (8) itself, between these prompts, at the scales times --eta")
    p.add_argument("--preserve", action="append", default=[], help="with --guide: concepts that must stay, as in train_text.py")
    p.add_argument("--eta", type=cli.number, help="with --guide: its strength at scale 1 (default: train_text.py's)")
    p.add_argument("--seeds", type=cli.integers, default=[0, 1, 2, 3], help="0,5,7 or 0-3 (default: 0-3)")
    p.add_argument("--negative", default="", help="negative prompt")
    p.add_argument("--guidance", type=cli.guidance, default=5.0, help="classifier-free guidance (default: %(default)s)")
    p.add_argument("--steps", type=cli.steps, default=30, help="DDIM steps (default: %(default)s), or the noise levels of a distilled model: 999,749,499,249")
    p.add_argument("--start", type=cli.share, default=0.3, help="share of the denoising after which the sliders switch on (default: %(default)s)")
    p.add_argument("--size", type=int, help="pixels (default: the model's own)")
    p.add_argument("--batch", type=int, help="pictures denoised at once (default: 16; for a UNet of SDXL's size 4)")
    p.add_argument(
        "--vae-tile",
        type=int,
        default=1024,
        metavar="PIXELS",
        help="decode larger pictures in tiles of this side; a smaller one takes less memory (default: %(default)s)",
    )
    p.add_argument("--html", metavar="FILE", help="also write a page with the slider to drag, every picture inside it; with --grid a plane of two")
    p.add_argument("--out", default="out", help="folder to write to (default: %(default)s)")
    return p.parse_args()


def check(args):
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: say what the pictures should show")
    for _, _, start in args.slider:
        if start is not None and not 0 <= start <= 1:
            raise ValueError(f"--slider ...@START must be between 0 and 1, not {start}")
    if args.vae_tile < 64:
        raise ValueError(f"--vae-tile must be at least 64, not {args.vae_tile}")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {args.batch}")
    if args.guide and args.slider:
        raise ValueError("--guide shows eq. (8) without a slider: leave --slider out")
    if (args.eta is not None or args.preserve) and not args.guide:
        raise ValueError("--eta and --preserve belong to --guide")
    if args.eta is not None and not args.eta > 0:
        raise ValueError(f"--eta must be above 0, not {args.eta}")
    if args.scales and not args.guide and all(scale is not None for _, scale, _ in args.slider):
        raise ValueError("--scales: there is no slider to sweep; give one without a scale of its own")
    for name in ("strength",) + ("invert",) * (args.invert != "null-text"):
        if getattr(args, name) is not None and not args.image:
            raise ValueError(f"--{name} belongs to --image")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise ValueError(f"--strength must be above 0 and at most 1, not {args.strength}")
    if args.even + args.grid + args.each + (args.random is not None) > 1:
        raise ValueError("--even, --grid, --each and --random: one of them at a time")
    if args.random is not None and args.random < 1:
        raise ValueError(f"--random must be at least 1, not {args.random}")
    if (args.each or args.random) and not any(scale is None for _, scale, _ in args.slider):
        raise ValueError(f"--{'each' if args.each else 'random'} needs sliders without a scale of their own")
    if args.grid and [scale for _, scale, _ in args.slider].count(None) != 2:
        raise ValueError("--grid needs two sliders without a scale of their own")
    if args.html and (args.each or args.random):
        raise ValueError("--html shows a sweep or a --grid, not --each or --random")
    if args.html:
        cli.output(args.html, ".html")
    for given, _, _ in args.slider:  # what is missing is said before a model is loaded, which can take a minute
        in_folder(given)
    if args.image and not Path(args.image).exists():
        raise ValueError(f"{args.image}: no such file")
    cli.folder(args.out)


def main():
    args = parse_args()
    check(args)
    out = Path(args.out)
    model = cli.load_model(args)
    model.vae.tile = args.vae_tile // model.factor
    size, picture, names_of_rows = (args.size,) * 2 if args.size is not None else None, None, [f"seed{s}" for s in args.seeds]
    checkpointing(model.unet, args.checkpointing)
    if args.image:
        picture, size = opened(model, args.image, args.size)
        if args.strength is None:  # an inversion is one noise, not many
            args.seeds, names_of_rows = [0], [Path(args.image).stem]
    model.latent_shape(size)
    sampler.timesteps(args.steps)
    sliders = [(lora.load(path, model.unet), fixed, args.start if start is None else start) for given, fixed, start in args.slider for path in in_folder(given)]
    settings = dict(
        steps=args.steps,
        guidance=args.guidance,
        start=args.start,
        negative=args.negative,
        size=size,
        batch=args.batch or (16 if training.is_small(model.unet) else 4),
    )
    if args.image:
        settings |= begin_with(model, args, picture, size)

    sweeping = [s for s, fixed, _ in sliders if fixed is None]
    scales = args.scales or (useful_scales(sweeping) if sweeping or args.guide else [0.0])
    at = lambda values: [(s, next(values) if fixed is None else fixed, start) for s, fixed, start in sliders]
    if args.guide:
        eta = args.eta or train_text.recipe(model.unet)["eta"]
        _, ends, _ = train_text.encode(model, [args.prompt], *args.guide, train_text.combinations(args.preserve), size)
        print(f"{2 + len(ends[0])} network evaluations a step and picture, where a slider needs 2")

    def draw(scales):
        columns = [at(iter(s)) if args.grid else at(itertools.repeat(s)) for s in scales]
        more = dict(ends=ends, etas=[scale * eta for scale in scales]) if args.guide else {}
        return sweep(model, args.prompt, args.seeds, columns, **settings, **more)  # for each column, a picture for each seed

    if args.each:
        return write_each(out, names_of_rows, sliders, scales, draw_columns=lambda columns: sweep(model, args.prompt, args.seeds, columns, **settings))
    if args.random:
        rng = np.random.default_rng(args.seeds[0])
        combinations = [iter(rng.uniform(min(scales), max(scales), len(sweeping)).round(2).tolist()) for _ in range(args.random)]
        drawn = sweep(model, args.prompt, args.seeds, [at(c) for c in combinations], **settings)
        return parallel.is_first() and write_strip(out, names_of_rows, drawn, [f"random{i + 1}" for i in range(args.random)], picture)
    if args.even:
        scales = even_scales(draw, min(scales), max(scales))
    drawn = draw([(across, down) for down in scales for across in scales] if args.grid else scales)
    names = [pictures.label(s) for s in scales]
    if not parallel.is_first():
        return
    if args.html:
        write_page(args, names_of_rows, scales, drawn)
    if args.grid:
        write_grids(out, names_of_rows, drawn, names)
    else:
        write_strip(out, names_of_rows, drawn, names if sweeping or args.guide else [""], picture)


def write_page(args, rows: list[str], scales, drawn):
    """args.html: a sweep, or the plane of a grid (page.py)."""
    names = [Path(path).stem for path, fixed, _ in args.slider if fixed is None] or ["eq. (8)"]
    n, says = len(scales), None
    sliders = [(name, scales) for name in names] if args.grid else [(", ".join(names), scales)]
    lines = lambda table: [[[table[j * n + i][r] for i in range(n)] for j in range(len(drawn) // n)] for r in range(len(rows))]
    if args.model == str(MINIATURE):  # only there can what is seen be measured
        from miniature.effect import said

        says = lines(said(drawn, len(sliders)))
    cli.write_text(args.html, page.html(args.prompt, sliders, rows, lines(drawn), says))
    print(f"{args.html}: a page to drag in; open it in a browser")


def in_folder(path: str) -> list[str]:
    """The slider files that `path` names: itself, or if it is a folder all in it, 2 before 10. ValueError if there is none."""
    if Path(path).is_file():
        return [path]
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    files = sorted(Path(path).glob("*.safetensors"), key=lambda f: (len(f.stem), f.stem))
    if not files:
        raise ValueError(f"{path}: holds no slider files")
    return [str(f) for f in files]


def write_each(out: Path, rows: list[str], sliders, scales, draw_columns):
    """each_seedN.png: a row for each slider, a column for each scale; the others are off."""
    drawn = [draw_columns([[(one, s if fixed is None else fixed, start)] for s in scales]) for one, fixed, start in sliders]
    if parallel.is_first():
        for i, row in enumerate(rows):
            sheet = [[column[i] for column in columns] for columns in drawn]
            pictures.save(pictures.sheet(sheet, [pictures.label(s) for s in scales], [str(j + 1) for j in range(len(sliders))]), out / f"each_{row}.png")
        print(f"{out}: each_{rows[0]}.png ...: rows are the {len(sliders)} sliders, columns scales {', '.join(pictures.label(s) for s in scales)}")


def write_strip(out: Path, rows: list[str], drawn, names: list[str], original=None):
    """Single files, and where there is more than one column a strip and a GIF that goes there and back."""
    for name, column in zip(names, drawn):
        for row, picture in zip(rows, column):
            pictures.save(picture, out / (row + (f"_scale{name}" if name else "") + ".png"))
    sheet = [[*([original] if original else []), *row] for row in zip(*drawn)]
    pictures.save(pictures.sheet(sheet, [*(["original"] if original else []), *names], [row.removeprefix("seed") for row in rows]), out / "strip.png")
    if len(names) == 1:
        return print(f"{out / 'strip.png'}: written")
    frames = [pictures.sheet([column], rows, [name]) for name, column in zip(names, drawn)]
    pictures.save_gif(frames + frames[-2:0:-1], out / "sweep.gif")
    print(f"{out / 'strip.png'}: rows are {', '.join(rows)}; columns are scales {', '.join(names)}; {out / 'sweep.gif'}: the same in motion")


def write_grids(out: Path, rows: list[str], drawn, names: list[str]):
    for i, row in enumerate(rows):
        mine = [column[i] for column in drawn]  # row by row
        grid = [mine[j : j + len(names)] for j in range(0, len(mine), len(names))]
        for down, line in zip(names, grid):
            for across, picture in zip(names, line):
                pictures.save(picture, out / f"{row}_scale{across}_{down}.png")
        pictures.save(pictures.sheet(grid, names, names), out / f"grid_{row}.png")
    print(f"{out}: a grid for each of {', '.join(rows)}; the first slider's scales across, the second's down: {', '.join(names)}")


if __name__ == "__main__":
    cli.run(main)
