"""Runs any trainer's script with a seed, and notes the cost at each slider file that it writes:

    python driver.py LOG SEED SCRIPT [its arguments]

A line of LOG is JSON: the file (by the name that it ends up with), the seconds since the UNet's
first call, and the samples that have passed through the UNet, without gradients ("frozen") and with
("trained"). Imports nothing of this project: it runs in the trainer's own environment."""

import json
import os
import random
import runpy
import sys
import time

import numpy as np
import safetensors.torch
import torch

log, seed, script = sys.argv[1], int(sys.argv[2]), os.path.abspath(sys.argv[3])
n, started = {"frozen": 0, "trained": 0}, []


def count(module, inputs):
    if type(module).__name__ in ("UNet2DConditionModel", "UNet"):
        if not started:
            started.append(time.time())
        n["trained" if torch.is_grad_enabled() else "frozen"] += len(inputs[0])


def noting(save):
    """`save`, a function (tensors, file, ...), with a line in the log when it is done."""

    def save_and_note(tensors, file, *args, **kwargs):
        save(tensors, file, *args, **kwargs)
        name = os.path.abspath(file).removesuffix(".tmp")  # ours is renamed when it is whole
        if started and os.path.basename(name) != "optimizer.pt":
            row = {"file": name, "seconds": time.time() - started[0], **n}
            with open(log, "a") as f:
                f.write(json.dumps(row) + "\n")

    return save_and_note


torch.nn.modules.module.register_module_forward_pre_hook(count)
torch.save = noting(torch.save)
safetensors.torch.save_file = noting(safetensors.torch.save_file)
random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
sys.argv = [script, *sys.argv[4:]]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
