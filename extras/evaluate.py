"""How far did an edit go, and what did it cost the picture?

    python evaluate.py --original out/plain --edited out/old --prompt "a photo of an old person"

The three measures of the paper, on pictures matched by file name:
* change in CLIP score (Hessel et al. 2021): 100 cos(picture, prompt) of the edited less that of the original picture;
* LPIPS (Zhang et al. 2018): the distance of the two in a network's features, 0 for the same picture;
* FID (Heusel et al. 2017): the distance of two sets of pictures, as Gaussians in a network's features.
Each mean has a 95% bootstrap interval over the pictures.

The judges of real pictures are CLIP ViT-B/32, LPIPS on AlexNet and Inception, `pip install -r requirements-judges.txt`; with
--judges miniature, the miniature's own networks (miniature/judges.py), whose numbers compare with nothing but each other.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support import cli, images


@dataclass
class Judges:
    """Networks that look at pictures; each a function of a list of N PIL images (or of prompts)."""

    clip_pictures: Callable  # -> (N, d)
    clip_prompts: Callable  # prompts -> (N, d)
    layers: Callable  # -> list of features (N, c, h, w) of several depths, already weighted: LPIPS is their distance
    inception: Callable  # -> (N, d)


# ---------------------------------------------------------------------------------------------- measures


def in_parts(see, items, n: int = 32) -> torch.Tensor:
    """see(items), a few at a time: (len(items), ...)."""
    return torch.cat([see(items[i : i + n]) for i in range(0, len(items), n)])


def clip_score(judges: Judges, images, prompts) -> np.ndarray:
    """100 cos(picture, prompt), shape (N,). prompts: N of them, or one for all."""
    prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
    return (
        100
        * F.cosine_similarity(
            in_parts(judges.clip_pictures, images), judges.clip_prompts(prompts), dim=-1
        )
    ).numpy()


def clip_change(judges, originals, edited, prompts) -> np.ndarray:
    """(N,): above 0, the edited picture is closer to the prompt than the original."""
    return clip_score(judges, edited, prompts) - clip_score(judges, originals, prompts)


def lpips(judges, originals, edited) -> np.ndarray:
    """(N,): 0 for the same picture. Zhang et al. 2018, eq. (1): squared distances, the mean over places, summed over layers."""

    def distances(pairs):
        layers = zip(*(judges.layers(list(side)) for side in zip(*pairs)))
        return sum((a - b).square().sum(1).mean((1, 2)) for a, b in layers)

    return in_parts(distances, list(zip(originals, edited))).numpy()


def psnr(originals, edited) -> np.ndarray:
    """(N,): peak signal-to-noise ratio in dB, of pictures of one size; infinite for the same picture."""
    array = lambda images: np.stack([np.asarray(p.convert("RGB"), dtype=float) for p in images])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.square(array(originals) - array(edited)).mean((1, 2, 3)))


def fid(judges, some, others) -> float:
    """|| m_1 - m_2 ||^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of the two sets' features. Heusel et al. 2017, eq. (6).

    Small sets read too high, all the more the fewer they are: compare only sets of one size."""
    return frechet(
        *(in_parts(judges.inception, pictures).double().numpy() for pictures in (some, others))
    )


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The same of features x (N, d), y (M, d)."""
    C_1, C_2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = lambda C: (lambda w, v: (v * np.sqrt(w.clip(0))) @ v.T)(
        *np.linalg.eigh(C)
    )  # of a symmetric matrix
    # Tr (C_1 C_2)^(1/2) = Tr (C_1^(1/2) C_2 C_1^(1/2))^(1/2), and there the root is of a symmetric matrix.
    R = root(C_1)
    cross = np.sqrt(np.linalg.eigvalsh(R @ C_2 @ R).clip(0)).sum()
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(C_1) + np.trace(C_2) - 2 * cross)


def interval(values, statistic=np.mean, draws: int = 2000, seed: int = 0) -> dict:
    """{"mean": statistic of values (N, ...), "low", "high": 95% bootstrap interval over the N (Efron 1979)}."""
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(statistic(values)), "low": float(low), "high": float(high)}


def wilson(k: int, n: int, z: float = 1.96) -> dict:
    """A rate of k in n: {"mean", "low", "high": Wilson's 95% interval (1927), which stays within 0 and 1}."""
    p, middle = k / n, (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return {"mean": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


# ---------------------------------------------------------------------------------------------- judges of real pictures


def real_judges(
    clip: str = "openai/clip-vit-base-patch32",
    alexnet: str | None = None,
    inception: str | None = None,
    device="cpu",
) -> Judges:
    """CLIP (a folder or Hub id), LPIPS on AlexNet, FID's Inception. alexnet, inception: files of weights (torchvision's
    alexnet, torch-fidelity's Inception); None: those packages fetch their own. Loaded when first used. ValueError without the packages."""
    try:
        import lpips as lpips_package
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"the judges of real pictures need {error.name}: pip install -r requirements-judges.txt"
        ) from None
    from transformers import CLIPModel, CLIPProcessor

    loaded = {}

    def once(name, load):
        if name not in loaded:
            loaded[name] = load()
        return loaded[name]

    def load_lpips():
        net = lpips_package.LPIPS(net="alex", pnet_rand=alexnet is not None, verbose=False)
        if alexnet:
            state = torch.load(alexnet, weights_only=True)
            mine = [p for k, p in net.net.state_dict().items()]
            for p, value in zip(
                mine, [v for k, v in state.items() if k.startswith("features.")], strict=True
            ):
                p.copy_(value)
        return net.eval().to(device)

    model = lambda: once("clip", lambda: CLIPModel.from_pretrained(clip).eval().to(device))
    processor = lambda: once("processor", lambda: CLIPProcessor.from_pretrained(clip))
    tensor = lambda images: torch.stack(
        [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in images]
    ).to(device)  # uint8

    def of(out):  # transformers 5 wraps what transformers 4 returned bare
        return (out if torch.is_tensor(out) else out.pooler_output).cpu()

    @torch.no_grad()
    def layers(images):
        net = once("lpips", load_lpips)
        features = net.net(net.scaling_layer(tensor(images).float() / 127.5 - 1))
        weights = [
            lin.model[-1].weight.clamp(min=0).sqrt() for lin in net.lins
        ]  # LPIPS's w_l, taken inside the square
        return [(F.normalize(f, dim=1, eps=1e-10) * w).cpu() for f, w in zip(features, weights)]

    @torch.no_grad()
    def features(images):
        net = once(
            "inception",
            lambda: FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=inception
            )
            .eval()
            .to(device),
        )
        return net(tensor(images))[0].cpu()

    return Judges(
        torch.no_grad()(
            lambda images: of(
                model().get_image_features(
                    **processor()(images=images, return_tensors="pt").to(device)
                )
            )
        ),
        torch.no_grad()(
            lambda prompts: of(
                model().get_text_features(
                    **processor()(
                        text=prompts, return_tensors="pt", padding=True, truncation=True
                    ).to(device)
                )
            )
        ),
        layers,
        features,
    )


# ---------------------------------------------------------------------------------------------- command line


def parse_args():
    p = cli.plain_parser(__doc__)
    p.add_argument("--original", required=True, metavar="DIR", help="pictures before the edit")
    p.add_argument(
        "--edited", required=True, metavar="DIR", help="the same after it, by the same names"
    )
    p.add_argument("--prompt", required=True, help="what the edited pictures should show")
    p.add_argument(
        "--judges", choices=["real", "miniature"], default="real", help="default: %(default)s"
    )
    p.add_argument(
        "--clip",
        default="openai/clip-vit-base-patch32",
        help="folder or Hub id (default: %(default)s)",
    )
    p.add_argument(
        "--alexnet",
        help="file of torchvision's AlexNet weights (default: fetched by the lpips package)",
    )
    p.add_argument(
        "--inception", help="file of torch-fidelity's Inception weights (default: fetched by it)"
    )
    p.add_argument("--json", help="also write the result to this file")
    return p.parse_args()


def main():
    args = parse_args()
    files = images.match_by_name([Path(args.original), Path(args.edited)])
    originals, edited = zip(
        *(images.read_group(pair, 512 if args.judges == "real" else 128) for pair in files)
    )
    if args.judges == "miniature":
        from miniature.judges import miniature_judges

        judges = miniature_judges()
    else:
        judges = real_judges(args.clip, args.alexnet, args.inception)
    originals, edited = list(originals), list(edited)
    result = {
        "pictures": len(files),
        "clip_change": interval(clip_change(judges, originals, edited, args.prompt)),
        "lpips": interval(lpips(judges, originals, edited)),
        "fid": fid(judges, originals, edited) if len(files) > 1 else None,
    }
    print(f"{len(files)} pairs; 95% intervals by bootstrap over pictures")
    for name in ("clip_change", "lpips"):
        print(
            f"{name:12} {result[name]['mean']:8.3f}  [{result[name]['low']:.3f}, {result[name]['high']:.3f}]"
        )
    print(
        f"{'fid':12} {result['fid']:8.3f}"
        if len(files) > 1
        else "fid          is a distance of sets: it needs two pairs at least"
    )
    if args.json:
        cli.write_text(args.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    cli.run(main)
