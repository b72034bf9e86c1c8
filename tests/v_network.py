"""A network that predicts v, made from the miniature, which predicts eps: what a v-prediction SDXL
is to be tested with."""

import json
import shutil

import numpy as np
import torch

from sdxl import MINIATURE, SDXL

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def folder(path, **scheduler):
    """A copy of the miniature's folder whose scheduler config says these things."""
    shutil.copytree(MINIATURE, path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return path


def load(path, plain_alpha_bar, dtype=torch.float32, **scheduler) -> SDXL:
    """The miniature as a v-prediction model with this schedule. plain_alpha_bar: the miniature's
    own."""
    said = {"prediction_type": "v_prediction"} | scheduler
    model = SDXL.load(folder(path, **said), device="cpu", dtype=dtype)
    wrap(model.unet, plain_alpha_bar, model.alpha_bar)
    return model


def wrap(unet, plain, alpha_bar):
    """Make the eps-network `unet`, trained at the noise levels `plain` (T,), one that returns
    v = sqrt(a) eps - sqrt(1 - a) x_0 at those of alpha_bar (T,), x_0 being what its eps implies.

    Each level of alpha_bar is looked up among the plain ones. Where alpha_bar is smaller than all
    of them, x_t is taken to be of the noisiest."""
    if torch.equal(plain, alpha_bar):
        levels = torch.arange(len(plain))
    else:
        ratio = lambda a: (a / (1 - a)).log().numpy()[::-1]  # log of the SNR, rising
        number = np.arange(len(plain), dtype=np.float64)[::-1]
        at = np.interp(ratio(alpha_bar.double()), ratio(plain.double()), number)
        levels = torch.tensor(at[::-1].copy())
    known = np.interp(levels.numpy(), np.arange(len(plain)), plain.double().numpy())
    forward, known = unet.forward, torch.tensor(known)  # alpha_bar as the network takes it to be

    def predict_v(x_t, t, *cond):
        a, a_known = (x.double()[t].view(-1, 1, 1, 1) for x in (alpha_bar, known))
        eps, x = forward(x_t, levels[t], *cond).double(), x_t.double()
        x_0 = (x - (1 - a_known).sqrt() * eps) / a_known.sqrt()
        return (a.sqrt() * eps - (1 - a).sqrt() * x_0).to(unet.conv_in.weight.dtype)

    unet.forward = predict_v
