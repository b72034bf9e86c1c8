"""A blind preference study, as the paper ran with paid raters: a page that anyone can open, and
the sum of the votes.

    python -m experiments.preference page --a out/experiments/repair_seed0/faces/without \\
        --b out/experiments/repair_seed0/faces/with --out faces.html
    python -m experiments.preference count votes.csv ...

The page is one file and needs no network: each pair of pictures of the same name side by side,
order and sides drawn anew for every rater, keys 1 and 2 (0: no preference), Backspace takes the
last vote back, the votes as a CSV to download. Its template is preference.html."""

import csv
import random
from math import comb
from pathlib import Path

import numpy as np

from extras import metrics
from support import cli, images
from support.options import default_help
from support.page import data_url, fill_template

TEMPLATE = Path(__file__).with_name("preference.html").read_text()
COLUMNS = {"rater", "pair", "left", "side", "choice"}


def page(a: Path, b: Path, question: str, most: int, seed: int = 0) -> str:
    """The page for the pictures that a and b have by the same name; `most` of them, drawn at
    random."""
    files = images.match_by_name([a, b])
    files = sorted(random.Random(seed).sample(files, min(most, len(files))))
    # Lossless, and without a name: nothing in it tells which picture it is.
    url = lambda path: data_url(images.read_image(path), lossless=True)
    pairs = [{"name": one.stem, "a": url(one), "b": url(other)} for one, other in files]
    return fill_template(TEMPLATE, question, pairs)


def read_votes(files: list[Path]) -> list[dict]:
    """The last vote of each rater on each pair: a file that was saved twice counts once.
    ValueError for what is no such CSV."""
    last = {}
    for file in files:
        with open(file, newline="", encoding="utf-8") as f:
            table = csv.DictReader(f)
            if set(table.fieldnames or []) != COLUMNS:
                columns = f"its columns are {table.fieldnames}"
                raise ValueError(f"{file}: not a CSV of votes from the page: {columns}")
            last |= {(vote["rater"], vote["pair"]): vote for vote in table}
    for vote in last.values():
        if vote["choice"] not in ("a", "b", "") or vote["side"] not in ("0", "1", "2"):
            known = "only a, b and nothing are known"
            raise ValueError(
                f"{', '.join(map(str, files))}: a vote for {vote['choice']!r}: {known}"
            )
    return list(last.values())


def count(files: list[Path]) -> dict:
    """{"a", "b", "neither": votes, "raters", "share": of b among a and b, the mean over the
    pairs and its bootstrap interval, "p": two-sided sign test of the pairs' majorities (votes on
    one pair are not independent of one another), "left": share of votes for the left side, which is
    near a half where raters look at the pictures}. ValueError for a file that is no CSV of
    votes."""
    votes = read_votes(files)
    n = {choice: sum(vote["choice"] == choice for vote in votes) for choice in ("a", "b", "")}
    for_b: dict[str, list[bool]] = {}  # pair -> its decided votes
    for vote in votes:
        if vote["choice"]:
            for_b.setdefault(vote["pair"], []).append(vote["choice"] == "b")
    if not for_b:
        raise ValueError(f"{', '.join(map(str, files))}: no vote for either side")
    shares = np.array([np.mean(of_pair) for of_pair in for_b.values()])
    won, lost = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    tail = sum(comb(won + lost, k) for k in range(max(won, lost), won + lost + 1))
    return {
        "a": n["a"],
        "b": n["b"],
        "neither": n[""],
        "raters": len({vote["rater"] for vote in votes}),
        "share": metrics.interval(shares),
        "p": min(1.0, 2 * tail / 2 ** (won + lost)),
        "left": sum(vote["side"] == "1" for vote in votes) / (n["a"] + n["b"]),
    }


def parse_args():
    p = cli.plain_parser(__doc__)
    commands = p.add_subparsers(dest="what", required=True)
    make = commands.add_parser("page", help="write the page", allow_abbrev=False)
    folder = dict(required=True, type=Path, metavar="DIR")
    make.add_argument("--a", help="pictures without the slider", **folder)
    make.add_argument("--b", help="the same with it, by the same names", **folder)
    question = dict(default="Which picture looks better made?", help="default: %(default)s")
    make.add_argument("--question", **question)
    most = default_help("pairs at most, drawn at random")
    make.add_argument("--most", type=int, default=40, help=most)
    make.add_argument("--out", default="preference.html", help=default_help("file to write"))
    add = commands.add_parser("count", help="add up votes", allow_abbrev=False)
    add.add_argument("votes", nargs="+", type=Path, metavar="CSV", help="files saved from the page")
    return p.parse_args()


def main():
    args = parse_args()
    if args.what == "page":
        text = page(args.a, args.b, args.question, args.most)
        cli.write_text(args.out, text)
        pairs = text.count('"name"')
        return print(f"{args.out}: {pairs} pairs, {len(text) / 1e6:.1f} MB")
    found = count(args.votes)
    for_each = f"{found['b']} votes for b (with), {found['a']} for a (without)"
    print(f"{found['raters']} raters: {for_each}, {found['neither']} for neither")
    mean, low, high = (f"{found['share'][key]:.0%}" for key in ("mean", "low", "high"))
    test = f"sign test p = {found['p']:.2g}"
    print(f"b is preferred in {mean} [{low}, {high}] of the decided; {test}")
    print(f"{found['left']:.0%} of them were for the left side")


if __name__ == "__main__":
    cli.run(main)
