"""How far did an edit go, and what did it cost the picture? The measures of the paper.

* change in CLIP score (Hessel et al. 2021): 100 cos(picture, prompt), edited less original;
* LPIPS (Zhang et al. 2018): the distance of two pictures in a network's features, 0 for the same;
* FID (Heusel et al. 2017): the distance of two sets of pictures, as Gaussians in a network's
  features.

And 95% intervals for them. The judges of real pictures are CLIP ViT-B/32, LPIPS on AlexNet and
Inception."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from formats import first_line
from support.clip import tensor_of


@dataclass
class Judges:
    """Networks that look at pictures; each a function of a list of N PIL images (or of prompts)."""

    clip_pictures: Callable  # -> (N, d)
    clip_prompts: Callable  # prompts -> (N, d)
    # -> list of features (N, c, h, w) of several depths, already weighted: LPIPS is their distance
    layers: Callable
    inception: Callable  # -> (N, d)


# ----------------------------------------------------------------------------------------- measures


def in_parts(see, items, n: int = 32) -> torch.Tensor:
    """see(items), a few at a time: (len(items), ...)."""
    return torch.cat([see(items[i : i + n]) for i in range(0, len(items), n)])


def clip_score(judges: Judges, images, prompts) -> np.ndarray:
    """100 cos(picture, prompt), shape (N,). prompts: N of them, or one for all."""
    prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
    of_pictures, of_prompts = in_parts(judges.clip_pictures, images), judges.clip_prompts(prompts)
    return (100 * F.cosine_similarity(of_pictures, of_prompts, dim=-1)).numpy()


def clip_change(judges, originals, edited, prompts) -> np.ndarray:
    """(N,): above 0, the edited picture is closer to the prompt than the original."""
    return clip_score(judges, edited, prompts) - clip_score(judges, originals, prompts)


def lpips(judges, originals, edited) -> np.ndarray:
    """(N,): 0 for the same picture. Zhang et al. 2018, eq. (1): squared distances, the mean over
    places, summed over layers."""

    def distances(pairs):
        layers = zip(*(judges.layers(list(side)) for side in zip(*pairs)))
        return sum((a - b).square().sum(1).mean((1, 2)) for a, b in layers)

    return in_parts(distances, list(zip(originals, edited))).numpy()


def psnr(originals, edited) -> np.ndarray:
    """(N,): peak signal-to-noise ratio in dB, of pictures of one size; infinite for the same
    picture."""
    array = lambda images: np.stack([np.asarray(p.convert("RGB"), dtype=float) for p in images])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.square(array(originals) - array(edited)).mean((1, 2, 3)))


def fid(judges, one_set, other_set) -> float:
    """|| m_1 - m_2 ||^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of the two sets' features. Heusel et
    al. 2017, eq. (6).

    Small sets read too high, all the more the fewer they are: compare only sets of one size."""
    features = lambda pictures: in_parts(judges.inception, pictures).double().numpy()
    return frechet(features(one_set), features(other_set))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The same for features x (N, d), y (M, d)."""

    def root(C):  # of a symmetric matrix
        w, v = np.linalg.eigh(C)
        return (v * np.sqrt(w.clip(0))) @ v.T

    C_1, C_2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # Tr (C_1 C_2)^(1/2) = Tr (C_1^(1/2) C_2 C_1^(1/2))^(1/2), and there the root is of a symmetric
    # matrix.
    R = root(C_1)
    cross = np.sqrt(np.linalg.eigvalsh(R @ C_2 @ R).clip(0)).sum()
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(C_1) + np.trace(C_2) - 2 * cross)


def interval(values, draws: int = 2000) -> dict:
    """{"mean": of values (N, ...), "low", "high": its 95% bootstrap interval over the N (Efron
    1979)}."""
    values, rng = np.asarray(values), np.random.default_rng(0)
    drawn = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def wilson(k: int, n: int, z: float = 1.96) -> dict:
    """A rate of k in n: {"mean", "low", "high": Wilson's 95% interval (1927), which stays within 0
    and 1}."""
    p, middle = k / n, (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return {"mean": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


# -------------------------------------------------------------------------- judges of real pictures


@contextlib.contextmanager
def readable(option: str, path: str | None):
    """What a file that is no such weights raises, as a ValueError. FileNotFoundError as it is."""
    try:
        yield
    except Exception as error:  # anything
        if path is None or isinstance(error, OSError):
            raise
        raise ValueError(f"{option} {path}: no such weights: {first_line(error)}") from None


def real_judges(
    clip: str = "openai/clip-vit-base-patch32",
    alexnet: str | None = None,
    inception: str | None = None,
    device="cpu",
) -> Judges:
    """CLIP (a folder or Hub id), LPIPS on AlexNet, FID's Inception. alexnet, inception: files of
    weights (torchvision's alexnet, torch-fidelity's Inception); None: those packages fetch their
    own. Loaded when first used. ValueError without the packages."""
    try:
        import lpips as lpips_package
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        remedy = "pip install -r requirements-judges.txt"
        raise ValueError(f"the judges of real pictures need {error.name}: {remedy}") from None
    from transformers import CLIPModel, CLIPProcessor

    @functools.cache
    def load_clip():
        net = CLIPModel.from_pretrained(clip).float().eval().to(device)
        return net, CLIPProcessor.from_pretrained(clip)

    @functools.cache
    def load_lpips():
        net = lpips_package.LPIPS(net="alex", pnet_rand=alexnet is not None, verbose=False)
        if alexnet:
            with readable("--alexnet", alexnet):
                state = torch.load(alexnet, weights_only=True)
                values = [v for name, v in state.items() if name.startswith("features.")]
                for p, value in zip(net.net.state_dict().values(), values, strict=True):
                    p.copy_(value)
        return net.eval().to(device)

    @functools.cache
    def load_inception():
        weights = dict(feature_extractor_weights_path=inception)
        with readable("--inception", inception):
            net = FeatureExtractorInceptionV3("inception", ["2048"], **weights)
        return net.eval().to(device)

    def tensor(images):  # (N, 3, H, W), uint8
        arrays = [torch.from_numpy(np.array(p.convert("RGB"))) for p in images]
        return torch.stack(arrays).permute(0, 3, 1, 2).to(device)

    @torch.no_grad()
    def clip_pictures(images):
        net, processor = load_clip()
        inputs = processor(images=images, return_tensors="pt").to(device)
        return tensor_of(net.get_image_features(**inputs)).cpu()

    @torch.no_grad()
    def clip_prompts(prompts):
        net, processor = load_clip()
        inputs = processor(text=prompts, return_tensors="pt", padding=True, truncation=True)
        return tensor_of(net.get_text_features(**inputs.to(device))).cpu()

    @torch.no_grad()
    def layers(images):
        net = load_lpips()
        features = net.net(net.scaling_layer(tensor(images).float() / 127.5 - 1))
        # LPIPS's w_l, taken inside the square.
        weights = [lin.model[-1].weight.clamp(min=0).sqrt() for lin in net.lins]
        return [(F.normalize(f, dim=1, eps=1e-10) * w).cpu() for f, w in zip(features, weights)]

    @torch.no_grad()
    def features(images):
        return load_inception()(tensor(images))[0].cpu()

    return Judges(clip_pictures, clip_prompts, layers, features)
