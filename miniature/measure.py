"""The measuring stick: given pictures of the drawn world, the value of each attribute.

    readings = measure(pictures)  # {"age": array (N,), "hair": array of words, "fingers": ..., ...}

Where geometry allows, it is geometry: the number of fingers is counted along the hand's outline,
the eyes' width is counted in pixels. The rest is read by the judge, a small convolutional network
trained on drawn pictures and on what the VAE makes of them (train.py). It has never seen a
diffusion model's picture, nor the held-out pictures it is checked on:

    python -m miniature.measure  # correlation or accuracy of each reading on 1,000 held-out
                                 # renders, and on what the VAE makes of them
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from miniature import world
from sdxl import SDXL
from support.clip import ConvolutionalEncoder

WEIGHTS = Path(__file__).parent / "judge.safetensors"
NUMBERS = ["age", "smile", "eye_size", "skin"]  # read as numbers in their own unit (world.RANGES)
CHANCES = ["sex", "hair_length", "glasses", "hat", "malformed"]  # read as probabilities, 0 to 1
WORDS = {"hair": list(world.HAIR), "background": list(world.BACKGROUNDS), "kind": ["face", "hand"]}
OUTPUTS = len(NUMBERS) + len(CHANCES) + sum(map(len, WORDS.values()))


def targets(a: dict) -> list[float]:
    """What the judge should say of attributes `a`: numbers in [-1, 1], chances 0 or 1, word
    indices; NaN where a hand has no such thing."""

    def scale(name):
        low, high = world.RANGES[name]
        return 2 * (a[name] - low) / (high - low) - 1

    return (
        [scale(n) if n in a else math.nan for n in NUMBERS]
        + [a.get(n, math.nan) for n in CHANCES]
        + [words.index(a[n]) if n in a else math.nan for n, words in WORDS.items()]
    )


def judge_loss(out, target):
    """out (B, OUTPUTS), target (B, ...) of `targets`: squared errors, and cross-entropies, of what
    is not NaN."""
    given = ~target.isnan()
    numbers = slice(0, len(NUMBERS))
    chances = slice(len(NUMBERS), len(NUMBERS) + len(CHANCES))
    known = given[:, numbers]
    loss = 4 * F.mse_loss(out[:, numbers][known], target[:, numbers][known])
    known = given[:, chances]
    cross_entropy = F.binary_cross_entropy_with_logits
    loss = loss + cross_entropy(out[:, chances][known], target[:, chances][known])
    at = chances.stop
    for i, words in enumerate(WORDS.values()):
        column = target[:, chances.stop + i]
        known = ~column.isnan()
        loss = loss + 0.5 * F.cross_entropy(out[known, at : at + len(words)], column[known].long())
        at += len(words)
    return loss


@functools.cache
def judge() -> ConvolutionalEncoder:
    """The trained judge: pictures (B, 3, 128, 128) in [-1, 1] -> (B, OUTPUTS), numbers scaled to
    [-1, 1], then logits."""
    network = ConvolutionalEncoder(OUTPUTS)
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """What the judge looks at: (N, 3, 128, 128) in [-1, 1]."""
    arrays = [np.asarray(p.convert("RGB").resize((world.SIZE,) * 2)) for p in pictures]
    x = torch.from_numpy(np.stack(arrays))
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def measure(pictures: list[Image.Image]) -> dict[str, np.ndarray]:
    """Pictures -> readings, an array (N,) each: world.RANGES' names, `hair`, `background`, `kind`,
    `fingers`, `eye_pixels`."""
    out = torch.cat([judge()(part) for part in tensor(pictures).split(64)])
    readings = {}
    for i, name in enumerate(NUMBERS):
        low, high = world.RANGES[name]
        readings[name] = (low + (out[:, i].clamp(-1, 1) + 1) / 2 * (high - low)).numpy()
    for i, name in enumerate(CHANCES, len(NUMBERS)):
        readings[name] = out[:, i].sigmoid().numpy()
    at = len(NUMBERS) + len(CHANCES)
    for name, words in WORDS.items():
        readings[name] = np.array(words)[out[:, at : at + len(words)].argmax(1).numpy()]
        at += len(words)
    both = list(zip(pictures, readings["kind"]))
    fingers = [count_fingers(p) if kind == "hand" else 0 for p, kind in both]
    widths = [eye_pixels(p) if kind == "face" else 0.0 for p, kind in both]
    return readings | {"fingers": np.array(fingers), "eye_pixels": np.array(widths)}


def wrong(readings: dict, kind: str) -> np.ndarray:
    """(N,) bool, of pictures that should show a `kind`, "face" or "hand": malformed ones, hands
    without exactly five fingers, pictures of something else."""
    found = (readings["malformed"] > 0.5) | (readings["kind"] != kind)
    return found | (readings["fingers"] != 5) if kind == "hand" else found


# ----------------------------------------------------------------------------------------- geometry


def count_fingers(picture: Image.Image) -> int:
    """Fingers of an open hand: peaks of the outline's distance from the palm's centre, the wrist's
    side left out."""
    x = np.asarray(picture.convert("RGB")).astype(float)
    edges = [edge.reshape(-1, 3) for edge in (x[:6], x[:60, :4], x[:60, -4:])]
    ground = np.median(np.concatenate(edges), 0)
    hand = np.abs(x - ground).sum(-1) > 40  # (H, W)
    # The palm's centre is the middle of the largest disc that fits: what survives erosion longest.
    palm, eroded, radius = hand.copy(), hand, 0
    while eroded.any():
        palm, radius = eroded, radius + 1
        eroded = palm & np.roll(palm, 1, 0) & np.roll(palm, -1, 0)
        eroded = eroded & np.roll(palm, 1, 1) & np.roll(palm, -1, 1)
        eroded[0] = eroded[-1] = eroded[:, 0] = eroded[:, -1] = False
    if radius < 8:
        return 0
    cy, cx = np.argwhere(palm).mean(0)
    hand = connected(hand, round(cy), round(cx))  # without specks: a pixel in a corner is no finger
    # How far the hand reaches in each direction, from straight down (the wrist) once around.
    angles = np.radians(np.arange(42, 318.1, 0.5))
    reach = np.arange(0, 75, 0.5)
    rows = np.round(cy + np.outer(np.cos(angles), reach)).astype(int)
    columns = np.round(cx + np.outer(np.sin(angles), reach)).astype(int)
    in_picture = (rows >= 0) & (rows < len(x)) & (columns >= 0) & (columns < x.shape[1])
    inside = in_picture & hand[rows.clip(0, len(x) - 1), columns.clip(0, x.shape[1] - 1)]
    profile = np.where(inside, reach, 0).max(1)  # (directions,)
    # Peaks with a valley of at least 3 pixels on both sides.
    fingers, low, high = 0, profile[0], -1.0
    for value in profile:
        if high < 0:  # going down into a valley
            low = min(low, value)
            if value > low + 3 and value > 1.45 * radius:
                high = value
        else:  # going up a finger
            high = max(high, value)
            if value < high - 3:
                fingers, high, low = fingers + 1, -1.0, value
    return fingers + (high > 0)


def connected(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """The part of a mask (H, W) that hangs together, over edges, with the place (row, column)."""
    part, more = np.zeros_like(mask), np.zeros_like(mask)
    more[row, column] = True
    while (more != part).any():
        part = more.copy()
        more[1:] |= part[:-1]
        more[:-1] |= part[1:]
        more[:, 1:] |= part[:, :-1]
        more[:, :-1] |= part[:, 1:]
        more &= mask
    return part


def eye_pixels(picture: Image.Image) -> float:
    """Width of an eye in pixels, both eyes' mean: from the first to the last white of the eye."""
    x = np.asarray(picture.convert("RGB")).astype(float)
    widths = []
    for left, right in ((36, 63), (65, 92)):  # where an eye may be, left and right of the nose
        window = x[52:72, left:right]
        white = (window.min(-1) > 215).sum(0) >= 2
        if white.any():
            at = np.flatnonzero(white)
            widths.append(at[-1] - at[0] + 1.0)
    return float(np.mean(widths)) if widths else 0.0


def held_out(n: int = 1000) -> tuple[list[dict], list[Image.Image]]:
    """The attributes of n renders that no training saw, and the renders."""
    rng = np.random.default_rng(987654321)
    truth = [world.sample(rng) for _ in range(n)]
    return truth, [world.draw(a) for a in truth]


def check(truth: list[dict], pictures: list[Image.Image]) -> dict[str, float]:
    """How well pictures of the attributes `truth` are read: correlation (numbers) or accuracy (the
    rest)."""
    readings = measure(pictures)
    faces = np.array([a["kind"] == "face" for a in truth])
    everything = np.ones(len(truth), bool)

    def true(name, of):
        """The attribute `name` of those pictures that the mask `of` (N,) picks."""
        return np.array([a[name] for a, picked in zip(truth, of) if picked])

    result = {}
    for name in NUMBERS:
        of = everything if name == "skin" else faces
        result[name] = np.corrcoef(true(name, of), readings[name][of])[0, 1]
    for name in CHANCES:
        of = everything if name == "malformed" else faces
        result[name] = np.mean(true(name, of).astype(bool) == (readings[name][of] > 0.5))
    for name in WORDS:
        of = faces if name == "hair" else everything
        result[name] = np.mean(true(name, of) == readings[name][of])
    result["fingers"] = np.mean(true("fingers", ~faces) == readings["fingers"][~faces])
    well_formed = faces & ~true("malformed", everything).astype(bool)
    widths = readings["eye_pixels"][well_formed]
    result["eye_pixels"] = np.corrcoef(true("eye_size", well_formed), widths)[0, 1]
    return {name: float(value) for name, value in result.items()}


def main():
    truth, pictures = held_out()
    model = SDXL.load()
    parts = [pictures[i : i + 50] for i in range(0, len(pictures), 50)]
    decoded = check(truth, [seen for part in parts for seen in model.decode(model.encode(part))])
    print(f"{'':12} drawn  through the VAE")
    for name, value in check(truth, pictures).items():
        print(f"{name:12} {value:.3f}  {decoded[name]:.3f}")


if __name__ == "__main__":
    main()
