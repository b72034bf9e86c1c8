"""Fill the tables of docs/experiments.md from experiments/results/*.json:  python -m experiments.report

A table stands between `<!-- NAME -->` and `<!-- end -->`; the text around it is left alone.
"""

import json
import re
from pathlib import Path

import numpy as np

from experiments.common import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "experiments.md"


def ci(v, digits=2) -> str:
    return f"{v['mean']:.{digits}f} [{v['low']:.{digits}f}, {v['high']:.{digits}f}]"


def table(head: list[str], rows) -> str:
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        ]
    )


def edits(results: dict) -> str:
    """Results of Lab.edit, one a row."""
    return table(
        [
            "",
            "change in CLIP score",
            "LPIPS",
            "FID",
            "moved",
            "most moved other",
            "mean of the others",
            "malformed",
        ],
        (
            [
                key,
                ci(r["clip_change"], 1),
                ci(r["lpips"], 3),
                f"{r['fid']:.0f}",
                ci(r["moved"]),
                f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}",
                f"{r['mean_other_moved']:.1%}",
                f"{r['malformed']:.0%}",
            ]
            for key, r in results.items()
        ),
    )


def guidance(results: dict) -> str:
    """The changes of both predictions, then the edits."""
    changes = {key: r for key, r in results.items() if "cosine" in r}
    lengths = table(
        ["slider", "cosine", "length, in units of that in eps_c"],
        ([key, f"{r['cosine']:.3f}", f"{r['length']:.2f}"] for key, r in changes.items()),
    )
    return lengths + "\n\n" + edits({key: r for key, r in results.items() if key not in changes})


def visual_sliders(results: dict) -> str:
    pixels = lambda r: ", ".join(f"{p['mean']:.1f}" for p in r["pixels"])
    return table(
        [
            "",
            "eye size, scales -3 ... 3",
            "its width in pixels",
            "moved",
            "monotonic",
            "most moved other",
            "LPIPS at -2, 2",
            "malformed at -2, 0, 2",
        ],
        (
            [
                key,
                ", ".join(f"{m:.2f}" for m in r["means"]),
                pixels(r),
                f"{r['moved']:.0%}",
                "yes" if r["monotonic"] else "no",
                f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}",
                f"{r['lpips'][1]:.3f}, {r['lpips'][5]:.3f}",
                ", ".join(f"{r['malformed'][i]:.0%}" for i in (1, 3, 5)),
            ]
            for key, r in results.items()
        ),
    )


def ablations(results: dict) -> str:
    return table(
        [
            "",
            "scale",
            "age moved",
            "LPIPS",
            "change in CLIP score",
            "most moved other",
            "mean of the others",
        ],
        (
            [
                key.split(", age moved")[0],
                f"{r['scale']:.2f}",
                f"{r['reached']:.2f}",
                f"{r['lpips']:.3f}",
                f"{r['clip_change']:.1f}",
                f"{r['worst_other_moved']:.1%}",
                f"{r['mean_other_moved']:.2%}",
            ]
            for key, r in results.items()
            if "moved by" in key
        ),
    )


def composition(results: dict) -> str:
    moved = lambda effects: ", ".join(f"{concept} {v:.2f}" for concept, v in effects.items())
    return table(
        ["", "remains, of all", "each alone", "all at once", "LPIPS", "malformed"],
        (
            [
                key,
                f"{r['remains']:.0%}",
                moved(r["alone"]),
                moved(r["together"]),
                ci(r["lpips"], 2),
                f"{r['malformed']:.0%}",
            ]
            for key, r in results.items()
            if "sliders" in key
        ),
    )


def repair(results: dict) -> str:
    return table(
        [
            "",
            "wrong",
            "mended",
            "broken",
            "keep who they show",
            "LPIPS",
            "most moved other",
            "FID to well-made ones",
        ],
        (
            [
                key,
                "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**r["wrong"]),
                r["mended"],
                r["broken"],
                f"{r['kept']:.0%}",
                ci(r["lpips"]),
                f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}",
                f"{r['fid']:.1f}",
            ]
            for key, r in results.items()
        ),
    )


def inversion(results: dict) -> str:
    drawn = table(
        ["", "PSNR, dB", "LPIPS", "network evaluations"],
        (
            [
                key,
                ci(r["psnr"], 1),
                ci(r["lpips"]) if "lpips" in r else "",
                f"{r['evaluations']:.0f}" if "evaluations" in r else "",
            ]
            for key, r in results.items()
            if "psnr" in r
        ),
    )
    edited = table(
        ["", "its mean, scales -2 ... 2", "moved", "monotonic", "most moved other"],
        (
            [
                key,
                ", ".join(f"{m:.2f}" for m in r["means"]),
                f"{r['moved']:.0%}",
                "yes" if r["monotonic"] else "no",
                f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}",
            ]
            for key, r in results.items()
            if "means" in r
        ),
    )
    return drawn + "\n\n" + edited


def space(results: dict) -> str:
    readable = lambda name: name.replace("_", " ")
    sets = {kind: r for kind, r in results.items() if "sliders" in r}
    alone = lambda r: sum(row["moved"] >= 1.5 * row["next_moved"] for row in r["sliders"])
    in_short = table(
        [
            "directions",
            "cosine with their own (lowest)",
            "between sliders",
            "in order over -2 ... 2",
            "move one attribute at least 1.5 times as far as any other",
        ],
        (
            [
                kind,
                f"{r['mean_cosine']:.2f} ({min(row['cosine'] for row in r['sliders']):.2f})",
                f"{r['between']:.2f}",
                f"{sum(row['monotonic'] for row in r['sliders'])} of {len(r['sliders'])}",
                f"{alone(r)} of {len(r['sliders'])}",
            ]
            for kind, r in sets.items()
        ),
    )
    each = table(
        [
            "",
            "variance",
            "words, as a hint",
            "moves most",
            "then",
            "cosine",
            "along its direction, -2 ... 2",
        ],
        (
            [
                i + 1,
                f"{row['share']:.0%}",
                "; ".join(row["words"]),
                f"{readable(row['attribute'])} {row['moved']:.0%}",
                f"{readable(row['next'])} {row['next_moved']:.0%}",
                f"{row['cosine']:.2f}",
                ", ".join(f"{a:.2f}" for a in row["along"]),
            ]
            for i, row in enumerate(sets["independent"]["sliders"])
        ),
    )
    variety = table(
        ["", "mean distance between two", "malformed"],
        (
            [key, f"{r['distance']:.2f}", f"{r['malformed']:.0%}"]
            for key, r in results.get("diversity", {}).items()
        ),
    )
    return "\n\n".join(
        [
            in_short,
            "The independent ones:",
            each,
            "With all eight at random scales between -2 and 2:",
            variety,
        ]
    )


def stylegan(results: dict) -> str:
    return table(
        ["channel", "", "its mean, scales -3 ... 3", "moved", "in order", "most moved other"],
        (
            [
                key if who == "generator" else "",
                who,
                ", ".join(f"{m:.{0 if 'shirt' in key else 2}f}" for m in r[who]["means"]),
                f"{r[who]['moved']:.0%}",
                "yes" if r[who]["monotonic"] else "no",
                f"{r[who]['other'].replace('_', ' ')} {r[who]['other_moved']:.0%}",
            ]
            for key, r in results.items()
            for who in ("generator", "slider")
        ),
    )


def numbers(result, path=()) -> dict:
    """Every number of a result but the bounds of intervals: {("lpips", "mean"): 0.2, ...}."""
    if isinstance(result, dict):
        return {
            k: v
            for name, part in result.items()
            if name not in ("low", "high")
            for k, v in numbers(part, (*path, name)).items()
        }
    return (
        {path: float(result)}
        if isinstance(result, (int, float)) and not isinstance(result, bool)
        else {}
    )


MEASURES = {
    "clip_change": "change in CLIP score",
    "lpips": "LPIPS",
    "moved": "moved",
    "worst_other_moved": "most moved other",
}


def seeds(_) -> str:
    """Spearman's rank correlation between the rows of each experiment with seed 0 and with seed 1: 1 is the same ordering. Where
    rows are "concept: way", of the ways of each concept, the mean over concepts."""
    lines = []
    for file in sorted(RESULTS.glob("*_seed1.json")):
        name = file.stem.removesuffix("_seed1")
        one, other = (json.loads((RESULTS / f"{n}.json").read_text()) for n in (name, file.stem))
        rows = [key for key in one if key in other and (name != "ablations" or "moved by" in key)]
        line = [name.replace("_", " ")]
        for measure in MEASURES:
            groups = {}  # concept -> (value, with the other seed) of each of its ways
            for key in rows:
                pair = [
                    next((v for path, v in numbers(r[key]).items() if path[0] == measure), None)
                    if isinstance(r[key], dict)
                    else None
                    for r in (one, other)
                ]
                if None not in pair:
                    groups.setdefault(key.split(": ")[0] if ": " in key else "", []).append(pair)
            found = [spearman(*zip(*pairs)) for pairs in groups.values() if len(pairs) > 2]
            line.append(f"{np.mean(found):.2f}" if found else "")
        lines.append(line)
    return table(["experiment", *MEASURES.values()], lines)


def spearman(x, y) -> float:
    """The correlation of the ranks, ties sharing theirs. Spearman 1904."""
    ranks = lambda v: np.array(
        [(np.less(v, a).sum() + np.less_equal(v, a).sum() - 1) / 2 for a in v]
    )
    a, b = ranks(np.array(x)), ranks(np.array(y))
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")


KINDS = {
    "space": space,
    "stylegan": stylegan,
    "repair": repair,
    "inversion": inversion,
    "seeds": seeds,
    "text_sliders": edits,
    "activation": edits,
    "guidance": guidance,
    "visual_sliders": visual_sliders,
    "ablations": ablations,
    "composition": composition,
}


def main():
    page = PAGE.read_text()
    for name in re.findall(r"<!-- (\w+) -->", page):
        file = RESULTS / f"{name}.json"
        if name == "end" or (name != "seeds" and not file.exists()):
            continue
        filled = KINDS[name](json.loads(file.read_text()) if name != "seeds" else None)
        page = re.sub(
            rf"<!-- {name} -->.*?<!-- end -->",
            lambda _: f"<!-- {name} -->\n\n{filled}\n\n<!-- end -->",
            page,
            flags=re.S,
        )
    PAGE.write_text(page)
    print(f"{PAGE}: written")


if __name__ == "__main__":
    main()
