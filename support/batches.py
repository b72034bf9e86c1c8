"""Work done a batch at a time: shared between processes, kept for a resumed run, with progress."""

import torch
from tqdm import tqdm

from support import distributed


def in_batches(make, n: int, batch: int, *, remember=None, name="", desc=None, device=None):
    """make(rows (b,)) -> {key: tensor (b, ...)}, called for the rows 0 ... n - 1 a batch at a time.
    Returns {key: tensor (n, ...)}, on `device` or where make put them.

    Several processes share the rows, and all of them return everything. remember: called as
    remember(f"{name}{first row}", make), so that a run that was stopped goes on
    (checkpoint.Checkpoint.remember). desc: of a progress bar; None shows none.
    """
    remember = remember or (lambda name, make: make())
    rows = distributed.shard(torch.arange(n))
    batches = rows.split(batch) if len(rows) else []
    made = []
    for some in tqdm(batches, unit="batch", desc=desc, disable=desc is None):
        made.append(remember(f"{name}{int(some[0])}", lambda: make(some)))
    keys = made[0] if made else []
    to = lambda x: x if device is None else x.to(device)
    return distributed.all_gather({k: torch.cat([to(part[k]) for part in made]) for k in keys}, n)
