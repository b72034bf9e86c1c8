"""Pictures in and out: any file made RGB, pairs brought to one size, labelled sheets, files
written whole."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from formats import first_line, write_atomically

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def read_image(path) -> Image.Image:
    """An RGB picture, as a viewer would show it: turned as its EXIF says, 16 bits brought to 8,
    transparency on white. Raises ValueError, naming the file, for one that cannot be read."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({first_line(error)})") from None
    if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
        eight_bits = (np.asarray(picture).clip(0, 65535) / 257).round()
        picture = Image.fromarray(eight_bits.astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def crop_and_resize(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Resized to height x width without distortion: what sticks out on two sides is cut off."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def match_by_name(folders: list[Path]) -> list[list[Path]]:
    """The pictures that go together: one list for each name, with the file of that name (endings
    aside) in each folder. The strip and the GIF that slider.py puts beside its pictures are none.

    Raises ValueError for a missing or empty folder, two files of a name in one, and names that are
    not in all of them."""
    files = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        here = {}
        for file in sorted(folder.iterdir()):
            leave_out = file.name.startswith(".") or file.name in ("strip.png", "sweep.gif")
            if file.suffix.lower() in ENDINGS and not leave_out:
                if file.stem in here:
                    both = f"{here[file.stem].name} and {file.name}"
                    rule = "pictures are matched by name, without the ending"
                    raise ValueError(f"{folder}: has both {both}; {rule}")
                here[file.stem] = file
        if not here:
            raise ValueError(f"{folder}: holds no pictures ({', '.join(sorted(ENDINGS))})")
        files.append(here)
    everywhere = set.intersection(*(set(here) for here in files))
    for folder, here in zip(folders, files):
        if alone := sorted(set(here) - everywhere):
            lacks = "has no partner of the same name in every other folder"
            such = f"({len(alone)} such in {folder})"
            raise ValueError(f"{folder / here[alone[0]].name}: {lacks} {such}")
    return [[here[name] for here in files] for name in sorted(everywhere)]


def read_alike(files: list[Path]) -> list[Image.Image]:
    """Pictures that go together. Their sizes may differ, their proportions not: they would show
    different parts once they are cropped. Raises ValueError, naming them."""
    read_in = [read_image(file) for file in files]
    (w, h), first = read_in[0].size, files[0]
    for file, picture in zip(files, read_in):
        if abs(picture.width / picture.height - w / h) > 0.01 * w / h:
            sizes = f"is {picture.width}x{picture.height}, but {first} is {w}x{h}"
            raise ValueError(f"{file}: {sizes}: crop them to the same proportions")
    return read_in


def read_group(files: list[Path], size: tuple[int, int]) -> list[Image.Image]:
    """The same, cropped and resized to `size` (height, width)."""
    return [crop_and_resize(picture, *size) for picture in read_alike(files)]


def scale_label(scale: float) -> str:
    return f"{scale:+.3g}" if scale else "0"


def contact_sheet(
    rows: list[list[Image.Image]], columns: list[str], row_names: list[str]
) -> Image.Image:
    """A sheet of rows of pictures, with a label above each column and beside each row."""
    w, h = rows[0][0].size
    font = ImageFont.load_default(size=max(12, w // 9))
    head, side = 2 * font.size, max(int(font.getlength(name)) for name in row_names) + font.size
    out = Image.new("RGB", (side + w * len(columns), head + h * len(rows)), "white")
    on = ImageDraw.Draw(out)
    for c, name in enumerate(columns):
        on.text((side + w * (c + 0.5), head / 2), name, fill="black", font=font, anchor="mm")
    for r, (pictures, name) in enumerate(zip(rows, row_names)):
        on.text((side / 2, head + h * (r + 0.5)), name, fill="black", font=font, anchor="mm")
        for c, picture in enumerate(pictures):
            out.paste(picture, (side + w * c, head + h * r))
    return out


def save_image(picture: Image.Image, path: Path, **options):
    """Write a picture under a temporary name, then rename it. Its format is that of the path's
    ending; options are Pillow's."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda p: picture.save(p, format=kind, **options))


def save_gif(frames: list[Image.Image], path: Path, milliseconds: int = 250):
    """Frames of one size, again and again."""
    colours = [frame.quantize(128) for frame in frames]
    more = dict(save_all=True, append_images=colours[1:], duration=milliseconds, loop=0)
    save_image(colours[0], path, **more)
