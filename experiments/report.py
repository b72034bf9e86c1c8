"""Fill the tables of docs/experiments.md and docs/guide.md from experiments/results/*.json:

    python -m experiments.report

A table stands between `<!-- NAME -->` and `<!-- end -->`; the text around it is left alone."""

import json
import re
from pathlib import Path

from experiments.common import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS / "experiments.md", DOCS / "guide.md"]


# ------------------------------------------------------------------------------------------- cells


def table(head: str, rows) -> str:
    """A Markdown table. head: the names of its columns, separated by " | "."""
    lines = [f"| {head} |", "|---" * len(head.split(" | ")) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def ci(interval: dict, digits=2) -> str:
    mean, low, high = (f"{interval[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def numbers(values, digits=2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def percent(values) -> str:
    return ", ".join(f"{value:.0%}" for value in values)


def readable(name: str) -> str:
    return name.replace("_", " ")


def other(result: dict) -> str:
    """The other attribute that moved most."""
    return f"{readable(result['worst_other'])} {result['worst_other_moved']:.0%}"


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


# ----------------------------------------------------------------------- a function for each table


def edits(results: dict) -> str:
    """Results of Lab.edit, one a row."""
    head = " | change in CLIP score | LPIPS | FID | moved | most moved other"
    head += " | mean of the others | malformed"
    rows = []
    for key, r in results.items():
        row = [key, ci(r["clip_change"], 1), ci(r["lpips"], 3), f"{r['fid']:.0f}"]
        row += [ci(r["moved"]), other(r), f"{r['mean_other_moved']:.1%}", f"{r['malformed']:.0%}"]
        rows.append(row)
    return table(head, rows)


def guidance(results: dict) -> str:
    """The changes of both predictions, then the edits."""
    changes = {key: r for key, r in results.items() if "cosine" in r}
    rows = [[key, f"{r['cosine']:.3f}", f"{r['length']:.2f}"] for key, r in changes.items()]
    lengths = table("slider | cosine | length, in units of that in eps_c", rows)
    return lengths + "\n\n" + edits({key: r for key, r in results.items() if key not in changes})


def visual_sliders(results: dict) -> str:
    head = " | eye size, scales -3 ... 3 | its width in pixels | moved | monotonic"
    head += " | most moved other | LPIPS at -2, 2 | malformed at -2, 0, 2"
    rows = []
    for key, r in results.items():
        pixels = numbers([interval["mean"] for interval in r["pixels"]], 1)
        row = [key, numbers(r["means"]), pixels, f"{r['moved']:.0%}", yes_or_no(r["monotonic"])]
        row += [other(r), numbers([r["lpips"][i] for i in (1, 5)], 3)]
        rows.append([*row, percent(r["malformed"][i] for i in (1, 3, 5))])
    return table(head, rows)


def ablations(results: dict) -> str:
    head = " | scale | age moved | LPIPS | change in CLIP score | most moved other"
    head += " | mean of the others"
    rows = []
    for key, r in results.items():
        if "moved by" in key:
            row = [key.split(", age moved")[0], f"{r['scale']:.2f}", f"{r['reached']:.2f}"]
            row += [f"{r['lpips']:.3f}", f"{r['clip_change']:.1f}"]
            row += [f"{r['worst_other_moved']:.1%}", f"{r['mean_other_moved']:.2%}"]
            rows.append(row)
    return table(head, rows)


def composition(results: dict) -> str:
    moved = lambda effects: ", ".join(f"{concept} {v:.2f}" for concept, v in effects.items())
    rows = []
    for key, r in results.items():
        if "sliders" in key:
            row = [key, f"{r['remains']:.0%}", moved(r["alone"]), moved(r["together"])]
            rows.append([*row, ci(r["lpips"], 2), f"{r['malformed']:.0%}"])
    return table(" | remains, of all | each alone | all at once | LPIPS | malformed", rows)


def repair(results: dict) -> str:
    head = " | wrong | mended | broken | keep who they show | LPIPS | most moved other"
    head += " | FID to well-made ones"
    rows = []
    for key, r in results.items():
        wrong = "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**r["wrong"])
        row = [key, wrong, r["mended"], r["broken"], f"{r['kept']:.0%}"]
        rows.append([*row, ci(r["lpips"]), other(r), f"{r['fid']:.1f}"])
    return table(head, rows)


def inversion(results: dict) -> str:
    drawn, edited = [], []
    for key, r in results.items():
        if "psnr" in r:
            lpips = ci(r["lpips"]) if "lpips" in r else ""
            evaluations = f"{r['evaluations']:.0f}" if "evaluations" in r else ""
            drawn.append([key, ci(r["psnr"], 1), lpips, evaluations])
        if "means" in r:
            row = [key, numbers(r["means"]), f"{r['moved']:.0%}", yes_or_no(r["monotonic"])]
            edited.append([*row, other(r)])
    drawn_head = " | PSNR, dB | LPIPS | network evaluations"
    edited_head = " | its mean, scales -2 ... 2 | moved | monotonic | most moved other"
    return table(drawn_head, drawn) + "\n\n" + table(edited_head, edited)


def space(*runs: dict) -> str:
    """Of each seed: its sliders stand by themselves, as another seed finds others."""
    parts = [both(*map(space_sets, runs))]
    for i, results in enumerate(runs):
        seed = f", seed {i}" if len(runs) > 1 else ""
        parts += [f"The independent ones{seed}:"]
        parts += [space_sliders(results["independent"]["sliders"])]
    parts += ["With all eight at random scales between -2 and 2:"]
    return "\n\n".join([*parts, both(*map(space_diversity, runs))])


def space_diversity(results: dict) -> str:
    rows = []
    for key, r in results.get("diversity", {}).items():
        rows.append([key, f"{r['distance']:.2f}", f"{r['malformed']:.0%}"])
    return table(" | mean distance between two | malformed", rows)


def space_sets(results: dict) -> str:
    sets = {kind: r for kind, r in results.items() if "sliders" in r}
    head = "directions | cosine with their own (lowest) | between sliders | in order over -2 ... 2"
    head += " | move one attribute at least 1.5 times as far as any other"
    rows = []
    for kind, r in sets.items():
        sliders = r["sliders"]
        lowest = min(one["cosine"] for one in sliders)
        in_order = sum(one["monotonic"] for one in sliders)
        alone = sum(one["moved"] >= 1.5 * one["next_moved"] for one in sliders)
        row = [kind, f"{r['mean_cosine']:.2f} ({lowest:.2f})", f"{r['between']:.2f}"]
        rows.append([*row, f"{in_order} of {len(sliders)}", f"{alone} of {len(sliders)}"])
    return table(head, rows)


def space_sliders(sliders: list[dict]) -> str:
    head = " | variance | words, as a hint | moves most | then | cosine"
    head += " | along its direction, -2 ... 2"
    rows = []
    for i, r in enumerate(sliders):
        row = [i + 1, f"{r['share']:.0%}", "; ".join(r["words"])]
        row += [f"{readable(r['attribute'])} {r['moved']:.0%}"]
        row += [f"{readable(r['next'])} {r['next_moved']:.0%}"]
        rows.append([*row, f"{r['cosine']:.2f}", numbers(r["along"])])
    return table(head, rows)


def stylegan(results: dict) -> str:
    rows = []
    for key, result in results.items():
        for name in ("generator", "slider"):
            r, first = result[name], key if name == "generator" else ""
            row = [first, name, numbers(r["means"], 0 if "shirt" in key else 2)]
            row += [f"{r['moved']:.0%}", yes_or_no(r["monotonic"])]
            rows.append([*row, f"{readable(r['other'])} {r['other_moved']:.0%}"])
    return table(
        "channel |  | its mean, scales -3 ... 3 | moved | in order | most moved other", rows
    )


def defaults(results: dict) -> str:
    head = " | its mean, scales -3 ... 3 | moved: mean, least | every one in order"
    head += " | most moved other: mean | worst seed"
    rows = []
    for key, r in results.items():
        row = [key, numbers(r["means"]), f"{r['moved']:.0%}, {r['least_moved']:.0%}"]
        row += [yes_or_no(r["monotonic"]), other(r)]
        name, moved = r["worst_seed"]
        rows.append([*row, f"{readable(name)} {moved:.0%}"])
    return table(head, rows)


def full_width(results: dict) -> str:
    head = (
        "slider | steps, batch, lr, eta | share, cosine | moved | in order | most moved other | s"
    )
    rows = []
    for name, found in results["sliders"].items():
        recipe, meter = found["recipe"], found["meter"]
        numbers_of = ", ".join(f"{recipe[key]:g}" for key in ("steps", "batch", "lr", "eta"))
        cells = [numbers((meter["share"], meter["cosine"])), f"{found['moved']:.0%}"]
        cells += [yes_or_no(found["monotonic"]), other(found), f"{meter['seconds']:.0f}"]
        rows.append([name, numbers_of, *cells])
    return table(head, rows)


# ------------------------------------------------------------------------------ seed 0 with seed 1


def both(one: str, two: str | None = None) -> str:
    """One table of two alike, of two training seeds: where a cell differs, both values."""
    if two is None:
        return one
    lines = []
    for a, b in zip(one.splitlines(), two.splitlines(), strict=True):
        pairs = zip(a.split(" | "), b.split(" | "), strict=True)
        lines.append(" | ".join(x if x == y else joined(x, y) for x, y in pairs))
    return "\n".join(lines)


def joined(x: str, y: str) -> str:
    """Both values of a cell; the line's outer bars, "| " and " |", are its first's and last's."""
    start, end = "| " * x.startswith("| "), " |" * x.endswith(" |")
    bare = lambda cell: cell.removeprefix("| ").removesuffix(" |")
    return f"{start}{bare(x)}<br>{bare(y)}{end}"


KINDS = {
    "defaults": defaults,
    "full_width": full_width,
    "space": space,
    "stylegan": stylegan,
    "repair": repair,
    "inversion": inversion,
    "text_sliders": edits,
    "activation": edits,
    "guidance": guidance,
    "visual_sliders": visual_sliders,
    "ablations": ablations,
    "composition": composition,
}


def load(name: str) -> list[dict]:
    """The results of each training seed that has some."""
    files = [RESULTS / f"{name}{seed}.json" for seed in ("", "_seed1")]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def filled(name: str) -> str | None:
    """The table `name`, of both seeds where there are two; None without results."""
    if not (results := load(name)):
        return None
    rows = set().union(*results)
    whole = [one for one in results if one.keys() == rows]  # a seed that was stopped waits
    results = whole or results[:1]
    return space(*results) if name == "space" else both(*map(KINDS[name], results))


def main():
    text = "".join(path.read_text() for path in PAGES)
    for name in KINDS:
        if filled(name) and f"<!-- {name} -->" not in text:
            print(f"experiments/results/{name}.json is in none of the pages")
    for path in PAGES:
        page = path.read_text()
        for name in set(re.findall(r"<!-- (\w+) -->", page)) - {"end"}:
            if found := filled(name):
                block = f"<!-- {name} -->\n\n{found}\n\n<!-- end -->"
                page = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: block, page, flags=re.S)
        path.write_text(page)
        print(f"{path}: written")


if __name__ == "__main__":
    main()
