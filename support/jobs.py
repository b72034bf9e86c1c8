"""Several processes at once on one machine's cores."""

import os
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch


def at_once(n: int, function, tasks):
    """Yields (task, function(*task)) as they finish, n at a time, for functions that wait for a
    process that they start. Each has its share of the cores. After a failure no more are begun."""
    if n == 1:
        yield from ((task, function(*task)) for task in tasks)
        return
    threads = max(1, (os.cpu_count() or 1) // n)
    torch.set_num_threads(threads)  # what `function` computes itself, too
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ThreadPoolExecutor(n) as pool:
        running = {pool.submit(function, *task): task for task in tasks}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
