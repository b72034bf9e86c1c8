"""Several processes, one on each GPU:  torchrun --nproc-per-node 2 train_text.py ...

Each process holds the whole model. Of a list of work each takes every N-th item (`mine`) and afterwards all hold all
results, in the order of the list (`gather`); gradients are added up (`add_up`). With one process these do nothing.
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401

# Not used here, but transformers imports it, and what is the default group at that moment stays in the defaults of its
# functions: stop() could not destroy the group, and its threads now and then aborted the process as it ended. Imported
# here, before start(), they hold None.


def start():
    """Join the other processes, if torchrun started this one."""
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # so that "cuda" means this process's own GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")  # both: --device cpu may be given


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """True in the one process that prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def name() -> str:
    """For messages: " in process 1" where it is not the only one, counted from 0."""
    return f" in process {dist.get_rank()}" if processes() > 1 else ""


def mine(items):
    """This process's share of a list or tensor: items 0, N, 2N, ... of the first of N processes; maybe none."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather(results, n: int):
    """The results (a list or a tensor, one row an item) for this process's share of n items -> of all n, in their order."""
    if processes() == 1:
        return results
    parts = [None] * processes()
    dist.all_gather_object(parts, results.cpu() if torch.is_tensor(results) else results)
    if not torch.is_tensor(results):
        return [parts[i % len(parts)][i // len(parts)] for i in range(n)]
    out = results.new_empty(n, *results.shape[1:])
    for i, part in enumerate(parts):
        out[i :: len(parts)] = part.to(out.device)
    return out


def add_up(tensors: list) -> list:
    """Replace each tensor by its sum over all processes, in place, in one message."""
    if processes() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view(t.shape))
    return tensors
