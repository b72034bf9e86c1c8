"""Several processes, one on each GPU:  torchrun --nproc-per-node 2 train_text.py ...

Each process holds the whole model. Of a list of work each takes every N-th item (`shard`), and
afterwards all hold all results in the order of the list (`all_gather`). Gradients are added up
(`all_reduce`). With one process these do nothing.
"""

import os

import torch
import torch.distributed as dist

# transformers imports this too, and what is the default group at that moment stays in the defaults
# of its functions: the group could then not be destroyed, and its threads now and then aborted the
# process as it ended. Imported here, before there is a group, the defaults hold None.
import torch.distributed.nn.functional  # noqa: F401


def start():
    """Join the other processes, if torchrun started this one. ValueError for too few GPUs."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if number >= gpus:
                remedy = f"--nproc-per-node {gpus}, or CUDA_VISIBLE_DEVICES= for the CPU"
                raise ValueError(f"there are only {gpus} GPUs: {remedy}")
            torch.cuda.set_device(number)  # "cuda" then means its own GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # with --device cpu too


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """True in the one process that prints and writes files."""
    return rank() == 0


def process_name() -> str:
    """For messages: " in process 1" where it is not the only one, counted from 0."""
    return f" in process {rank()}" if world_size() > 1 else ""


def shard(items):
    """This process's share of a list or tensor: every N-th item, from its rank on. Maybe none."""
    return items[rank() :: world_size()]


def all_gather(results, n: int):
    """Results for this process's share of n items -> those for all n, in their order. `results` is
    a list with one entry an item, or a dict of tensors with one row an item."""
    if world_size() == 1:
        return results
    is_list = isinstance(results, list)
    shards = [None] * world_size()
    dist.all_gather_object(shards, results if is_list else {k: v.cpu() for k, v in results.items()})
    if is_list:
        return [shards[i % len(shards)][i // len(shards)] for i in range(n)]
    out = {}
    for key, first in shards[0].items():  # the first process always has a share
        out[key] = first.new_empty(n, *first.shape[1:])
        for i, part in enumerate(shards):
            if part:
                out[key][i :: len(shards)] = part[key]
        out[key] = out[key].to(results[key].device if results else "cpu")
    return out


def wait():
    """Until every process has come this far."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def all_reduce(tensors: list) -> list:
    """Replace each tensor by its sum over all processes, in place, in one message."""
    if world_size() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view(t.shape))
    return tensors
