"""Every reader against broken and hostile files:

    python -m bench.fuzz --cases 2000

Good files of each kind are truncated, have bits flipped and pieces replaced, get other dtypes and
shapes, enormous declared sizes, names with paths in them, pickles with code. A reader may succeed,
or raise ValueError (one line for the user); anything else is a finding: another exception, more
than --slow seconds, more than --memory MiB, code that ran, a file outside that was touched."""

import collections
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save_file

import invert
import lora
import slider as slider_command
from formats import slider_files, weights
from sdxl import MINIATURE, SDXL
from support import cli, cost, images, inversions
from support.checkpoint import Checkpoint
from support.options import default_help

CANARY = "code_that_ran"
PICTURES = ("png", "jpg", "gif", "bmp", "tif", "webp")


class Evil:
    """Unpickled, it would make the file CANARY in the working directory."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        call = f"open({CANARY!r}, 'w')"
        return {
            "eval": (eval, (call,)),
            "exec": (exec, (call,)),
            "system": (os.system, (f"touch {CANARY}",)),
            "open": (open, (CANARY, "w")),
        }[self.how]


# ------------------------------------------------------------------------------ ways to break bytes


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 3, 20])):
        within = min(len(data), rng.choice([64, 4096, len(data)]))
        at = rng.randrange(within)
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def replaced(data, rng):
    data, n = bytearray(data), rng.choice([1, 8, 200])
    at = rng.randrange(max(1, min(len(data), rng.choice([16, 2048, len(data)])) - n))
    data[at : at + n] = rng.choice([rng.randbytes(n), b"\x00" * n, b"\xff" * n])
    return bytes(data)


def doubled(data, rng):
    return data + data[: rng.randrange(1, len(data))]


def nothing(data, rng):
    texts = [b"", b"\x00", b"{}", b"null", b"[1]", rng.randbytes(500), b"<html>404</html>"]
    return rng.choice(texts)


def pickled(data, rng):
    """A pickle with code, as it is or as PyTorch's zip."""
    evil = Evil(rng.choice(["eval", "exec", "system", "open"]))
    if rng.random() < 0.5:
        return pickle.dumps(rng.choice([evil, {"lora": evil}, [evil]]))
    out = io.BytesIO()
    torch.save(rng.choice([evil, {"state_dict": {"x": evil}}]), out)
    return out.getvalue()


ANY = [truncated, flipped, replaced, doubled, nothing, pickled]


def split_header(data):
    """The header of safetensors, and the bytes after it."""
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(header, rest) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def any_tensor(header, rng) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


def enormous(data, rng):
    """A header, a tensor or a shape that is said to be enormous."""
    if rng.random() < 0.3:
        return struct.pack("<Q", rng.choice([2**63, 2**40, 2**31, len(data) * 2])) + data[8:]
    header, rest = split_header(data)
    tensor = header[any_tensor(header, rng)]
    tensor["shape"] = rng.choice([[2**40], [2**31, 2**31], [10**6, 10**6], [-1, 5], [0], []])
    if rng.random() < 0.5:
        tensor["data_offsets"] = [0, rng.choice([2**62, 2**33, len(rest) + 1])]
    return with_header(header, rest)


def renamed(data, rng):
    """Names with paths in them, very long ones, none."""
    header, rest = split_header(data)
    old = any_tensor(header, rng)
    names = ["../../etc/passwd", "/etc/passwd", "a" * 100_000, ""]
    names += ["lora_unet_../x.lora_down.weight", "\x00", "unet.\u202e"]
    tensor = header.pop(old)
    header[rng.choice(names)] = tensor
    return with_header(header, rest)


def retyped(data, rng):
    """Other dtypes, NaN and infinite numbers, transposed and cut tensors, metadata that is no
    JSON."""
    tensors = load(data)
    metadata = split_header(data)[0].get("__metadata__", {})
    name = rng.choice(list(tensors))
    change = rng.choice(["dtype", "nan", "shape", "drop", "double", "metadata"])
    t = tensors[name]
    if change == "dtype":
        dtypes = [torch.int64, torch.bool, torch.float64, torch.int8, torch.uint8]
        tensors[name] = t.to(rng.choice(dtypes))
    elif change == "nan":
        if t.is_floating_point():
            value = rng.choice([float("nan"), float("inf"), 1e4])
            tensors[name] = torch.full_like(t, value)
    elif change == "shape":
        half = rng.random() < 0.5
        cut = lambda: t.flatten()[: max(1, t.numel() // 2)].clone()
        tensors[name] = cut() if half else t.unsqueeze(0).repeat(2, *[1] * t.ndim)
    elif change == "drop":
        del tensors[name]
    elif change == "double":
        tensors[name + "x"] = t.clone()
    else:
        texts = ["{", "[" * 5000, "null", "1e999", '{"range": "x"}', '{"range": [1]}', ""]
        key = rng.choice(["settings", "probe", "meter", "prompts"])
        metadata |= {key: rng.choice(texts)}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    metadata = {k: str(v) for k, v in metadata.items()} or None
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        save_file(tensors, f.name, metadata)
        return Path(f.name).read_bytes()


SAFETENSORS = [*ANY, enormous, renamed, retyped]

ABSURD = [None, -1, 0, 10**9, 1e308, "x", "../../x", [], [0], [1, 2, 3], {}, True, [[]]]
ABSURD += ["a" * 10_000, [10**7, 10**7]]


def json_broken(data, rng):
    """One value of a JSON object of another kind, missing, or absurd."""
    value = json.loads(data)
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = rng.choice(ABSURD)
    return json.dumps(value).encode() if rng.random() < 0.95 else b"[" * 100_000


def picture_broken(data, rng):
    """PNG: an enormous declared size, absurd chunks."""
    data = bytearray(data)
    if data[:4] == b"\x89PNG":
        sizes = [(2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 0), (1, 2**30)]
        data[16:24] = struct.pack(">II", *rng.choice(sizes))
    return bytes(data)


# ------------------------------------------------------------------- good files, and who reads them


class Good(NamedTuple):
    """A good file, how it is read, and how it can be broken."""

    data: bytes
    name: str
    reader: Callable  # of a path
    ways: list  # functions (data, rng) -> data


def good_files(folder: Path, model) -> dict[str, list[Good]]:
    """{kind: good files}"""
    torch.manual_seed(0)
    good = lambda name, *how: Good((folder / name).read_bytes(), Path(name).name, *how)
    slider = lora.Slider(lora.target_layers(model.unet))
    deltas = {name: part.delta() for name, part in slider.named_children()}
    about = {
        "settings": {"pos": "a", "neg": "b", "lr": 1e-3, "eta": 0.5},
        "probe": {"range": [-2, 2]},
        "meter": {"share": 1},
        "prompts": ["a"],
        "preserved": [],
    }

    def read_slider(path):
        """What slider.py and tools.py do with a slider file."""
        one = lora.load(path, model.unet)
        slider_command.useful_scales([one])
        return one

    sliders = []
    for naming in slider_files.NAMINGS:
        slider_files.write(folder / "x.safetensors", deltas, about, naming, model.unet)
        sliders.append(good("x.safetensors", read_slider, SAFETENSORS))
    torch.save({k: v for k, v in slider.state_dict().items()}, folder / "x.pt")
    sliders.append(good("x.pt", read_slider, ANY))

    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for ending in PICTURES:
        Image.fromarray(pixels).save(folder / f"x.{ending}")
    ways = [*ANY, picture_broken]
    pictures = [good(f"x.{ending}", images.read_image, ways) for ending in PICTURES]

    checkpoint = Checkpoint(folder / "u")
    checkpoint.save({"step": 1, "parameters": [torch.zeros(3)]})
    checkpoint.remember("p", lambda: {"x": torch.zeros(100)})
    read_state = lambda path: Checkpoint(path.parent).load()
    read_part = lambda path: Checkpoint(path.parent).remember("p", dict)
    states = [good("u/state.pt", read_state, ANY)]
    states.append(good("u/p.safetensors", read_part, SAFETENSORS))

    uncond = (torch.zeros(1, 7, 3), torch.zeros(1, 3), torch.zeros(1, 6))
    inversion = invert.Inversion(torch.zeros(1, 4, 2, 2), [uncond] * 2)
    read_inversion = lambda path: inversions.cached(path, lambda remember: inversion)
    read_inversion(folder / "i.safetensors")  # writes it
    inverted = [good("i.safetensors", read_inversion, SAFETENSORS)]
    return {"slider": sliders, "picture": pictures, "state": states, "inversion": inverted}


def link_model(folder: Path):
    """A copy of the miniature in which every file is a link to the good one."""
    for file in MINIATURE.rglob("*"):
        if file.is_file():
            to = folder / file.relative_to(MINIATURE)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.symlink_to(file)


def broken_model(folder: Path, files: list[Path], rng) -> str:
    """A model folder with one broken file. Returns what was broken how."""
    small = [f for f in files if f.stat().st_size < 2**20]
    large = [f for f in files if f.stat().st_size >= 2**20]
    link_model(folder)
    file = rng.choice(small * 3 + large)
    ways = {".safetensors": SAFETENSORS, ".json": [json_broken] * 3 + ANY}
    breaks = rng.choice(ways.get(file.suffix, ANY))
    target = folder / file.relative_to(MINIATURE)
    target.unlink()
    if rng.random() > 0.05:
        target.write_bytes(broken(breaks, file.read_bytes(), rng))
    return f"{file.relative_to(MINIATURE)} {breaks.__name__}"


def cases(n: int, seed: int, model, folder: Path):
    """Yields (what, reader, path) n times: broken sliders, pictures, states, inversions, single
    files, and model folders with one broken file each."""
    good = good_files(folder, model)
    model_files = [f for f in sorted(MINIATURE.rglob("*")) if f.is_file()]
    vae = (MINIATURE / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    read_folder = lambda path: SDXL.load(path, device="cpu", dtype=torch.float16)
    read_single = lambda path: weights.find_weights(path, MINIATURE)
    kinds = ["slider"] * 4 + ["picture"] * 3 + ["state", "inversion"] + ["folder"] * 3 + ["single"]
    case = folder / "case"
    for i in range(n):
        rng = random.Random(seed * 1_000_003 + i)
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        kind = rng.choice(kinds)
        if kind == "folder":
            what = broken_model(case, model_files, rng)
            yield f"folder {what}", read_folder, case
        elif kind == "single":
            breaks = rng.choice(SAFETENSORS)
            (case / "x.safetensors").write_bytes(broken(breaks, vae, rng))
            yield f"single {breaks.__name__}", read_single, case / "x.safetensors"
        else:
            file = rng.choice(good[kind])
            breaks = rng.choice(file.ways)
            (case / file.name).write_bytes(broken(breaks, file.data, rng))
            yield f"{kind} {file.name} {breaks.__name__}", file.reader, case / file.name


def broken(breaks, data, rng) -> bytes:
    """Broken like that; where that does not fit the data, truncated."""
    try:
        return breaks(data, rng)
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError):
        return truncated(data, rng)


# ------------------------------------------------------------------------------------------ running


def run(n: int, seed: int, slow: float, memory: float) -> tuple[collections.Counter, list[str]]:
    """(how often each outcome, findings)."""
    warnings.simplefilter("ignore")
    model = SDXL.load(device="cpu", dtype=torch.float32, vae=False)
    outcomes, findings = collections.Counter(), []
    expected = {"precious", "case", "x.safetensors", "x.pt", "u", "i.safetensors"}
    expected |= {f"x.{ending}" for ending in PICTURES}
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("precious").write_text("untouched")
            for what, reader, path in cases(n, seed, model, Path(folder)):
                # A model folder that is fine after all takes its time to load.
                limit = slow + 5 * what.startswith("folder")
                outcome, found = read(reader, path, limit, memory)
                outcomes[outcome] += 1
                findings += [f"{what}: {text}" for text in found]
            files = os.listdir(folder)
            if Path("precious").read_text() != "untouched" or set(files) - expected:
                findings.append(f"files were touched: {files}")
        finally:
            os.chdir(before)
    return outcomes, findings


def read(reader, path: Path, slow: float, memory: float) -> tuple[str, list[str]]:
    """The outcome of one case, and what is wrong with it."""
    outcome, findings = "read", []
    memory_before, started = cost.peak_memory(), time.time()
    try:
        reader(path)
    except ValueError as error:
        outcome = "refused"
        if not str(error).strip():
            findings.append("an empty message")
    except Exception as error:
        outcome = "crashed"
        lines = "".join(traceback.format_tb(error.__traceback__)[-3:])
        findings.append(f"{type(error).__name__}: {str(error)[:200]}\n{lines}")
    seconds, rise = time.time() - started, cost.peak_memory() - memory_before
    if seconds > slow:
        findings.append(f"took {seconds:.1f} s")
    if rise > memory * 2**20:
        findings.append(f"took {rise / 2**20:.0f} MiB")
    if Path(CANARY).exists():
        findings.append("CODE RAN")
        Path(CANARY).unlink()
    return outcome, findings


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("--cases", type=int, default=2000, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0)
    slow = "seconds that a reader may take (default: %(default)s; a model folder 5 more)"
    p.add_argument("--slow", type=float, default=1.0, help=slow)
    memory = default_help("MiB that the peak may rise by")
    p.add_argument("--memory", type=float, default=600, help=memory)
    args = p.parse_args()
    outcomes, findings = run(args.cases, args.seed, args.slow, args.memory)
    print(*findings, sep="\n")
    counts = ", ".join(f"{n} {what}" for what, n in outcomes.most_common())
    print(f"{args.cases} cases: {counts}; {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
