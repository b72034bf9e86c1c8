#!/usr/bin/env bash
# torch 2.13.0, numpy 2.2.6, on Linux.
#
# On a full disk (here /dev/full, which refuses every byte as one does) open().write raises OSError
# 28, no space left on device. torch.save to a path raises RuntimeError, whose message names neither
# the file nor the reason. So `except OSError` around the saving of a checkpoint does not see the
# commonest way for it to fail.
#
# Seen:
#     open().write: OSError: [Errno 28] No space left on device
#     torch.save: RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos
#
# It exits 0 while this is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
venv/bin/python -W ignore - <<'PROGRAM'
import torch

state = {"x": torch.zeros(1_000_000)}
ways = {
    "open().write": lambda: open("/dev/full", "wb", buffering=0).write(bytes(100)),
    "torch.save": lambda: torch.save(state, "/dev/full"),
}
for name, save in ways.items():
    try:
        save()
        raise SystemExit(f"{name}: no error")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:60]}")
        assert isinstance(error, OSError) == (name == "open().write"), error
        assert ("No space" in str(error)) == (name == "open().write"), error
PROGRAM
