"""A blind preference study, as the paper ran with paid raters: a page that anyone can open, and the sum of the votes.

    python -m experiments.preference page --a out/experiments/repair/faces/without --b out/experiments/repair/faces/with --out faces.html
    python -m experiments.preference count votes.csv ...

The page is one file and needs no network: each pair of pictures of the same name side by side, order and sides drawn anew
for every rater, keys 1 and 2 (0: no preference), Backspace takes the last vote back, the votes as a CSV to download.
"""

import csv
import random
from math import comb
from pathlib import Path

import page as drag

from extras import metrics
from support import cli, images

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which is better?</title>
<style>
  :root { color-scheme: light dark; font: 18px/1.5 system-ui, sans-serif }
  body { max-width: 60rem; margin: 0 auto; padding: 1rem; text-align: center }
  .pair { display: flex; gap: 1rem; justify-content: center }
  .pair button { flex: 1; max-width: 28rem; padding: .5rem; border: 2px solid #8888; border-radius: .5rem; background: none; color: inherit; font: inherit; cursor: pointer }
  .pair button:hover, .pair button:focus-visible { border-color: #2970d6; outline: 3px solid #2970d6 }
  .pair img { width: 100%; display: block; image-rendering: auto }
  progress { width: 100% }
</style>
<h1>TITLE</h1>
<p id="progress-text" aria-live="polite"></p>
<progress id="progress" value="0" max="1" aria-label="pairs judged"></progress>
<div id="study">
  <p>Click the better picture, or press <kbd>1</kbd> for the left, <kbd>2</kbd> for the right, <kbd>0</kbd> if you cannot tell, <kbd>Backspace</kbd> to take the last vote back.</p>
  <div class="pair">
    <button id="left"><img alt="left picture"><span>1</span></button>
    <button id="right"><img alt="right picture"><span>2</span></button>
  </div>
  <p><button id="neither">0: cannot tell</button> <button id="back">back</button></p>
</div>
<div id="end" hidden><p>Thank you. Nothing has been sent: save your votes and hand the file to whoever asked you.</p></div>
<p><a id="download" download="votes.csv" href="#">Save the votes so far (CSV)</a></p>
<script>
const pairs = DATA;  // [{name, a, b}]: pictures as data addresses
const shuffle = list => { for (let i = list.length - 1; i > 0; i--) { const j = Math.floor(Math.random() * (i + 1)); [list[i], list[j]] = [list[j], list[i]] } return list };
const order = shuffle(pairs.map((pair, i) => ({pair, flipped: Math.random() < .5})));
const rater = Math.random().toString(36).slice(2, 10), votes = [];
const $ = id => document.getElementById(id);

function show() {
  const done = votes.length, over = done === order.length;
  $("progress-text").textContent = `${done} of ${order.length}`;
  $("progress").value = done / order.length;
  $("study").hidden = over; $("end").hidden = !over;
  $("back").disabled = !done;
  if (over) return;
  const {pair, flipped} = order[done];
  $("left").firstElementChild.src = flipped ? pair.b : pair.a;
  $("right").firstElementChild.src = flipped ? pair.a : pair.b;
}
function vote(side) {  // 1: left, 2: right, 0: neither
  if (votes.length === order.length) return;
  const {pair, flipped} = order[votes.length];
  votes.push({rater, pair: pair.name, left: flipped ? "b" : "a", side, choice: side === 0 ? "" : (side === 1) === flipped ? "b" : "a"});
  save(); show();
}
function back() { votes.pop(); save(); show() }
function save() {
  const quoted = value => `"${String(value).replaceAll('"', '""')}"`;
  const rows = [["rater", "pair", "left", "side", "choice"], ...votes.map(v => [v.rater, v.pair, v.left, v.side, v.choice])];
  $("download").href = "data:text/csv;charset=utf-8," + encodeURIComponent(rows.map(r => r.map(quoted).join(",")).join("\\n") + "\\n");
}
$("left").onclick = () => vote(1); $("right").onclick = () => vote(2); $("neither").onclick = () => vote(0); $("back").onclick = back;
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ("012".includes(event.key) && event.key) vote(Number(event.key));
  else if (event.key === "Backspace") back(); else return;
  event.preventDefault();
});
save(); show();
</script>
</html>
"""


def page(a: Path, b: Path, question: str, most: int, seed: int = 0) -> str:
    """The page for the pictures that a and b have by the same name; `most` of them, drawn at random."""
    files = images.match_by_name([a, b])
    files = sorted(random.Random(seed).sample(files, min(most, len(files))))
    address = lambda path: drag.address(
        images.read_image(path), lossless=True
    )  # nothing in it tells which picture it is
    return drag.filled(
        PAGE,
        question,
        [{"name": one.stem, "a": address(one), "b": address(other)} for one, other in files],
    )


def count(files: list[Path]) -> dict:
    """{"a", "b", "neither": votes, "raters", "share": Wilson interval of b among a and b, "p": two-sided sign test, "left":
    share of votes for the left side, which is near a half where raters look at the pictures}. ValueError for a file that is no such CSV."""
    rows = []
    for file in files:
        with open(file, newline="", encoding="utf-8") as f:
            table = csv.DictReader(f)
            if set(table.fieldnames or []) != {"rater", "pair", "left", "side", "choice"}:
                raise ValueError(
                    f"{file}: not a CSV of votes from the page: its columns are {table.fieldnames}"
                )
            rows += list(table)
    last = {
        (r["rater"], r["pair"]): r for r in rows
    }.values()  # a file that was saved twice counts once
    if bad := [
        r for r in last if r["choice"] not in ("a", "b", "") or r["side"] not in ("0", "1", "2")
    ]:
        raise ValueError(
            f"{files[0]}: a vote for {bad[0]['choice']!r}: only a, b and nothing are known"
        )
    n = {choice: sum(r["choice"] == choice for r in last) for choice in ("a", "b", "")}
    decided = n["a"] + n["b"]
    if not decided:
        raise ValueError(f"{files[0]}: holds no vote for either side")
    tail = sum(comb(decided, k) for k in range(max(n["a"], n["b"]), decided + 1)) / 2**decided
    return {
        "a": n["a"],
        "b": n["b"],
        "neither": n[""],
        "raters": len({r["rater"] for r in last}),
        "share": metrics.wilson(n["b"], decided),
        "p": min(1.0, 2 * tail),
        "left": sum(r["side"] == "1" for r in last) / decided,
    }


def main():
    p = cli.plain_parser(__doc__)
    what = p.add_subparsers(dest="what", required=True)
    make = what.add_parser("page", help="write the page", allow_abbrev=False)
    make.add_argument(
        "--a", required=True, type=Path, metavar="DIR", help="pictures without the slider"
    )
    make.add_argument(
        "--b", required=True, type=Path, metavar="DIR", help="the same with it, by the same names"
    )
    make.add_argument(
        "--question", default="Which picture looks better made?", help="default: %(default)s"
    )
    make.add_argument(
        "--most", type=int, default=40, help="pairs at most, drawn at random (default: %(default)s)"
    )
    make.add_argument(
        "--out", default="preference.html", help="file to write (default: %(default)s)"
    )
    add = what.add_parser("count", help="add up votes", allow_abbrev=False)
    add.add_argument("votes", nargs="+", type=Path, metavar="CSV", help="files saved from the page")
    args = p.parse_args()
    if args.what == "page":
        text = page(args.a, args.b, args.question, args.most)
        cli.write_text(args.out, text)
        return print(
            f"{args.out}: {text.count(chr(34) + 'name' + chr(34))} pairs, {len(text) / 1e6:.1f} MB"
        )
    found = count(args.votes)
    print(
        f"{found['raters']} raters: {found['b']} votes for b (with), {found['a']} for a (without), {found['neither']} for neither"
    )
    print(
        f"b is preferred in {found['share']['mean']:.0%} [{found['share']['low']:.0%}, {found['share']['high']:.0%}] of the decided; sign test p = {found['p']:.2g}"
    )
    print(f"{found['left']:.0%} of them were for the left side")


if __name__ == "__main__":
    cli.run(main)
