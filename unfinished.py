"""What an unfinished training leaves behind, so that it can go on: the folder OUT.unfinished, beside the file that it was to write.

Everything in it is written under a temporary name and renamed, so a training may be killed at any moment; `--resume` goes on
from what is there and ends with the very weights, bit for bit, of an uninterrupted run. A finished training removes it.
"""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import parallel
from formats import written

FREE = {"out", "resume", "overwrite", "dry_run", "preview", "probe", "device", "checkpointing", "like", "lr"}  # may differ when a training goes on


class Unfinished:
    """folder: where it is kept, made when there is something to keep; None keeps nothing. settings: of the training, kept with it."""

    def __init__(self, folder: Path | None = None, settings: dict | None = None):
        self.folder, self.settings = folder, settings

    def write(self, path: Path, write):
        assert self.folder
        if self.settings is not None and parallel.is_first():  # before anything else is there
            text, self.settings = json.dumps(self.settings, indent=1), None
            written(self.folder / "settings.json", lambda p: p.write_text(text))
        written(path, write)

    def part(self, name: str, make) -> dict[str, torch.Tensor]:
        """The tensors that make() returns, on the CPU, made only once: afterwards they come from the folder. Of several
        processes each has parts of its own."""
        path = self.folder and self.folder / f"{name}{parallel.name().replace(' in process ', '_')}.safetensors"
        if path is None or not path.exists():
            tensors = {k: v.detach().cpu().contiguous() for k, v in make().items()}
            if path:
                self.write(path, lambda p: save_file(tensors, p))
            return tensors
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged ({error}): delete it, and that part is made again") from None

    def save(self, state: dict):
        """state: the same in all processes; the first one writes it, so that none can go on from another step than the others."""
        if self.folder and parallel.is_first():
            self.write(self.folder / "state.pt", lambda p: torch.save(state, p))

    def load(self) -> dict | None:
        """What `save` was last given, on the CPU; None if nothing was."""
        if self.folder is None or not (path := self.folder / "state.pt").exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # it may have been made on a device that is not here
        except Exception as error:  # a damaged one can raise anything
            raise ValueError(f"{path}: damaged ({type(error).__name__}): delete it, and training starts from its first step") from None

    def remove(self):
        if self.folder and parallel.is_first():
            shutil.rmtree(self.folder, ignore_errors=True)


NOTHING = Unfinished()
HINT = "the same command with --resume goes on with what is kept by then"


def begin(args, out: Path) -> Unfinished:
    """The folder for what the file `out` is to become, new or, with --resume, that of the training that goes on.

    Raises ValueError where something would be lost: `out` is there already, or its preview, or an unfinished training; and where
    the unfinished training was of something else.
    """
    folder = out.with_name(out.name + ".unfinished")
    if args.dry_run:
        return NOTHING
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in FREE} | {"nproc_per_node": parallel.processes()}  # who made which part
    if args.resume and (folder / "settings.json").exists():
        return same(folder, settings)
    if parallel.is_first():  # the others would see what the first one has made meanwhile
        for path in [out] + [out.with_suffix(".png")] * bool(getattr(args, "preview", 0)):
            if path.exists() and not args.overwrite:
                raise ValueError(f"{path}: is there already: --overwrite replaces it")
        if args.resume:
            print(f"{folder}: nothing is kept there yet: this starts from the beginning")
        elif folder.exists() and not args.overwrite:
            raise ValueError(f"{folder}: an unfinished training is there: --resume goes on with it, --overwrite starts anew")
        Unfinished(folder).remove()
    return Unfinished(folder, settings)


def same(folder: Path, settings: dict) -> Unfinished:
    """The folder of something begun with just these settings, or a new one. ValueError if it was begun with others."""
    if not (folder / "settings.json").exists():
        return Unfinished(folder, settings)
    before = json.loads((folder / "settings.json").read_text())
    if other := [k for k in settings if json.loads(json.dumps(settings[k])) != before.get(k)]:
        raise ValueError(
            f"{folder}: was begun with --{other[0].replace('_', '-')} {before.get(other[0])}, not {settings[other[0]]}: delete it, or name another --out"
        )
    return Unfinished(folder)


@contextlib.contextmanager
def stoppable():
    """with stoppable() as stop: ... Ctrl-C, or a termination, makes stop() true instead of breaking off in the middle of a step;
    a second one breaks off. (Signals reach the main thread alone.)"""
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for s, old in before.items():
            signal.signal(s, old)
