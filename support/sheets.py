"""What slider.py writes: single pictures, strips, grids, GIFs and pages. In all of them `rows` are
the names of the seeds (or of the edited picture), and `columns` one list of pictures for each
setting, one picture for each row. infotext: what the PNGs say of themselves (infotext.Infotext)."""

from pathlib import Path

from support import cli, page
from support.images import contact_sheet, save_gif, save_image, scale_label

MAX_GIF_SIDE = 65535  # the format has 16 bits for it


def write_strip(out: Path, infotext, rows: list[str], columns, names: list[str], original=None):
    """Single files; of more than one column a strip and a GIF that goes there and back."""
    for c, (name, column) in enumerate(zip(names, columns)):
        for r, (row, picture) in enumerate(zip(rows, column)):
            path = out / (row + (f"_scale{name}" if name else "") + ".png")
            save_image(picture, path, **infotext.picture(c, r))
    first, title = ([original], ["original"]) if original else ([], [])
    sheet = [[*first, *row] for row in zip(*columns)]
    seeds = [row.removeprefix("seed") for row in rows]
    strip = contact_sheet(sheet, [*title, *names], seeds)
    save_image(strip, out / "strip.png", **infotext.sheet(names))
    if len(names) == 1:
        return print(f"{out / 'strip.png'}: written")
    print(f"{out / 'strip.png'}: rows are {', '.join(rows)}; columns are scales {', '.join(names)}")
    frames = [contact_sheet([column], rows, [name]) for name, column in zip(names, columns)]
    if frames[0].height > MAX_GIF_SIDE:
        return print(f"no sweep.gif: a GIF is at most {MAX_GIF_SIDE} pixels high")
    save_gif(frames + frames[-2:0:-1], out / "sweep.gif")
    print(f"{out / 'sweep.gif'}: the same in motion")


def write_each(out: Path, infotext, rows: list[str], columns_of, scales):
    """each_ROW.png: a line for each slider, a column for each scale. columns_of: one `columns` for
    each slider."""
    names = [scale_label(scale) for scale in scales]
    numbers = [str(i + 1) for i in range(len(columns_of))]
    for i, row in enumerate(rows):
        sheet = [[column[i] for column in columns] for columns in columns_of]
        path = out / f"each_{row}.png"
        save_image(contact_sheet(sheet, names, numbers), path, **infotext.sheet(names, i))
    shown = f"rows are the {len(numbers)} sliders, columns scales {', '.join(names)}"
    print(f"{out}: each_{rows[0]}.png ...: {shown}")


def write_grids(out: Path, infotext, rows: list[str], columns, names: list[str]):
    """Of two sliders: single files, and grid_ROW.png, the first one's scales across, the second's
    down. columns: all scales of the first at the second's first, then at its second ..."""
    n = len(names)
    for i, row in enumerate(rows):
        pictures = [column[i] for column in columns]
        grid = [pictures[j : j + n] for j in range(0, len(pictures), n)]
        for j, picture in enumerate(pictures):
            path = out / f"{row}_scale{names[j % n]}_{names[j // n]}.png"
            save_image(picture, path, **infotext.picture(j, i))
        sheet = contact_sheet(grid, names, names)
        save_image(sheet, out / f"grid_{row}.png", **infotext.sheet(names, i))
    shown = f"the first slider's scales across, the second's down: {', '.join(names)}"
    print(f"{out}: a grid for each of {', '.join(rows)}; {shown}")


def write_page(path, title: str, names: list[str], rows: list[str], scales, columns, captions=None):
    """A page to drag in (page.py): a sweep, or with two names the plane of a grid. captions:
    function (columns, number of names) -> a text for each picture of each column."""
    n = len(scales)  # columns: as in write_grids
    by_row = lambda table: [[row[j : j + n] for j in range(0, len(row), n)] for row in zip(*table)]
    texts = by_row(captions(columns, len(names))) if captions else None
    sliders = [(name, scales) for name in names]
    cli.write_text(path, page.render_page(title, sliders, rows, by_row(columns), texts))
    print(f"{path}: a page to drag in; open it in a browser")
