"""Work done a batch at a time: shared between processes, kept for a resumed run, with progress."""

import torch
from tqdm import tqdm

from support import distributed

# What a sample takes on its way through the UNet, in bytes for each place of its latents, each
# channel of the first level and each byte of the dtype (python -m bench.gpu): without gradients,
# in training, and in training with --checkpointing.
FROZEN, TRAINED, CHECKPOINTED = 16, 540, 80
SPACE = 3100  # in train_space.py, with VAE and CLIP: 7.6 GiB at 512 pixels (bench.unet, on a CPU)
MAX_SAMPLES = 64  # at once: by then a GPU has long been busy (docs/speed.md)


def free_memory(device) -> int:
    """Bytes of a GPU that nothing holds yet."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def sample_bytes(unet, shape, kind=FROZEN) -> int:
    """Of one sample with latents of `shape` (4, h, w) on its way through the UNet."""
    element = next(unet.parameters()).element_size()
    return kind * shape[-2] * shape[-1] * unet.config["block_out_channels"][0] * element


def samples_at_once(unet, shape, on_cpu: int) -> int:
    """How many samples go through the frozen UNet together: on a GPU as many as fit into half of
    its free memory, each twice for guidance, and at most MAX_SAMPLES; elsewhere on_cpu."""
    weight = next(unet.parameters())
    if not weight.is_cuda:
        return on_cpu
    fit = free_memory(weight.device) // (4 * sample_bytes(unet, shape))
    return max(1, min(MAX_SAMPLES, fit))


def in_batches(make, n: int, batch: int, *, remember=None, name="", desc=None, device=None):
    """make(rows (b,)) -> {key: tensor (b, ...)}, called for the rows 0 ... n - 1 a batch at a time.
    Returns {key: tensor (n, ...)}, on `device` or where make put them.

    Several processes share the rows, and all of them return everything. remember: called as
    remember(f"{name}{first row}_{rows}", make), so that a run that was stopped goes on
    (checkpoint.Checkpoint.remember). desc: of a progress bar; None shows none.
    """
    remember = remember or (lambda name, make: make())
    rows = distributed.shard(torch.arange(n))
    batches = rows.split(batch) if len(rows) else []
    made = []
    for some in tqdm(batches, unit="batch", desc=desc) if desc else batches:
        of_batch = f"{name}{int(some[0])}_{len(some)}"
        made.append(remember(of_batch, lambda: make(some)))
    keys = made[0] if made else []
    to = lambda x: x if device is None else x.to(device)
    return distributed.all_gather({k: torch.cat([to(part[k]) for part in made]) for k in keys}, n)
