"""Checkpoints: the folder OUT.checkpoint that a training keeps beside the file OUT it is to write.

Everything in it is written under a temporary name and renamed, so a training may be killed at any
moment. `--resume` goes on from it, and ends with the very weights of a training without a break: on
a CPU bit for bit, on a GPU as nearly as two trainings there agree. A training that is done removes
it."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from formats import first_line, write_atomically
from formats.hashes import files_hash
from formats.weights import read_json
from support import distributed

# Options that may differ when a training is resumed.
MAY_CHANGE = {"out", "resume", "overwrite", "dry_run", "preview", "probe", "device"}
MAY_CHANGE |= {"checkpointing", "like", "lr", "strict", "no_cuda_graphs"}
RESUME_HINT = "the same command with --resume goes on from the last checkpoint"


class Checkpoint:
    """folder: made when there is something to keep; None keeps nothing. settings: of the training,
    kept with it."""

    def __init__(self, folder: Path | None = None, settings: dict | None = None):
        self.folder, self.settings = folder, settings

    def write(self, path: Path, write):
        assert self.folder
        if self.settings is not None and distributed.is_main_process():  # before anything else
            text, self.settings = json.dumps(self.settings, indent=1), None
            write_atomically(self.folder / "settings.json", lambda p: p.write_text(text))
        write_atomically(path, write)

    def remember(self, name: str, make) -> dict[str, torch.Tensor]:
        """The tensors that make() returns, on the CPU. They are made once: afterwards they come
        from the folder. Of several processes each has its own."""
        if self.folder is None:
            return {k: v.detach().cpu() for k, v in make().items()}
        process = f"_{distributed.rank()}" if distributed.world_size() > 1 else ""
        path = self.folder / f"{name}{process}.safetensors"
        if not path.exists():
            tensors = {k: v.detach().cpu().contiguous() for k, v in make().items()}
            self.write(path, lambda p: save_file(tensors, p))
            return tensors
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: damaged ({error}): delete it, and that part is made again"
            ) from None

    def remember_number(self, name: str, make) -> int:
        """The same for the number that make() returns."""
        return int(self.remember(name, lambda: {name: torch.tensor(make())})[name])

    def save(self, state: dict):
        """state: the same in all processes. The first one writes it, so that all go on from one."""
        if self.folder and distributed.is_main_process():
            self.write(self.folder / "state.pt", lambda p: save_state(state, p))

    def load(self) -> dict | None:
        """What `save` was last given, on the CPU; None if nothing was."""
        if self.folder is None or not (path := self.folder / "state.pt").exists():
            return None
        try:
            # On the CPU: it may have been made on a device that is not here.
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged one can raise anything
            kind = type(error).__name__
            raise ValueError(
                f"{path}: damaged ({kind}): delete it, and training starts from its first step"
            ) from None

    def remove(self):
        if self.folder and distributed.is_main_process():
            shutil.rmtree(self.folder, ignore_errors=True)


def save_state(state: dict, path: Path):
    """torch.save, with an OSError where the disk is full (findings/torch_save_full_disk.sh)."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        what = f"could not be written; is the disk full? ({first_line(error)})"
        raise OSError(f"{path}: {what}") from None


NO_CHECKPOINT = Checkpoint()


def open_checkpoint(args, out: Path, groups: list[list[Path]] | None = None) -> Checkpoint:
    """The checkpoint of the training that is to write `out`: a new one, or with --resume the one
    that goes on. groups: of pictures that it trains on. ValueError where something would be lost
    (`out`, its preview or a checkpoint is there already), and where the checkpoint is of another
    training."""
    folder = out.with_name(out.name + ".checkpoint")
    if args.dry_run:
        return NO_CHECKPOINT
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in MAY_CHANGE}
    if groups:
        settings["pictures_hash"] = files_hash(file for files in groups for file in files)
    if args.resume and (folder / "settings.json").exists():
        return resume_or_new(folder, settings)
    if distributed.is_main_process():  # the others would see what the first has made meanwhile
        for path in [out] + [out.with_suffix(".png")] * bool(getattr(args, "preview", 0)):
            if path.exists() and not args.overwrite:
                raise ValueError(f"{path}: is there already: --overwrite replaces it")
        if args.resume:
            print(f"{folder}: no checkpoint there yet: this starts from the beginning")
        elif folder.exists() and not args.overwrite:
            remedy = "--resume goes on from it, --overwrite starts anew"
            raise ValueError(f"{folder}: a checkpoint is there: {remedy}")
        Checkpoint(folder).remove()
    distributed.wait()  # until it is gone
    return Checkpoint(folder, settings | {"nproc_per_node": distributed.world_size()})


def resume_or_new(folder: Path, settings: dict) -> Checkpoint:
    """The checkpoint of something begun with just these settings and as many processes, or a new
    one. ValueError if it was begun with others."""
    settings = settings | {"nproc_per_node": distributed.world_size()}
    if not (folder / "settings.json").exists():
        return Checkpoint(folder, settings)
    before = read_json(folder / "settings.json")
    for name, value in json.loads(json.dumps(settings)).items():
        if value != before.get(name):
            option = f"--{name.replace('_', '-')} {before.get(name)}, not {value}"
            changed = {"pictures_hash": "other pictures in these folders"}
            changed["weights"] = "another model of this name, or merged with another file"
            what = changed.get(name, option)
            raise ValueError(f"{folder}: was begun with {what}: delete it, or name another --out")
    return Checkpoint(folder)


@contextlib.contextmanager
def deferred_interrupt():
    """with deferred_interrupt() as stop: ... Ctrl-C, or a termination, makes stop() true in the
    place of breaking off in the middle of a step; a second one breaks off. (Main thread alone.)"""
    received = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for s, old in before.items():
            signal.signal(s, old)
