"""Do the sentences of docs/experiments.md still say what the results do?

    python -m experiments.claims

Each claim is a sentence of the page with gaps, and what of the results goes into the gaps; a claim
without gaps is a condition. Printed are those whose sentence, filled from the results of today,
the page does not have. Figures of two training seeds are ranges over both."""

import re

from experiments.report import PAGES, load
from support import cli

CONCEPTS = ("age", "smile", "eye size", "red hair")


def percent(values, digits=0) -> str:
    """ "54 to 91%": the range of the values; one number if it is one."""
    low, high = (f"{100 * f(values):.{digits}f}" for f in (min, max))
    return f"{low}%" if low == high else f"{low} to {high}%"


def plain(values, digits=2) -> str:
    low, high = (f"{f(values):.{digits}f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def ratio(name, to, measure):
    """measure of the method `name` over that of `to`, for each concept and seed of Table 1."""
    of = lambda r, c, m: r[f"{c}: {m}"][measure]
    value = lambda x: x["mean"] if isinstance(x, dict) else x
    rows = [(r, c) for r in load("text_sliders") for c in CONCEPTS]
    return [value(of(r, c, name)) / value(of(r, c, to)) for r, c in rows]


def text_sliders():
    at_2 = "slider, scale 2"
    yield (
        "at scale 2 the sliders reach {} of prompting's change in CLIP score at {} times its LPIPS",
        percent(ratio(at_2, "prompt", "clip_change")),
        plain(ratio(at_2, "prompt", "lpips")),
    )
    yield (
        "and move the mean of the other attributes by {} as much",
        percent(ratio(at_2, "prompt", "mean_other_moved")),
    )


def activation():
    runs = load("activation")
    starts = [[r[f"start {i / 10}"] for i in range(9)] for r in runs]
    for measure, does in (("lpips", "the more of the picture is kept"), ("moved", "less it does")):
        falls = lambda rows: all(a[measure]["mean"] > b[measure]["mean"] for a, b in rows)
        yield does if all(falls(zip(rows, rows[1:])) for rows in starts) else f"not: {does}"
    kept = [rows[4]["moved"]["mean"] / rows[0]["moved"]["mean"] for rows in starts]
    yield "a start of 0.4 gives up {} of the effect at 0", percent([1 - share for share in kept])


def guidance():
    changes = [r for run in load("guidance") for r in run.values() if "cosine" in r]
    yield "(cosine {} and more)", f"{min(r['cosine'] for r in changes) - 5e-4:.3f}"
    yield "and are of one length ({})", plain([r["length"] for r in changes])


def repair():
    rate = lambda what, scale: percent(
        [r[f"{what}: scale {scale}"]["wrong"]["mean"] for r in load("repair")], 1
    )
    for what in ("faces", "hands"):
        sentence = f"of {what} {{}} are wrong without the slider, {{}} with it"
        yield sentence, rate(what, 0), rate(what, 2)


def inversion():
    psnr = lambda key: [r[key]["psnr"]["mean"] for r in load("inversion")]
    lost = lambda key: plain([a - b for a, b in zip(psnr("VAE alone"), psnr(key))], 1)
    yield "Null-text inversion loses {} dB against what the VAE alone does", lost("null-text")
    yield "plain DDIM inversion, whose error guidance multiplies, {} dB", lost("ddim")
    yield "Negative-prompt inversion loses {} dB", lost("negative-prompt")


def space():
    sliders = [r["independent"]["sliders"] for r in load("space")]
    for one in sliders:
        yield "{} followed with a cosine of", f"{sum(s['cosine'] > 0.5 for s in one)} of 8"


CLAIMS = (text_sliders, activation, guidance, repair, inversion, space)


def broken(page: str) -> list[str]:
    """The sentences, as the results have them, that `page` does not say. Functions are named as
    the results are."""
    flat, missing = re.sub(r"\s+", " ", page), []
    for of_section in CLAIMS:
        for claim in of_section() if load(of_section.__name__) else []:
            sentence, *values = [claim] if isinstance(claim, str) else claim
            filled = sentence.format(*values)
            if filled not in flat:
                missing.append(f"{of_section.__name__}: {filled}")
    return missing


def main():
    missing = broken(PAGES[0].read_text())
    for line in missing:
        print(f"docs/experiments.md does not say: {line}")
    print(f"{len(missing)} sentences of the page are not what the results say")


if __name__ == "__main__":
    cli.run(main)
