"""Inversions kept in files, so that a picture that is edited again is not inverted again."""

import hashlib
from pathlib import Path

import torch

from formats import slider_files
from invert import Inversion
from support import distributed
from support.checkpoint import NO_CHECKPOINT, Checkpoint

PARTS = ("context", "pooled", "time_ids")  # of the unconditional embedding of a step


def cached(path: Path, make) -> Inversion:
    """The Inversion in the file `path`. If there is none, make(remember) is called, `remember`
    being invert.null_text's, and its result is written there. ValueError, naming a damaged
    file."""
    if path.exists():
        stored, _ = slider_files.load_tensors(path)
        complete = {"x_T", *PARTS} <= stored.keys()
        if not complete or len({len(stored[part]) for part in PARTS}) > 1:
            raise ValueError(f"{path}: holds no inversion: delete it, and it is made again")
        return Inversion(stored["x_T"], list(zip(*(stored[part] for part in PARTS))))
    # Every process makes the same; the first one keeps it.
    main_process = distributed.is_main_process()
    checkpoint = Checkpoint(path.with_suffix(".checkpoint")) if main_process else NO_CHECKPOINT
    made = make(checkpoint.remember)
    if main_process:
        tensors = {part: torch.stack(rows) for part, rows in zip(PARTS, zip(*made.uncond))}
        tensors["x_T"] = made.x_T.contiguous()
        slider_files.save_tensors(path, tensors, {"kind": "inversion"})
    checkpoint.remove()
    return made


def cache_key(model, x_0, *settings) -> str:
    """A name for what just this model makes of x_0, latents or others, with these settings."""
    settings = (*settings, model.prediction, model.spacing)
    digest = hashlib.sha256(repr(settings).encode())
    networks = (model.unet, *model.text_encoders)
    weights = (p for network in networks for p in network.parameters())
    for tensor in (x_0, model.alpha_bar, *weights):
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
