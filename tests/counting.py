from contextlib import contextmanager

import torch


@contextmanager
def counted(unet):
    """with counted(unet) as n: ... counts the samples that pass through `unet`: n["frozen"], and
    n["trained"] with gradients."""
    n = {"frozen": 0, "trained": 0}

    def count(module, inputs):
        n["trained" if torch.is_grad_enabled() else "frozen"] += len(inputs[0])

    handle = unet.register_forward_pre_hook(count)
    try:
        yield n
    finally:
        handle.remove()
