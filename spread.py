"""What varies in a set of pictures: CLIP's features of them, the directions in which these spread, and words for the directions.

For train_space.py (SliderSpace, Gandikota et al. 2025, section 3)."""

import torch
import torch.nn.functional as F

import sampler
import training


def towers(args, model):
    """CLIP's two halves: pictures (b, 3, H, W) in [-1, 1] -> (b, d), with gradients; prompts -> (b, d)."""
    if args.clip is None:
        if not training.is_small(model.unet):
            raise ValueError("--clip is needed: a CLIP model, folder or Hub id, such as openai/clip-vit-large-patch14")
        from miniature.judges import vision_tower  # the miniature has a CLIP of its own

        return vision_tower().to(model.device), lambda prompts: model.encode_prompt(prompts)[1].cpu()
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(args.clip).eval().requires_grad_(False).to(model.device)
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    side = clip.config.vision_config.image_size
    mean, std = (torch.tensor(c, device=model.device).view(1, 3, 1, 1) for c in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    of = lambda out: out if torch.is_tensor(out) else out.pooler_output  # transformers 5 wraps what transformers 4 returned bare

    def see(x):  # average-pooled to CLIP's size: cheap, smooth, and what the paper's code does
        return of(clip.get_image_features(pixel_values=(F.adaptive_avg_pool2d((x + 1) / 2, side) - mean) / std))

    return see, lambda prompts: of(clip.get_text_features(**tokenizer(prompts, return_tensors="pt", padding=True, truncation=True).to(model.device))).cpu()


def features(model, clip, x_0):
    """Unit-length CLIP features (b, d), float32, of latents x_0 (b, 4, h, w), with gradients."""
    pictures = model.vae.decode(x_0.to(next(model.vae.parameters()).dtype))
    return F.normalize(clip(sampler.precise(pictures)), dim=-1)


def directions(f, k: int, independent: bool = False):
    """Directions in which features f (n, d) spread: v (k, d), unit length; their standard deviations (k,); their shares of the
    whole variance (k,). Each points where its skewness is positive, so that a rerun has no other signs.

    The k principal directions, as the paper has it; with `independent` they are turned, within their span, to the ones along which
    the pictures vary independently (`turned`)."""
    centred = (f - f.mean(0)).cpu().double()  # not every device has float64
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    along = S[:k, None] / (len(f) - 1) ** 0.5 * Vh[:k]  # (k, d): each direction as long as its standard deviation
    if independent:
        along = turned(centred @ torch.linalg.pinv(along)) @ along
        along = along[along.norm(dim=1).argsort(descending=True)]
    along = along * torch.sign((centred @ torch.linalg.pinv(along)).pow(3).sum(0))[:, None]
    sigma = along.norm(dim=1)
    return tuple(x.float().to(f.device) for x in (along / sigma[:, None], sigma, sigma.square() * (len(f) - 1) / S.square().sum()))


def turned(z, rounds: int = 200):
    """The rotation R (k, k) that makes the columns of z R^T as unlike a normal distribution as it can be, each on its own, z (n, k)
    being of unit variance and uncorrelated: independent component analysis (FastICA with the kurtosis, Hyvarinen 1999, eq. (20)).

    Why: PCA can't tell apart directions of like variance, and returns any mixture of them: "smiling with dark skin". A mixture of
    independent causes is nearer to normal than the causes are: what is least normal is one cause alone."""
    R, _ = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], generator=torch.Generator().manual_seed(0), dtype=z.dtype))
    for _ in range(rounds):
        steps = ((z @ R.T) ** 3).T @ z / len(z) - 3 * R  # each row towards a larger kurtosis, or a smaller one
        U, _, Vh = torch.linalg.svd(steps)
        R = U @ Vh  # the nearest rotation
    return R


@torch.no_grad()
def names(encode, prompt: str, words: list[str], v) -> list[list[str]]:
    """For each direction the words whose addition to the prompt moves CLIP's text feature most along it and most against it:
    ["+ hat, old, grey", "- young, ..."]. A hint, no more: pictures and words lie apart in CLIP's space. encode: prompts -> (n, d)."""
    f = F.normalize(encode([prompt] + [f"{prompt}, {w}" for w in words]).float(), dim=-1)
    along = F.normalize(f[1:] - f[0], dim=-1) @ v.cpu().T  # (words, k)
    top = lambda values: ", ".join(words[j] for j in values.argsort(descending=True)[:3])
    return [[f"+ {top(a)}", f"- {top(-a)}"] for a in along.T]


WORDS = (
    "old young child smiling serious dark bright colorful gray red green blue yellow white black indoors outdoors night day winter summer close-up distant "
    "man woman crowd alone modern ancient luxury poor city nature forest beach mountain painting photograph drawing cartoon statue blurry detailed simple "
    "big small hat glasses beard long-hair short-hair uniform casual elegant happy sad angry"
).split()


def words_of(model) -> list[str]:
    """Words to name directions with: those that the model was trained on, where its folder lists them, or a short list."""
    return sorted(model.known_words) if model.known_words else WORDS
