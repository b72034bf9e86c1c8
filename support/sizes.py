"""Sizes of pictures: as --size names them, and as SDXL was trained on them."""

import argparse
import re
import warnings

import numpy as np

# The long and the short side of SDXL's training pictures, of about 1024 x 1024 pixels (Podell et
# al. 2023, appendix I). Either may be the width.
SIDES = [(1024, 1024), (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832)]
SIDES += [(1280, 768), (1344, 768), (1344, 704), (1408, 704), (1472, 704), (1536, 640), (1600, 640)]
SIDES += [(1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512)]
OTHER = {short: long for long, short in SIDES} | dict(SIDES)  # a side's other one


def size(text: str) -> str:
    """'1024' and '832x1216' (width x height) as they are. For argparse's type=. A warning for one
    number that is a side of SDXL's oblong pictures: a square comes of it."""
    if not re.fullmatch(r"[1-9]\d{1,4}(x[1-9]\d{1,4})?", text):
        how = "write one number for a square, as 1024, or width x height, as 832x1216"
        raise argparse.ArgumentTypeError(f"{text!r} is no size: {how}")
    if text.isdigit() and int(text) in OTHER and int(text) not in (512, 768, 1024):
        oblong = f"{text}x{OTHER[int(text)]} is one of SDXL's sizes, width x height"
        warnings.warn(f"--size {text}: a square of {text}x{text} pixels; {oblong}", stacklevel=2)
    return text


def height_width(text: str | int) -> tuple[int, int]:
    """'1024' -> (1024, 1024), '832x1216' -> (1216, 832): (height, width), as in the code."""
    sides = [int(side) for side in str(text).split("x")]
    return sides[-1], sides[0]


def name(height: int, width: int) -> str:
    """(1216, 832) -> '832x1216', (512, 512) -> '512': as --size has it."""
    return str(height) if height == width else f"{width}x{height}"


def nearest(ratio: float, side: int, multiple: int) -> tuple[int, int]:
    """(height, width) of the training size with the proportions nearest to `ratio`, width over
    height, brought to about side x side pixels in multiples of `multiple`."""
    to = lambda pixels: max(multiple, round(pixels * side / 1024 / multiple) * multiple)
    sizes = {(to(h), to(w)) for pair in SIDES for h, w in (pair, pair[::-1])}
    return min(sorted(sizes), key=lambda hw: abs(np.log(hw[1] / hw[0] / ratio)))


def for_pictures(model, ratios, side: int, square: bool) -> str:
    """The size, as --size has it, that pictures of these proportions (width over height) are best
    brought to: one for all. square: of a model that was trained on squares alone."""
    if square:
        return str(side)
    middle = float(np.exp(np.median(np.log(ratios))))
    return name(*nearest(middle, side, model.factor * model.unet.factor))
