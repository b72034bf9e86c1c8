"""What the command lines share: options that choose the model, and errors as one clear line."""

import argparse
import contextlib
import difflib
import math
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from formats import slider_files, write_atomically
from formats.weights import is_out_of_memory
from sdxl import MINIATURE, SDXL, best_device
from support import distributed, graphs
from support.merge import DTYPES, merge_files


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, not the whole usage before it. Of a misspelt option it says that first, not
        that another one is missing."""
        for name in (word.split("=")[0] for word in sys.argv[1:]):
            if name.startswith("--") and name not in self._option_string_actions:
                close = difflib.get_close_matches(name, self._option_string_actions, 1)
                meant = f": did you mean {close[0]}?" if close else ""
                message = f"unknown option {name}{meant}"
                break
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def plain_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose option names may not be shortened, so that a typo is an error."""
    spec = sys.modules["__main__"].__spec__  # of python -m
    prog = spec and f"python -m {spec.name}"
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p = Parser(prog=prog, description=description, **style)
    # So that "--scales -2,0,2" is a value, not an option.
    p._negative_number_matcher = re.compile(r"^-[\d.][-+\d.,eE]*$")
    return p


def model_parser(description: str) -> argparse.ArgumentParser:
    """The same with the options that choose the model."""
    p = plain_parser(description)
    model = "SDXL folder, .safetensors checkpoint or Hub id (default: the bundled miniature)"
    p.add_argument("--model", default=str(MINIATURE), help=model)
    base = "SDXL folder or Hub id that lends a --model in one file its tokenizers and what it lacks"
    p.add_argument("--base", help=base)
    merge = "LoRA to merge into the model first (weight 1 if none is given); may be repeated"
    file = dict(type=file_and_scale, metavar="FILE[:WEIGHT]")
    p.add_argument("--merge", action="append", default=[], help=merge, **file)
    strict = "refuse a LoRA file of which something would be left out, instead of a warning"
    p.add_argument("--strict", action="store_true", help=strict)
    p.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best there is")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    prediction = "what the UNet predicts, noise (epsilon) or v (default: as the model says)"
    p.add_argument("--prediction", choices=["epsilon", "v"], help=prediction)
    text_on_cpu = "keep the text encoders off the GPU: 1.5 GiB less for SDXL"
    p.add_argument("--text-on-cpu", action="store_true", help=text_on_cpu)
    no_graphs = "launch GPU kernels one by one, without CUDA graphs: slower, a little less memory"
    p.add_argument("--no-cuda-graphs", action="store_true", help=no_graphs)
    return p


def parse_args(p: argparse.ArgumentParser):
    """p.parse_args(), but with --like FILE the settings that the slider in FILE was trained with
    stand in for everything that the command line leaves out, the output's name aside."""
    like = "train as this slider file was: its settings for all that is not given here"
    p.add_argument("--like", metavar="FILE", help=like)
    if not any(word.split("=")[0] == "--like" for word in sys.argv[1:]):
        return p.parse_args()
    actions = [a for a in p._actions if a.dest != "help"]
    for action in actions:
        action.required = False
    not_given = argparse.Namespace(**{action.dest: None for action in actions})
    args = p.parse_args(namespace=not_given)
    _, metadata = slider_files.load_tensors(Path(args.like))
    if "settings" not in metadata:
        raise ValueError(f"{args.like}: does not say how it was trained")
    settings = slider_files.parse_json_object(metadata["settings"], args.like)
    if unknown := settings.keys() - {action.dest for action in actions}:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{args.like}: was trained by another script: {names} mean nothing here")
    # Of files and folders it holds the names alone. A stranger's file names them: none is opened.
    folders = [action.dest for action in actions if "DIR" in (action.metavar or "")]
    for name in ("model", "base", "merge", "prediction", *folders):
        if settings.pop(name, None) and getattr(args, name) is None:
            remedy = "name it here too"
            raise ValueError(f"{args.like}: was trained with a --{name} of its own: {remedy}")
    settings.pop("device", None)
    for action in actions:
        if getattr(args, action.dest) is None:
            value = settings.get(action.dest, action.default)
            if action.type and isinstance(value, str | int | float):
                try:
                    value = action.type(str(value))
                except (ValueError, argparse.ArgumentTypeError):
                    odd = f"--{action.dest.replace('_', '-')} {value!r}"
                    raise ValueError(f"{args.like}: its settings say {odd}") from None
            setattr(args, action.dest, value)
    return args


def fast_dtype() -> str | None:
    """ "bfloat16" where this processor is quick at it: AVX512 or newer. Elsewhere None: it would
    take many times as long as float32."""
    return None if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") else "bfloat16"


def load_model(args, vae: bool = True) -> SDXL:
    """The model that the options name, with what --merge names merged into it."""
    if args.dtype == "bfloat16" and (args.device or best_device()) == "cpu" and not fast_dtype():
        slow = "this processor is slow at bfloat16: without --dtype it is many times faster"
        warnings.warn(slow, stacklevel=2)
    graphs.enabled = not args.no_cuda_graphs
    options = dict(device=args.device, dtype=DTYPES.get(args.dtype), base=args.base)
    options["prediction"] = args.prediction
    model = SDXL.load(args.model, vae=vae, text_on_cpu=args.text_on_cpu, **options)
    if args.strict:
        warnings.simplefilter("error", slider_files.LeftOut)
    files = [(path, 1.0 if weight is None else weight) for path, weight in args.merge]
    rounding = merge_files(model, files)  # all at once, rounded once
    dtype = str(model.dtype).removeprefix("torch.")
    if warning := rounding.warning(dtype, "--dtype"):
        warnings.warn(f"--merge: {warning}", stacklevel=2)
    return model


def file_and_scale(text: str) -> tuple[str, float | None]:
    """'age.safetensors:1.5' -> ('age.safetensors', 1.5); without a scale (..., None). For
    argparse's type=."""
    if not text:
        raise argparse.ArgumentTypeError("no file is named")
    path, colon, scale = text.rpartition(":")
    try:
        return (path, number(scale)) if colon and path else (text, None)
    except argparse.ArgumentTypeError:
        if Path(path).exists() and not Path(text).exists():
            odd = f"{text}: {scale!r} after the colon is no number"
            raise argparse.ArgumentTypeError(odd) from None
        return text, None


def file_scale_start(text: str) -> tuple[str, float | None, float | None]:
    """'age.safetensors:1.5@0.5' -> ('age.safetensors', 1.5, 0.5); None for what is not given. For
    argparse's type=."""
    rest, sign, start = text.rpartition("@")
    try:
        rest, start = (rest, float(start)) if sign and rest else (text, None)
    except ValueError:
        rest, start = text, None
    return *file_and_scale(rest), start


def output_file(path, ending: str = "") -> Path:
    """The path of a file to be written in the end. ValueError, before any work is done, if it
    could not be, or if its name does not end with `ending`."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; a file was to be named")
    if not path.name.endswith(ending):
        raise ValueError(f"{path}: is to be a {ending} file: name it so")
    output_folder(path.parent)
    return path


def output_folder(path) -> Path:
    """The path of a folder to be written into, made if it is not there. ValueError if it cannot
    be."""
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path}: is a file; --out names a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be made a folder to write to ({error.strerror})"
        raise ValueError(f"{path}: {reason}: name another place") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path}: cannot be written to: name another place")
    return path


def model_options(args) -> str:
    """The options that name the model, as they were given: for a command that is suggested."""
    given = [("model", args.model)] if args.model != str(MINIATURE) else []
    given += [("base", args.base)] if args.base else []
    given += [("prediction", args.prediction)] if args.prediction else []
    for path, weight in args.merge:
        given.append(("merge", path if weight is None else f"{path}:{weight:g}"))
    return "".join(f" --{name} {value}" for name, value in given)


def write_text(path, text: str):
    """Write a file whole: under a temporary name, then renamed."""
    write_atomically(output_file(path), lambda p: p.write_text(text, encoding="utf-8"))


def numbers(text: str, kind=float) -> list:
    """'-2,0,2' -> [-2.0, 0.0, 2.0]. For argparse's type=."""
    try:
        found = [kind(v) for v in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,1,2")
    return found


def number(text: str) -> float:
    """'0.5' -> 0.5, a finite number. For argparse's type=."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1. For argparse's type=."""
    if not 0 <= number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def guidance(text: str) -> float:
    """A number above 0. For argparse's type=."""
    if not number(text) > 0:
        why = "the prompt would count for nothing; 1 is without guidance"
        raise argparse.ArgumentTypeError(f"at {text} {why}")
    return float(text)


def seed(text: str) -> int:
    """A whole number that every generator takes, with room for what is made of it. For argparse's
    type=."""
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def seed_list(text: str) -> list[int]:
    """'0,5,7' or '0-63' -> a list of seeds, for argparse's type=."""
    first, _, last = text.partition("-")
    if first.strip().isdigit() and last.strip().isdigit():
        found = list(range(int(first), int(last) + 1))
    else:
        found = [int(v) if v.isdigit() else -1 for v in text.replace(",", " ").split()]
    if not found or min(found) < 0 or max(found) >= 2**63:
        example = "whole numbers from 0 on, such as 0,5,7 or 0-3"
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {example}")
    return found


def steps_or_levels(text: str) -> int | list[int]:
    """'30' -> 30, a number of steps; '999,749,499,249' -> noise levels. For argparse's type=."""
    found = numbers(text, int)
    return found[0] if len(found) == 1 else found


def run(main, when_stopped: str = ""):
    """Run main(). Whatever the user can mend becomes one line and exit status 2, without a
    traceback. when_stopped: said after Ctrl-C."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if "LOCAL_RANK" not in os.environ:
        # A termination is like Ctrl-C. torchrun's own must end a process that waits for others.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    mendable = (ValueError, OSError, FloatingPointError, SafetensorError)
    try:
        distributed.start()
        with contextlib.ExitStack() as quiet:
            if not distributed.is_main_process():  # of several processes only the first one talks
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            main()
        distributed.stop()
    except (*mendable, RuntimeError, MemoryError) as error:
        line = " ".join(str(error).split())
        if is_out_of_memory(error):
            options = "--text-on-cpu, --checkpointing in training, --vae-tile 512 in drawing"
            less = f"a smaller --size or --batch needs less, and so do {options}"
            line = f"not enough memory: {less} ({line})"
        elif not isinstance(error, mendable):
            raise
        print(f"error{distributed.process_name()}: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        line = str(stop) or "; ".join(filter(None, ["stopped", when_stopped]))
        print(line, file=sys.stderr)
        sys.exit(130)
