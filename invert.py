"""Real pictures: find the noise, and the unconditional embeddings, from which the sampler draws
just this picture again.

DDIM run backwards (sampler.ddim_inversion) leads from a picture to a noise that at guidance 1 leads
nearly back. With guidance the way back strays. Null-text inversion (Mokady et al. 2023) takes
the way up as its pivot x*. Step by step on the way down it fits the embedding of the empty prompt,
null_t, so that guided sampling stays on the pivot:

    min over null_t  || x*_{t'} - ddim_step(x_t, eps_u + g (eps_c - eps_u)) ||^2,
    eps_u = eps_theta(x_t, null_t, t),  t' the next noise level

SDXL's unconditional embedding has two parts, context and pooled: both are fitted. Negative-prompt
inversion (Miyake et al. 2023) fits nothing. It puts the picture's own prompt in the place of the
empty one, so that eps_u = eps_c and guidance drops out. Either result stands in for `uncond` when
the picture is drawn again, with sliders (slider.py --image)."""

from dataclasses import dataclass

import torch
from tqdm import tqdm

import sampler

METHODS = ("null-text", "negative-prompt", "ddim")
INNER = 10  # steps of null-text inversion for each t, at most


@dataclass
class Inversion:
    """What draws B pictures again: sampler.sample(unet, x_T, cond, uncond, ...), same settings."""

    x_T: torch.Tensor  # (B, 4, h, w)
    uncond: list  # for each step, the largest t first: context (B or 1, 77, d), pooled, time_ids
    evaluations: int = 0  # of the UNet, one a picture; 0: it came from a file


def invert(
    unet, x_0, cond, uncond, *, alpha_bar, method="null-text", steps=30, guidance=5.0, **settings
) -> Inversion:
    """Invert latents x_0 (B, 4, h, w). cond: their prompts' conditioning, B rows or one for all.
    uncond: the empty prompt's, one row. settings: null_text's. ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    cond, ts = sampler.expand(cond, len(x_0)), sampler.timesteps(steps, len(alpha_bar))
    pivot = sampler.ddim_inversion(unet, x_0, cond, alpha_bar=alpha_bar, steps=steps)
    if method == "null-text" and guidance != 1:  # at guidance 1 there is no eps_u to fit
        settings |= dict(alpha_bar=alpha_bar, guidance=guidance)
        return null_text(unet, pivot, ts, cond, uncond, **settings)
    return Inversion(pivot[0], [uncond if method == "ddim" else cond] * len(ts), len(ts) * len(x_0))


def step_loss(unet, x_t, t: int, t_next: int, eps_c, null, goal, *, alpha_bar, guidance: float):
    """One guided step with the unconditional embedding `null`: x_{t_next} (B, 4, h, w), and its
    mean squared distances from the pivot `goal` (B,). Mokady et al. 2023, eq. (3)."""
    eps_u = unet(x_t, torch.full((len(x_t),), t, device=x_t.device), *null)
    x_next = sampler.ddim_step(x_t, eps_u + guidance * (eps_c - eps_u), t, t_next, alpha_bar)
    error = sampler.at_least_float32(x_next) - sampler.at_least_float32(goal)
    return x_next, error.square().mean((1, 2, 3))


def null_text(
    unet,
    pivot,
    ts: list[int],
    cond,
    uncond,
    *,
    alpha_bar,
    guidance: float,
    inner: int = INNER,
    lr: float = 0.03,
    tolerance: float = 1e-5,
    remember=lambda name, make: make(),
) -> Inversion:
    """Fit the unconditional embeddings to the pivot x*_T ... x*_0, (steps + 1, B, 4, h, w), of
    levels ts.

    inner: optimizer steps at most for each t. lr: Adam's, in units of the standard deviation of
    the prompts' context, which differs from model to model; it falls to half over the steps.
    tolerance: the mean squared error at which a t is done. It rises by 2e-5 a step, as in the
    authors' code: late steps have less to gain. The B pictures go on until the worst is good
    enough. remember: called as remember(f"step{i}", make), so that an inversion that was stopped
    goes on."""
    steps, B = len(ts), pivot.shape[1]
    lr = lr * cond[0].float().std().item()
    time_ids = uncond[2].expand(B, -1)
    as_condition = lambda context, pooled: (context.to(time_ids), pooled.to(time_ids), time_ids)

    def fit(i, x_t, null):
        """The embeddings that lead from x_t to the pivot's next latents, and where they do lead."""
        t, t_next = [*ts, -1][i : i + 2]  # -1: the end
        null = [part.clone().requires_grad_() for part in null]
        optimizer = torch.optim.Adam(null, lr=lr * (1 - i / (2 * steps)), eps=2**14 * 1e-8)
        settings = dict(alpha_bar=alpha_bar, guidance=guidance)
        with torch.no_grad():
            eps_c = unet(x_t, torch.full((B,), t, device=x_t.device), *cond)
        for j in range(inner + 1):  # once more than it optimizes: to see where that leads
            uncond_t = as_condition(*null)
            x_next, loss = step_loss(
                unet, x_t, t, t_next, eps_c, uncond_t, pivot[i + 1], **settings
            )
            if loss.max().item() < tolerance + 2e-5 * i or j == inner:
                break
            optimizer.zero_grad()
            (loss.sum() * 2**14).backward()  # loss scaling: float16
            optimizer.step()
        error = loss.max()
        found = {"context": null[0], "pooled": null[1], "x_next": x_next, "error": error}
        return {k: v.detach() for k, v in found.items()} | {"optimized": torch.tensor(j)}

    null = [part.float().expand(B, *part.shape[1:]).clone() for part in uncond[:2]]
    x_t, fitted, evaluations = pivot[0], [], steps * B
    with tqdm(range(steps), unit="step", desc="null-text") as bar:
        for i in bar:
            found = remember(f"step{i}", lambda: fit(i, x_t, null))
            found = {k: v.to(pivot.device) for k, v in found.items()}
            null, x_t = [found["context"], found["pooled"]], found["x_next"]
            fitted.append(as_condition(*null))
            optimized = found["optimized"].item()
            evaluations += (2 + optimized) * B  # eps_c; eps_u once more than there were steps
            bar.set_postfix_str(f"error {found['error'].item():.1e} after {optimized}")
    return Inversion(pivot[0], fitted, evaluations)


def max_evaluations(method: str, steps: int) -> int:
    """UNet evaluations for one picture. Null-text inversion may stop early, the others take all."""
    return steps + (steps * (2 + INNER) if method == "null-text" else 0)
