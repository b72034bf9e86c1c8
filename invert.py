"""Real pictures: find the noise, and the unconditional embeddings, from which the sampler draws just this picture again.

DDIM backwards (sampler.ddim_backwards) leads from a picture to a noise that leads back to it at guidance 1. With guidance
the way back strays. Null-text inversion (Mokady et al. 2023) takes the way up as its pivot and, step by step on the way
down, fits the embedding of the empty prompt so that guided sampling stays on it:

    min over null_t  || x*_{t-1} - ddim_step( x_t, eps_u + g (eps_c - eps_u) ) ||^2,      eps_u = eps_theta(x_t, null_t, t)

SDXL's unconditional embedding has two parts, context and pooled: both are fitted. Negative-prompt inversion (Miyake et al.
2023) fits nothing: it puts the picture's own prompt in the place of the empty one, so that eps_u = eps_c and guidance drops
out. What comes out of either stands in for `uncond` when the picture is drawn again, with sliders (slider.py --image).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
import sampler
from formats import slider_files
from unfinished import NOTHING, Unfinished

METHODS = ("null-text", "negative-prompt", "ddim")


@dataclass
class Inversion:
    """What draws B pictures again: sampler.sample(unet, x_T, cond, uncond, ...) with the settings that it was made for."""

    x_T: torch.Tensor  # (B, 4, h, w)
    uncond: list  # for each step, the largest t first: context (B or 1, 77, d), pooled (B or 1, p), time_ids (B or 1, 6)
    evaluations: int = 0  # of the UNet, one a picture; 0: it came from a file


def invert(unet, x_0, cond, uncond, *, alpha_bar, method: str = "null-text", steps=30, guidance: float = 5.0, **fit) -> Inversion:
    """x_0 (B, 4, h, w): the pictures' latents. cond: their prompts' conditioning, of B rows or one for all; uncond: the empty
    prompt's, one row. fit: null_text's settings. ValueError for a method that is not in METHODS."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    cond, ts = sampler.rows(cond, len(x_0)), sampler.timesteps(steps, len(alpha_bar))
    pivot = sampler.ddim_backwards(unet, x_0, cond, alpha_bar=alpha_bar, steps=steps)
    if method == "null-text" and guidance != 1:
        return null_text(unet, pivot, ts, cond, uncond, alpha_bar=alpha_bar, guidance=guidance, **fit)
    return Inversion(pivot[0], [uncond if method == "ddim" else cond] * len(ts), len(ts) * len(x_0))


def step_loss(unet, x_t, t: int, t_next: int, eps_c, null, goal, *, alpha_bar, guidance: float):
    """One guided step with the unconditional embedding `null`, and how far it lands from the pivot: x_{t_next} (B, 4, h, w),
    and the mean squared errors (B,). Mokady et al. 2023, eq. (3)."""
    eps_u = unet(x_t, torch.full((len(x_t),), t, device=x_t.device), *null)
    x_next = sampler.ddim_step(x_t, eps_u + guidance * (eps_c - eps_u), t, t_next, alpha_bar)
    return x_next, (sampler.precise(x_next) - sampler.precise(goal)).square().mean((1, 2, 3))


def null_text(
    unet, pivot, ts: list[int], cond, uncond, *, alpha_bar, guidance: float, inner: int = 10, lr: float = 0.03, enough: float = 1e-5, unfinished=NOTHING
) -> Inversion:
    """Fit the unconditional embeddings to the pivot x*_T ... x*_0 (steps + 1, B, 4, h, w), ts its noise levels.

    inner: optimiser steps at most for each t. lr: Adam's, in units of the standard deviation of the prompts' context, which
    differs from model to model; it falls to half over the steps. enough: the mean squared error below which a t is done; it rises by 2e-5 a
    step, as in the authors' code: late steps have less to gain. All B pictures go on until the worst of them is good enough.
    unfinished: where each t is kept once it is done, for an inversion that is stopped.
    """
    steps, B = len(ts), pivot.shape[1]
    null = [c.float().expand(B, *c.shape[1:]).clone() for c in uncond[:2]]  # context (B, 77, d), pooled (B, p)
    as_used = lambda null: (*(c.to(pivot.dtype) for c in null), uncond[2].expand(B, -1))
    x_t, found, n, lr = pivot[0], [], steps * B, lr * cond[0].float().std().item()

    def fitted(i, x_t, null):
        """The embeddings that lead from x_t to the pivot's next latents, beginning with `null`, and where they lead."""
        t, t_next = ts[i], [*ts, -1][i + 1]
        null = [c.clone().requires_grad_() for c in null]
        opt = torch.optim.Adam(null, lr=lr * (1 - i / (2 * steps)))
        with torch.no_grad():
            eps_c = unet(x_t, torch.full((B,), t, device=x_t.device), *cond)
        for j in range(inner + 1):
            x_next, loss = step_loss(unet, x_t, t, t_next, eps_c, as_used(null), pivot[i + 1], alpha_bar=alpha_bar, guidance=guidance)
            if loss.max().item() < enough + 2e-5 * i or j == inner:
                break
            opt.zero_grad()
            loss.sum().backward()
            opt.step()
        return {"context": null[0], "pooled": null[1], "x_next": x_next, "optimised": torch.tensor(j), "error": loss.max()}

    with tqdm(total=steps, unit="step", desc="null-text") as bar:
        for i in range(steps):
            done = {k: v.to(pivot.device) for k, v in unfinished.part(f"step{i}", lambda: fitted(i, x_t, null)).items()}
            null, x_t = [done["context"].detach(), done["pooled"].detach()], done["x_next"].detach()  # each t goes on from what the last one found
            found.append(as_used(null))
            n += (2 + done["optimised"].item()) * B  # eps_c, and eps_u once more than there were optimiser steps
            bar.set_postfix_str(f"error {done['error'].item():.1e} after {done['optimised'].item()}")
            bar.update()
    return Inversion(pivot[0], found, n)


def evaluations(method: str, steps: int, inner: int = 10) -> int:
    """UNet evaluations for one picture: at most, as null-text inversion may stop early."""
    return steps + (steps * (2 + inner) if method == "null-text" else 0)


# ------------------------------------------------------------------------------------------------ kept for the next time


def kept(path: Path, make) -> Inversion:
    """The Inversion in the file `path`; if there is none, make(unfinished) is called, unfinished being where its parts outlive
    a stop, and its result written there. ValueError, naming the file, if it is damaged."""
    if path.exists():
        stored, _ = slider_files.raw(path)
        if not {"x_T", "context", "pooled", "time_ids"} <= stored.keys() or len({len(stored[part]) for part in ("context", "pooled", "time_ids")}) > 1:
            raise ValueError(f"{path}: holds no inversion: delete it, and it is made again")
        steps = len(stored["context"])
        return Inversion(stored["x_T"], [tuple(stored[part][i] for part in ("context", "pooled", "time_ids")) for i in range(steps)])
    unfinished = Unfinished(path.with_suffix(".unfinished")) if parallel.is_first() else NOTHING  # every process makes the same
    made = make(unfinished)
    stack = lambda part: torch.stack([u[part] for u in made.uncond])  # (steps, B or 1, ...)
    if parallel.is_first():
        slider_files.save(path, {"x_T": made.x_T.contiguous(), "context": stack(0), "pooled": stack(1), "time_ids": stack(2)}, {"kind": "inversion"})
    unfinished.remove()
    return made


def key(model, x_0, *settings) -> str:
    """A name for the inversion of latents x_0 by just this model with just these settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in (x_0, *model.unet.parameters()):
        digest.update(tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
