"""Do the miniature's samples follow their prompts?  python -m miniature.follow

For prompts that name one attribute: the share of pictures that the measuring stick puts on the
right side of that attribute's middle, or gives the right word. Then how often plain prompts go
wrong, as a part of the training pictures does."""

import numpy as np

import slider
from miniature import world
from miniature.measure import measure, wrong
from support import cli

# Prompt -> the attribute that it names, and its value: 1 above the middle, 0 below it, or the word.
PROMPTS = {
    "a photo of a man": ("sex", 1),
    "a photo of a woman": ("sex", 0),
    "a photo of a person with glasses": ("glasses", 1),
    "a photo of a person without glasses": ("glasses", 0),
    "a photo of a person with a hat": ("hat", 1),
    "a photo of a person without a hat": ("hat", 0),
    "a photo of a person, very old": ("age", 1),
    "a photo of a person, very young": ("age", 0),
    "a photo of a person, smiling": ("smile", 1),
    "a photo of a person, frowning": ("smile", 0),
    "a photo of a person with big eyes": ("eye_size", 1),
    "a photo of a person with small eyes": ("eye_size", 0),
    "a photo of a person with dark skin": ("skin", 1),
    "a photo of a person with light skin": ("skin", 0),
    "a photo of a person with long hair": ("hair_length", 1),
    "a photo of a person with short hair": ("hair_length", 0),
    "a photo of a person with red hair": ("hair", "red"),
    "a photo of a person with black hair": ("hair", "black"),
    "a photo of a person, blue background": ("background", "blue"),
    "a photo of a person on a pink background": ("background", "pink"),
    "a photo of a hand": ("kind", "hand"),
    "a photo of a person": ("kind", "face"),
}


def follows(model, n: int, steps: int = 30) -> dict[str, float]:
    """{prompt: share of n pictures that follow it}, at the default guidance."""
    shares = {}
    for prompt, (name, want) in PROMPTS.items():
        read = measure(slider.generate(model, prompt, range(100, 100 + n), steps=steps))[name]
        middle = np.mean(world.RANGES.get(name, (0, 0)))
        right = read == want if isinstance(want, str) else (read > middle) == bool(want)
        shares[prompt] = float(np.mean(right))
    return shares


def main():
    p = cli.model_parser(__doc__)
    pictures = "for each prompt (default: %(default)s)"
    p.add_argument("--pictures", type=int, default=32, help=pictures)
    args = p.parse_args()
    model = cli.load_model(args)
    shares = follows(model, args.pictures)
    for prompt, share in sorted(shares.items(), key=lambda item: item[1]):
        print(f"{share:6.1%}  {prompt}")
    what = f"mean of the {len(shares)} prompts, {args.pictures} pictures each"
    print(f"{np.mean(list(shares.values())):6.1%}  {what}")
    seeds = range(500, 500 + 4 * args.pictures)
    face = measure(slider.generate(model, "a photo of a person", seeds))
    hand = measure(slider.generate(model, "a photo of a hand", seeds))
    print(f"{np.mean(wrong(face, 'face')):6.1%}  of faces from the plain prompt are malformed")
    rate = np.mean(wrong(hand, "hand"))
    print(f"{rate:6.1%}  of hands have not five fingers, or one that grows elsewhere")


if __name__ == "__main__":
    cli.run(main)
