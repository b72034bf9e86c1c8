"""Apply sliders:  python slider.py --prompt "a photo of a person" --slider age.safetensors --scales -2,0,2 --seeds 0-3

Writes a labelled strip (rows are seeds, columns are scales) and every picture as a file of its own.
`--slider FILE` may be repeated; FILE:1.5 keeps that one at 1.5 while the others sweep over --scales.

From Python:

    model = SDXL.load()
    age = lora.load("age.safetensors", model.unet).attach(model.unet)
    pictures = slider.generate(model, "a photo of a person", seeds=[0, 1], sliders=[(age, 2.0)])
"""

import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import cli
import lora
import sampler


def generate(model, prompt: str, seeds, sliders=(), *, steps: int = 30, guidance: float = 5.0, start: float = 0.3,
             negative: str = "", size: tuple[int, int] | None = None, batch: int = 16) -> list[Image.Image]:
    """One picture for each seed. sliders: pairs (attached lora.Slider, scale); the rest as in sampler.sample."""
    pictures = []
    for i in range(0, len(seeds), batch):
        x_T = sampler.noise(seeds[i:i + batch], model.latent_shape(size), model.device, model.dtype)
        cond, uncond = model.condition([prompt] * len(x_T), size), model.condition([negative] * len(x_T), size)
        x_0 = sampler.sample(model.unet, x_T, cond, uncond, alpha_bar=model.alpha_bar, steps=steps, guidance=guidance,
                             sliders=sliders, start=start)
        pictures += model.pictures(x_0)
    return pictures


def strip(rows: list[list[Image.Image]], columns: list[str], row_names: list[str]) -> Image.Image:
    """A sheet of rows of pictures, with a label above each column and beside each row."""
    w, h = rows[0][0].size
    font = ImageFont.load_default(size=max(12, w // 9))
    head, side = 2 * font.size, max(int(font.getlength(name)) for name in row_names) + font.size
    sheet = Image.new("RGB", (side + w * len(columns), head + h * len(rows)), "white")
    on = ImageDraw.Draw(sheet)
    for c, name in enumerate(columns):
        on.text((side + w * (c + 0.5), head / 2), name, fill="black", font=font, anchor="mm")
    for r, (pictures, name) in enumerate(zip(rows, row_names)):
        on.text((side / 2, head + h * (r + 0.5)), name, fill="black", font=font, anchor="mm")
        for c, picture in enumerate(pictures):
            sheet.paste(picture, (side + w * c, head + h * r))
    return sheet


def save_picture(picture: Image.Image, path: Path):
    """Write a PNG under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


def parse_args():
    p = cli.parser(__doc__)
    p.add_argument("--prompt", required=True, help="what the pictures show")
    p.add_argument("--slider", action="append", default=[], type=cli.file_and_scale, metavar="FILE[:SCALE]", help="slider file; may be repeated")
    p.add_argument("--scales", type=cli.numbers, default=[-3, -2, -1, 0, 1, 2, 3],
                   help="scales to sweep over (default: -3,-2,-1,0,1,2,3)")
    p.add_argument("--seeds", type=cli.integers, default=[0, 1, 2, 3], help="0,5,7 or 0-3 (default: 0-3)")
    p.add_argument("--negative", default="", help="negative prompt")
    p.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance (default: %(default)s)")
    p.add_argument("--steps", type=int, default=30, help="DDIM steps (default: %(default)s)")
    p.add_argument("--start", type=float, default=0.3, help="share of the denoising after which the sliders switch on (default: %(default)s)")
    p.add_argument("--size", type=int, help="pixels (default: the model's own)")
    p.add_argument("--vae-tile", type=int, default=1024, metavar="PIXELS",
                   help="decode larger pictures in tiles of this side; a smaller one takes less memory (default: %(default)s)")
    p.add_argument("--out", default="out", help="folder to write to (default: %(default)s)")
    return p.parse_args()


def main():
    args = parse_args()
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: say what the pictures should show")
    if not 0 <= args.start <= 1:
        raise ValueError(f"--start must be between 0 and 1, not {args.start}")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out names a folder")
    if args.vae_tile < 64:
        raise ValueError(f"--vae-tile must be at least 64, not {args.vae_tile}")
    model = cli.load_model(args)
    model.vae.tile = args.vae_tile // model.factor
    size = (args.size,) * 2 if args.size else None
    model.latent_shape(size)
    sampler.timesteps(args.steps)
    sliders = [(lora.load(path, model.unet).attach(model.unet), fixed) for path, fixed in args.slider]
    sweeps = any(fixed is None for _, fixed in sliders)
    scales = args.scales if sweeps else [1.0]  # nothing to sweep: one column
    columns = [generate(model, args.prompt, args.seeds, [(s, scale if fixed is None else fixed) for s, fixed in sliders],
                        steps=args.steps, guidance=args.guidance, start=args.start, negative=args.negative, size=size)
               for scale in scales]
    labels = [f"{scale:+g}" if scale else "0" for scale in scales] if sweeps else [""]
    for label, column in zip(labels, columns):
        for seed, picture in zip(args.seeds, column):
            save_picture(picture, out / (f"seed{seed}" + (f"_scale{label}" if label else "") + ".png"))
    save_picture(strip([list(row) for row in zip(*columns)], labels, [str(s) for s in args.seeds]), out / "strip.png")
    print(f"{out / 'strip.png'}: rows are seeds {', '.join(map(str, args.seeds))}; columns are scales {', '.join(labels)}" if sweeps
          else f"{out / 'strip.png'}: written")


if __name__ == "__main__":
    cli.run(main)
