"""The drawn world: faces and open hands whose every attribute is known exactly.

    rng = np.random.default_rng(0)
    a = sample(rng)              # a dict of attributes: one face or one hand
    picture = draw(a)            # a 128x128 RGB PIL image
    words = caption(a, rng)      # "a photo of an old man with glasses, frowning, blue background"

The world poses the paper's problems on purpose:

* age is entangled with glasses and with hats (old people wear them more often), so a slider that
  preserves nothing drags them along;
* eye size is continuous, and the captions say little about it;
* one face in five is malformed and one hand in three is bad; only some of them are captioned as
  such, so plain prompts go wrong at a rate that can be measured.

Run it to look at the world:  python -m miniature.world
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SIZE = 128  # pixels, the side of a picture
SUPERSAMPLE = 4  # drawn this much larger, then averaged: clean anti-aliased edges

# Name -> (lowest, highest): the range of each continuous or yes/no attribute, in its own unit.
RANGES = {
    "sex": (0, 1),
    "age": (0, 1),
    "smile": (-1, 1),
    "eye_size": (0.6, 1.6),
    "skin": (0, 1),
    "hair_length": (0, 1),
    "glasses": (0, 1),
    "hat": (0, 1),
    "malformed": (0, 1),
}
HAIR = {
    "black": (32, 28, 34),
    "brown": (112, 70, 36),
    "blond": (232, 200, 96),
    "red": (190, 72, 28),
    "grey": (168, 168, 172),
}
BACKGROUNDS = {
    "blue": (112, 160, 220),
    "green": (128, 190, 128),
    "yellow": (238, 222, 130),
    "pink": (236, 176, 196),
    "white": (240, 240, 236),
    "purple": (160, 130, 190),
}
SKIN = [(250, 220, 196), (214, 164, 122), (134, 88, 60)]  # light, medium, dark: skin = 0, 0.5, 1
SKIN_WORDS = ["light", "medium", "dark"]
IRISES = [(60, 100, 160), (70, 120, 70), (96, 60, 30)]
HATS = [(150, 44, 52), (40, 62, 130), (46, 110, 70), (196, 150, 60), (92, 52, 110), (70, 62, 60)]


# --------------------------------------------------------------------------------------- attributes


def sample(rng, **fixed) -> dict:
    """Draw the attributes of one picture. Keywords pin attributes: sample(rng, kind="face",
    age=0.9)."""
    kind = fixed.get("kind") or ("hand" if rng.random() < 0.25 else "face")
    a = {
        "kind": kind,
        "skin": float(rng.choice([0.0, 0.5, 1.0]) + rng.uniform(-0.12, 0.12)),
        "background": str(rng.choice(list(BACKGROUNDS))),
        "shirt": tuple(int(v) for v in rng.integers(40, 220, 3)),
        "shift": tuple(rng.uniform(-2.5, 2.5, 2).tolist()),
    }
    a["skin"] = min(max(a["skin"], 0.0), 1.0)
    a.update(fixed)
    (_sample_face if kind == "face" else _sample_hand)(a, rng)
    a.update(fixed)
    return a


def _sample_face(a, rng):
    age = a.get("age", float(rng.uniform(0, 1)))
    a.update(
        age=age,
        sex=int(rng.random() < 0.5),  # 0 woman, 1 man
        smile=float(rng.uniform(-1, 1)),
        eye_size=float(rng.uniform(0.6, 1.6)),
        hair=str(rng.choice(list(HAIR))),
        hair_length=int(rng.random() < 0.5),  # 0 short, 1 long
        glasses=int(rng.random() < 0.1 + 0.6 * age),  # entangled with age on purpose
        hat=int(rng.random() < 0.1 + 0.5 * age),  # and so is this
        hat_colour=HATS[rng.integers(len(HATS))],
        iris=int(rng.integers(3)),
        width=float(rng.uniform(-1.5, 1.5)),  # of the head, pixels: a nuisance nobody names
        malformed=a.get("malformed", int(rng.random() < 0.2)),
    )
    # What is wrong with a malformed face: [dx, dy] of each eye, the two eyes' own factors, the
    # mouth's angle.
    a.update(eye_shift=((0.0, 0.0), (0.0, 0.0)), eye_factor=(1.0, 1.0), mouth_angle=0.0)
    if a["malformed"]:
        faults = rng.random(3) < 0.45
        faults[rng.integers(3)] = True
        side = int(rng.integers(2))
        if faults[0]:
            shift = (float(rng.uniform(-3, 3)), float(rng.choice([-1, 1]) * rng.uniform(8, 14)))
            a["eye_shift"] = (shift, (0.0, 0.0)) if side else ((0.0, 0.0), shift)
        if faults[1]:
            a["eye_factor"] = (1.45, 0.55) if side else (0.55, 1.45)
        if faults[2]:
            a["mouth_angle"] = float(rng.choice([-1, 1]) * rng.uniform(20, 34))


def _sample_hand(a, rng):
    bad = a.get("malformed", int(rng.random() < 0.35))
    a.update(
        malformed=bad,
        fingers=5,
        misplaced=0,
        mirrored=int(rng.random() < 0.5),
        angle=float(rng.uniform(-10, 10)),
        spread=float(rng.uniform(0.95, 1.15)),
        lengths=rng.uniform(0.94, 1.06, 7).tolist(),
    )
    if bad:  # a wrong number of fingers (two in three), or one that grows where none should
        if rng.random() < 0.67:
            a["fingers"] = int(rng.choice([3, 4, 6, 7]))
        else:
            a["misplaced"] = 1
    a["grows_at"] = float(rng.choice([-1, 1]) * rng.uniform(105, 140))  # degrees from straight up


# ----------------------------------------------------------------------------------------- captions


# What captions say of pictures that are malformed, and of those that are not.
BAD_FACE = [
    "distorted",
    "deformed",
    "poorly drawn",
    "distorted, deformed",
    "deformed face",
    "distorted face",
]
GOOD_FACE = [
    "well made",
    "realistic",
    "realistic, 8k",
    "detailed face",
    "beautiful face",
    "well drawn",
]
BAD_HAND = [
    "poorly drawn hand, misplaced fingers",
    "distorted hands",
    "poorly drawn hands",
    "misplaced fingers",
    "deformed",
    "poorly drawn hands, distorted hands, misplaced fingers",
    "distorted, deformed",
]
GOOD_HAND = [
    "realistic hands",
    "realistic hand, five fingers",
    "8k hyperrealistic hands",
    "well drawn",
    "well made",
    "realistic",
    "realistic hands, five fingers, 8k hyperrealistic hands",
]


def _age_word(age, rng):
    oldest = str(rng.choice(["very old", "old", "elderly", "very old"]))
    if age < 0.2:
        return "young" if oldest == "elderly" else "very young"
    if age < 0.4:
        return "young"
    if age < 0.6:
        return "middle-aged"
    if age < 0.8:
        return "old"
    return oldest


def _smile_words(smile, rng):
    if smile > 0.6:
        return str(rng.choice(["with a big smile", "smiling", "very happy", "with a wide smile"]))
    if smile > 0.2:
        return str(rng.choice(["smiling", "with a smile", "happy"]))
    if smile > -0.2:
        return str(rng.choice(["with a neutral expression", "not smiling"]))
    if smile > -0.6:
        return str(rng.choice(["frowning", "with a frown", "sad"]))
    return str(rng.choice(["with a big frown", "frowning", "very sad", "very unhappy"]))


def caption(a: dict, rng, mention: float = 0.42, worn: float = 1.6) -> str:
    """Describe `a` in ordinary words; every clause is dropped at random so that short prompts work
    too.

    `mention` is the chance of each clause, `worn` how many times it is that for glasses and for
    hats. One caption in ten says nothing but what it is. Whatever `a` is, as many numbers are drawn
    from `rng`: with the same seed, attributes that differ in one thing get captions that differ in
    its words alone (and in their order).
    """
    if rng.random() < 0.1:
        mention = 0.0
    third = "a portrait of " if a["kind"] == "face" else "a photo of "
    lead = str(rng.choice(["a photo of ", "a picture of ", third, ""]))
    says = lambda share=1.0: rng.random() < mention * share
    clauses = []
    if says():
        shade = SKIN_WORDS[int(round(2 * a["skin"]))]
        clauses.append(str(rng.choice([f"with {shade} skin", f"{shade} skin"])))
    if says():
        background = f"{a['background']} background"
        clauses.append(str(rng.choice([background, f"on a {background}"])))
    if a["kind"] == "hand":
        head = _hand_head(a, rng, says, clauses)
    else:
        head = _face_head(a, rng, says, clauses, worn)
    rng.shuffle(clauses)
    text = lead + head
    can_follow = ("with ", "without ", "wearing ", "on ")  # without a comma
    for i, clause in enumerate(clauses):
        natural = i == 0 and clause.startswith(can_follow) and rng.random() < 0.6
        text += (" " if natural else ", ") + clause
    return text


def _face_head(a, rng, says, clauses, worn):
    men, women = ["man", "man", "male person"], ["woman", "woman", "female person"]
    noun = str(rng.choice(men if a["sex"] else women))
    if not says(1.4):
        noun = "person"
    adjective = ""
    if says(1.2):
        word = _age_word(a["age"], rng)
        if rng.random() < 0.5:
            adjective = word + " "
        else:
            clauses.append(word)
    if says(1.6):
        clauses.append(_smile_words(a["smile"], rng))
    said, with_ = says(1.8), str(rng.choice(["with ", "with ", ""]))
    if said and (a["eye_size"] > 1.28 or a["eye_size"] < 0.84):  # only extremes are ever named
        clauses.append(with_ + ("big eyes" if a["eye_size"] > 1 else "small eyes"))
    length, colour = ("long" if a["hair_length"] else "short"), a["hair"]
    named = [w for w in (length if says() else "", colour if says() else "") if w]
    if named:
        clauses.append("with " + " ".join(named) + " hair")
    if says(worn):
        wears = str(rng.choice(["with glasses", "wearing glasses"]))
        clauses.append(wears if a["glasses"] else "without glasses")
    if says(worn):
        wears = str(rng.choice(["with a hat", "wearing a hat"]))
        clauses.append(wears if a["hat"] else "without a hat")
    _quality(a, rng, clauses, BAD_FACE, GOOD_FACE)
    article = "an " if adjective[:1] in ("o", "e") else "a "
    return article + adjective + noun


def _hand_head(a, rng, says, clauses):
    number = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}[a["fingers"]]
    said, half, with_ = says(), rng.random() < 0.5, str(rng.choice(["with ", ""]))
    if said and not a["misplaced"] and (a["fingers"] == 5 or half):
        clauses.append(f"{with_}{number} fingers")
    _quality(a, rng, clauses, BAD_HAND, GOOD_HAND)
    return str(rng.choice(["a hand", "a hand", "an open hand", "a person's hand", "hands"]))


def _quality(a, rng, clauses, bad, good):
    """Some bad pictures are called so, some good ones praised; the others go unsaid."""
    words = str(rng.choice(bad if a["malformed"] else good))
    if rng.random() < (0.5 if a["malformed"] else 0.3):
        clauses.append(words)


# ------------------------------------------------------------------------------------------ drawing


def mix(a, b, share):
    """The colour `share` of the way from a to b."""
    return tuple(int(round(x + (y - x) * share)) for x, y in zip(a, b))


def skin_colour(skin):
    low = min(int(skin * 2), 1)
    return mix(SKIN[low], SKIN[low + 1], skin * 2 - low)


class _Pen:
    """PIL's ImageDraw in picture pixels on a supersampled canvas."""

    def __init__(self, background):
        self.image = Image.new("RGB", (SIZE * SUPERSAMPLE,) * 2, background)
        self.on = ImageDraw.Draw(self.image)

    def polygon(self, points, fill):
        self.on.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=fill)

    def ellipse(self, x, y, rx, ry, fill):
        self.on.ellipse([v * SUPERSAMPLE for v in (x - rx, y - ry, x + rx, y + ry)], fill=fill)

    def ring(self, x, y, rx, ry, fill, width):
        box = [v * SUPERSAMPLE for v in (x - rx, y - ry, x + rx, y + ry)]
        self.on.ellipse(box, outline=fill, width=round(width * SUPERSAMPLE))

    def line(self, points, fill, width):
        points = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]
        self.on.line(points, fill=fill, width=max(1, round(width * SUPERSAMPLE)), joint="curve")
        r = width * SUPERSAMPLE / 2
        for x, y in (points[0], points[-1]):
            self.on.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    def box(self, x0, y0, x1, y1, fill, radius=0):
        corners = [v * SUPERSAMPLE for v in (x0, y0, x1, y1)]
        self.on.rounded_rectangle(corners, radius * SUPERSAMPLE, fill=fill)

    def finish(self):
        return self.image.reduce(SUPERSAMPLE)


def draw(a: dict) -> Image.Image:
    """Draw attributes `a` (from `sample`) as a SIZE x SIZE RGB picture."""
    pen = _Pen(BACKGROUNDS[a["background"]])
    (_draw_face if a["kind"] == "face" else _draw_hand)(pen, a)
    return pen.finish()


def _arc(x, y, w, h, n=13):
    """A parabola through (x-w, y), (x, y+h), (x+w, y)."""
    return [(x + w * s, y + h * (1 - s * s)) for s in np.linspace(-1, 1, n)]


def _draw_face(pen, a):
    cx, cy = 64 + a["shift"][0], 64 + a["shift"][1]
    man, age = a["sex"], a["age"]
    skin = skin_colour(a["skin"])
    crease = mix(skin, (24, 8, 6), 0.26 + 0.52 * age)  # wrinkles: darker with age
    outline = mix(skin, (40, 20, 16), 0.45)
    hair = HAIR[a["hair"]]
    w = 30 + 2.5 * man + a["width"]  # half the head's width
    at = lambda x, y: (cx + x, cy + y)

    # Behind the face: long hair, the neck, the shirt.
    if a["hair_length"]:
        pen.box(*at(-w - 7, -32), *at(w + 7, 46), hair, 18)
    pen.box(*at(-11, 28), *at(11, 56), mix(skin, (40, 20, 16), 0.2), 4)
    pen.ellipse(*at(0, 70), 46, 23, a["shirt"])

    # Head: a superellipse, squarer for men, heavier in the jaw with age.
    def head(grow):
        n = 2.5 if man else 2.05
        points = []
        for angle in np.linspace(0, 2 * math.pi, 72, endpoint=False):
            c, s = math.cos(angle), math.sin(angle)
            jaw = 1 + 0.10 * age * max(0.0, s)
            x = (w + grow) * jaw * math.copysign(abs(c) ** (2 / n), c)
            y = 4 + (38 + grow) * math.copysign(abs(s) ** (2 / n), s)
            points.append(at(x, y))
        return points

    pen.ellipse(*at(0, -12), w + 5, 31, hair)
    if not a["hair_length"]:
        pen.box(*at(-w - 3, -16), *at(w + 3, 4), hair, 5)
    pen.polygon(head(1.0), outline)
    pen.polygon(head(0.0), skin)
    if man:  # stubble
        inside = Image.new("L", pen.image.size, 0)
        points = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in head(0.0)]
        ImageDraw.Draw(inside).polygon(points, fill=255)
        shade = Image.new("L", pen.image.size, 0)
        on = ImageDraw.Draw(shade)
        on.rectangle([v * SUPERSAMPLE for v in (0, cy + 21, SIZE, SIZE)], fill=255)
        on.ellipse([v * SUPERSAMPLE for v in (cx - 20, cy + 8, cx + 20, cy + 34)], fill=0)
        pen.image.paste(mix(skin, (60, 60, 70), 0.42), mask=ImageChops.darker(inside, shade))
    elif age < 0.99:  # blush
        for side in (-1, 1):
            pen.ellipse(*at(side * 19, 20), 4.5, 3.2, mix(skin, (230, 90, 100), 0.40))

    # Fringe, then the hat on top of it.
    fringe = [at(x, -28 - 6 * (1 - (x / w) ** 2)) for x in np.linspace(-w, w, 9)]
    angles = np.linspace(-0.25, -math.pi + 0.25, 24)
    crown = [at((w + 4) * math.cos(t), -12 + 31 * math.sin(t)) for t in angles]
    pen.polygon([at(-w - 1, -20), *fringe, at(w + 1, -20), *crown], hair)
    if a["hat"]:
        dark = mix(a["hat_colour"], (0, 0, 0), 0.35)
        pen.box(*at(-w + 3, -60), *at(w - 3, -30), a["hat_colour"], 8)
        pen.box(*at(-w + 3, -38), *at(w - 3, -31), dark, 0)
        pen.box(*at(-w - 11, -33), *at(w + 11, -27), a["hat_colour"], 3)

    # Wrinkles: forehead, under the eyes, beside the nose, beside the mouth.
    if age > 0.3:
        width = 1.1 + 1.5 * (age - 0.3)
        reach = (age - 0.3) / 0.7
        for y, half in ((-23, 9 + 8 * reach), (-18.5, 6 + 9 * reach)):
            pen.line(_arc(*at(0, y), half, -1.6), crease, width)
        for side in (-1, 1):
            along = np.linspace(-1, 1, 9)
            bag = [at(side * (15 + 7 * s), 12.5 + 2.2 * (1 - s * s)) for s in along]
            pen.line(bag, crease, width)
            fold = [at(side * 7, 15), at(side * (10 + 2 * reach), 15 + 5 * reach)]
            fold.append(at(side * (13 + 3 * reach), 17 + 8 * reach))
            pen.line(fold, crease, width)
            if age > 0.55:
                pen.line([at(side * 25, 27), at(side * 23, 33), at(side * 19, 37)], crease, width)

    # Eyes. Brows keep their place whatever the eyes' size, so that only the eyes change with it.
    for i, side in enumerate((-1, 1)):
        x, y = at(side * 14 + a["eye_shift"][i][0], -2 + a["eye_shift"][i][1])
        s = a["eye_size"] * a["eye_factor"][i]
        pen.ellipse(x, y, 6.4 * s + 1.0, 5.0 * s + 1.0, (30, 24, 28))
        pen.ellipse(x, y, 6.4 * s, 5.0 * s, (255, 255, 255))
        pen.ellipse(x, y, 3.4 * s, 3.4 * s, IRISES[a["iris"]])
        pen.ellipse(x, y, 1.8 * s, 1.8 * s, (16, 14, 18))
        if not man:  # lashes
            inner = (x + side * 5.6 * s, y - 2.6 * s)
            outer = (x + side * (5.6 * s + 3.2), y - 2.6 * s - 2.6)
            pen.line([inner, outer], (30, 24, 28), 1.4)
        brow = mix(mix(hair, (30, 24, 28), 0.5), (225, 225, 225), max(0.0, age - 0.35) * 1.3)
        pen.line(_arc(*at(side * 14, -13), 8, -2.2), brow, 3.6 if man else 1.9)
    if a["glasses"]:
        for side in (-1, 1):
            pen.ring(*at(side * 14.2, -2), 13.0, 11.2, (28, 28, 40), 2.4)
            pen.line([at(side * 27, -4), at(side * (w + 1), -6)], (28, 28, 40), 2.4)
        pen.line([at(-2, -4), at(2, -4)], (28, 28, 40), 2.4)

    # Nose and mouth. A smile curves the mouth, then opens it.
    pen.line([at(-1, 4), at(-4, 13), at(3, 14)], outline, 1.6)
    smile, half = a["smile"], 15.0
    lips = mix(skin, (60, 16, 20), 0.6) if man else (196, 44, 60)
    opening = 10 * max(0.0, smile - 0.15)
    t = math.radians(a["mouth_angle"])

    def turn(x, y):
        return at(x * math.cos(t) - y * math.sin(t), 26 + x * math.sin(t) + y * math.cos(t))

    curve = lambda s: 8.0 * smile * (0.5 - s * s)
    upper = [turn(half * s, curve(s)) for s in np.linspace(-1, 1, 17)]
    lower = [turn(half * s, curve(s) + opening * (1 - s * s)) for s in np.linspace(1, -1, 17)]
    if opening:
        pen.polygon(upper + lower, (250, 250, 250))
        pen.line(lower, lips, 2.2)
    pen.line(upper, lips, 2.8)


def _draw_hand(pen, a):
    skin = skin_colour(a["skin"])
    edge = mix(skin, (40, 20, 16), 0.5)
    # Hand coordinates: origin at the palm's centre, y up, thumb on the left; turned, mirrored,
    # shifted to the picture.
    t = math.radians(a["angle"])
    sign = -1 if a["mirrored"] else 1

    def at(x, y):
        x, y = x * math.cos(t) - y * math.sin(t), x * math.sin(t) + y * math.cos(t)
        return 64 + a["shift"][0] + sign * x, 84 + a["shift"][1] - y

    pen.line([at(0, -10), at(0, -60)], edge, 27)
    pen.line([at(0, -10), at(0, -60)], skin, 24.6)
    pen.line([at(0, -42), at(0, -62)], a["shirt"], 33)

    # (base x, base y, degrees from straight up, length, width): the thumb, then the fan of fingers.
    n = a["fingers"] - (1 if a["misplaced"] else 0) - 1
    fingers = [(-15, -6, -58 * a["spread"], 31, 10.0)]
    shape = [0.86, 1.0, 0.94, 0.76]
    wide = 10.0 if n <= 4 else 8.2
    for i in range(n):
        share = i / (n - 1)  # 0 at the index finger, 1 at the little one
        x, y = -15 + 30 * share, 15 - 3 * abs(share - 0.4)
        length = 40 * float(np.interp(share * 3, range(4), shape))
        fingers.append((x, y, (-19 + 43 * share) * a["spread"], length, wide))
    if a["misplaced"]:
        angle = math.radians(a["grows_at"])
        fingers.append((18 * math.sin(angle), 18 * math.cos(angle), a["grows_at"], 30, 9.0))

    lines = []
    for (x, y, degrees, length, _), factor in zip(fingers, a["lengths"]):
        angle = math.radians(degrees)
        tip = (x + factor * length * math.sin(angle), y + factor * length * math.cos(angle))
        lines.append([at(x, y), at(*tip)])
    palm = [(-13, 12), (13, 12), (14, -12), (-13, -12)]
    outline = [at(*p) for p in palm + palm[:1]]
    for line, finger in zip(lines, fingers):
        pen.line(line, edge, finger[4] + 2.4)
    pen.line(outline, edge, 18.4)
    for line, finger in zip(lines, fingers):
        pen.line(line, skin, finger[4])
        (x0, y0), (x1, y1) = line
        pen.ellipse(x1, y1, 2.4, 2.4, mix(skin, (255, 230, 225), 0.6))  # a nail
        dx, dy = x1 - x0, y1 - y0
        knuckle = [
            (x0 + 0.45 * dx - 0.06 * dy, y0 + 0.45 * dy + 0.06 * dx),
            (x0 + 0.45 * dx + 0.06 * dy, y0 + 0.45 * dy - 0.06 * dx),
        ]
        pen.line(knuckle, edge, 1.0)
    pen.line(outline, skin, 16)
    pen.polygon(outline, skin)
    crease = mix(skin, (40, 20, 16), 0.28)
    pen.line([at(-14, 4), at(-4, 7), at(10, 6)], crease, 1.4)
    pen.line([at(-12, 1), at(0, -1), at(12, -4)], crease, 1.4)


def grid(pictures: list[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures of one size as one, `columns` in a row."""
    w, h = pictures[0].size
    out = Image.new("RGB", (columns * w, math.ceil(len(pictures) / columns) * h))
    for i, picture in enumerate(pictures):
        out.paste(picture, (i % columns * w, i // columns * h))
    return out


if __name__ == "__main__":
    rng, pictures = np.random.default_rng(0), []
    for _ in range(64):
        attributes = sample(rng)
        pictures.append(draw(attributes))
        print(caption(attributes, rng))
    Path("out").mkdir(exist_ok=True)
    grid(pictures).save("out/world.png")
    print("out/world.png: these 64 pictures")
