"""Fill the tables of docs/experiments.md from experiments/results/*.json:  python -m experiments.report

A table stands between `<!-- NAME -->` and `<!-- end -->`; the text around it is left alone.
"""

import json
import re
from pathlib import Path

from experiments.common import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "experiments.md"


def ci(v, digits=2) -> str:
    return f"{v['mean']:.{digits}f} [{v['low']:.{digits}f}, {v['high']:.{digits}f}]"


def table(head: list[str], rows) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def edits(results: dict) -> str:
    """Results of Lab.edit, one a row."""
    return table(["", "change in CLIP score", "LPIPS", "FID", "moved", "most moved other", "mean of the others", "malformed"],
                 ([key, ci(r["clip_change"], 1), ci(r["lpips"], 3), f"{r['fid']:.0f}", ci(r["moved"]), f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}",
                   f"{r['mean_other_moved']:.1%}", f"{r['malformed']:.0%}"] for key, r in results.items()))


def visual_sliders(results: dict) -> str:
    pixels = lambda r: ", ".join(f"{p['mean']:.1f}" for p in r["pixels"])
    return table(["", "eye size, scales -3 ... 3", "its width in pixels", "moved", "monotonic", "most moved other", "LPIPS at -2, 2", "malformed at -2, 0, 2"],
                 ([key, ", ".join(f"{m:.2f}" for m in r["means"]), pixels(r), f"{r['moved']:.0%}", "yes" if r["monotonic"] else "no",
                   f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}", f"{r['lpips'][1]:.3f}, {r['lpips'][5]:.3f}",
                   ", ".join(f"{r['malformed'][i]:.0%}" for i in (1, 3, 5))] for key, r in results.items()))


def ablations(results: dict) -> str:
    return table(["", "scale", "age moved", "LPIPS", "change in CLIP score", "most moved other", "mean of the others"],
                 ([key.split(", age moved")[0], f"{r['scale']:.2f}", f"{r['reached']:.2f}", f"{r['lpips']:.3f}", f"{r['clip_change']:.1f}",
                   f"{r['worst_other_moved']:.1%}", f"{r['mean_other_moved']:.2%}"] for key, r in results.items() if "moved by" in key))


def composition(results: dict) -> str:
    return table(["", "remains of each, mean", "least", "most", "LPIPS", "malformed"],
                 ([key, f"{r['mean']:.0%}", "{} {:.0%}".format(*min(r["remains"].items(), key=lambda x: x[1])),
                   "{} {:.0%}".format(*max(r["remains"].items(), key=lambda x: x[1])), ci(r["lpips"], 3), f"{r['malformed']:.0%}"] for key, r in results.items() if "sliders" in key))


KINDS = {"text_sliders": edits, "activation": edits, "visual_sliders": visual_sliders, "ablations": ablations, "composition": composition}


def main():
    page = PAGE.read_text()
    for name in re.findall(r"<!-- (\w+) -->", page):
        file = RESULTS / f"{name}.json"
        if name == "end" or not file.exists():
            continue
        filled = KINDS[re.sub(r"_seed\d+$", "", name)](json.loads(file.read_text()))
        page = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: f"<!-- {name} -->\n\n{filled}\n\n<!-- end -->", page, flags=re.S)
    PAGE.write_text(page)
    print(f"{PAGE}: written")


if __name__ == "__main__":
    main()
