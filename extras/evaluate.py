"""How far did an edit go, and what did it cost the picture?

    python -m extras.evaluate --original out/plain --edited out/old \\
        --prompt "a photo of an old person"

Change in CLIP score, LPIPS and FID (extras/metrics.py) of pictures matched by file name, with 95%
bootstrap intervals over the pictures. Every picture is first cropped to its middle square and
scaled to 512 pixels (128 with --judges miniature). The judges of real pictures are CLIP ViT-B/32,
LPIPS on AlexNet and Inception: pip install -r requirements-judges.txt. With --judges miniature they
are the miniature's own networks (miniature/judges.py), whose numbers compare with nothing but each
other.
"""

import json
from pathlib import Path

from extras.metrics import clip_change, fid, interval, lpips, real_judges
from miniature.judges import miniature_judges
from support import cli, images


def parse_args():
    p = cli.plain_parser(__doc__)
    p.add_argument("--original", required=True, metavar="DIR", help="pictures before the edit")
    edited = "the same after it, by the same names"
    p.add_argument("--edited", required=True, metavar="DIR", help=edited)
    p.add_argument("--prompt", required=True, help="what the edited pictures should show")
    judges = dict(choices=["real", "miniature"], default="real", help="default: %(default)s")
    p.add_argument("--judges", **judges)
    clip = "folder or Hub id (default: %(default)s)"
    p.add_argument("--clip", default="openai/clip-vit-base-patch32", help=clip)
    alexnet = "file of torchvision's AlexNet weights (default: fetched by the lpips package)"
    p.add_argument("--alexnet", help=alexnet)
    inception = "file of torch-fidelity's Inception weights (default: fetched by it)"
    p.add_argument("--inception", help=inception)
    p.add_argument("--json", help="also write the result to this file, a new one")
    args = p.parse_args()
    if args.json and cli.output_file(args.json, ".json").exists():
        raise ValueError(f"{args.json}: is there already: name another file")
    return args


def main():
    args = parse_args()
    files = images.match_by_name([Path(args.original), Path(args.edited)])
    side = 512 if args.judges == "real" else 128
    originals, edited = map(list, zip(*(images.read_group(pair, (side, side)) for pair in files)))
    if args.judges == "miniature":
        judges = miniature_judges()
    else:
        judges = real_judges(args.clip, args.alexnet, args.inception)
    result = {
        "pictures": len(files),
        "clip_change": interval(clip_change(judges, originals, edited, args.prompt)),
        "lpips": interval(lpips(judges, originals, edited)),
        "fid": fid(judges, originals, edited) if len(files) > 1 else None,
    }
    print(f"{len(files)} pairs; 95% intervals by bootstrap over pictures")
    for name in ("clip_change", "lpips"):
        found = result[name]
        print(f"{name:12} {found['mean']:8.3f}  [{found['low']:.3f}, {found['high']:.3f}]")
    if len(files) > 1:
        print(f"{'fid':12} {result['fid']:8.3f}")
    else:
        print("fid          is a distance of sets: it needs two pairs at least")
    if args.json:
        cli.write_text(args.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    cli.run(main)
