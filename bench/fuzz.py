"""Every reader against broken and hostile files.  python -m bench.fuzz --cases 2000

Good files of each kind are truncated, have bits flipped and pieces replaced, get other dtypes and shapes, enormous declared
sizes, names with paths in them, pickles with code. A reader may succeed, or raise ValueError (one line for the user); anything else
is a finding: another exception, more than --slow seconds, more than --memory MiB, code that ran, a file outside that was touched.
"""

import argparse
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save_file

import invert
import lora
from formats import slider_files, weights
from sdxl import MINIATURE, SDXL
from support import cost, images, inversions
from support.checkpoint import Checkpoint

CANARY = "code_that_ran"


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


# ---------------------------------------------------------------------------------------------- ways to break bytes


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 3, 20])):
        data[rng.randrange(min(len(data), rng.choice([64, 4096, len(data)])))] ^= (
            1 << rng.randrange(8)
        )
    return bytes(data)


def replaced(data, rng):
    data, n = bytearray(data), rng.choice([1, 8, 200])
    at = rng.randrange(max(1, min(len(data), rng.choice([16, 2048, len(data)])) - n))
    data[at : at + n] = rng.choice([rng.randbytes(n), b"\x00" * n, b"\xff" * n])
    return bytes(data)


def doubled(data, rng):
    return data + data[: rng.randrange(1, len(data))]


def nothing(data, rng):
    return rng.choice(
        [b"", b"\x00", b"{}", b"null", b"[1]", rng.randbytes(500), b"<html>404</html>"]
    )


def pickled(data, rng):
    """A pickle with code, as it is or as PyTorch's zip."""
    evil = Evil(rng.choice(["eval", "exec", "system", "open"]))
    if rng.random() < 0.5:
        return pickle.dumps(rng.choice([evil, {"lora": evil}, [evil]]))
    out = io.BytesIO()
    torch.save(rng.choice([evil, {"state_dict": {"x": evil}}]), out)
    return out.getvalue()


ANY = [truncated, flipped, replaced, doubled, nothing, pickled]


def header(data):
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(head, rest) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + rest


def enormous(data, rng):
    """A header, a tensor or a shape that is said to be enormous."""
    if rng.random() < 0.3:
        return struct.pack("<Q", rng.choice([2**63, 2**40, 2**31, len(data) * 2])) + data[8:]
    head, rest = header(data)
    name = rng.choice([k for k in head if k != "__metadata__"])
    head[name]["shape"] = rng.choice([[2**40], [2**31, 2**31], [10**6, 10**6], [-1, 5], [0], []])
    if rng.random() < 0.5:
        head[name]["data_offsets"] = [0, rng.choice([2**62, 2**33, len(rest) + 1])]
    return with_header(head, rest)


def renamed(data, rng):
    """Names with paths in them, very long ones, none."""
    head, rest = header(data)
    name = rng.choice([k for k in head if k != "__metadata__"])
    head[
        rng.choice(
            [
                "../../etc/passwd",
                "/etc/passwd",
                "a" * 100_000,
                "",
                "lora_unet_../x.lora_down.weight",
                "\x00",
                "unet.\u202e",
            ]
        )
    ] = head.pop(name)
    return with_header(head, rest)


def retyped(data, rng):
    """Other dtypes, NaN and infinite numbers, transposed and cut tensors, metadata that is no JSON."""
    tensors = load(data)
    metadata = header(data)[0].get("__metadata__", {})
    name = rng.choice(list(tensors))
    change = rng.choice(["dtype", "nan", "shape", "drop", "double", "metadata"])
    t = tensors[name]
    if change == "dtype":
        tensors[name] = t.to(
            rng.choice([torch.int64, torch.bool, torch.float64, torch.int8, torch.uint8])
        )
    elif change == "nan":
        tensors[name] = (
            torch.full_like(t, rng.choice([float("nan"), float("inf"), 1e4]))
            if t.is_floating_point()
            else t
        )
    elif change == "shape":
        tensors[name] = (
            t.flatten()[: max(1, t.numel() // 2)].clone()
            if rng.random() < 0.5
            else t.unsqueeze(0).repeat(2, *[1] * t.ndim)
        )
    elif change == "drop":
        del tensors[name]
    elif change == "double":
        tensors[name + "x"] = t.clone()
    else:
        metadata |= {
            rng.choice(["settings", "probe", "meter", "prompts"]): rng.choice(
                ["{", "[" * 5000, "null", "1e999", '{"range": "x"}', '{"range": [1]}', ""]
            )
        }
    out = io.BytesIO()
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            f.name,
            {k: str(v) for k, v in metadata.items()} or None,
        )
        out.write(Path(f.name).read_bytes())
    return out.getvalue()


SAFETENSORS = [*ANY, enormous, renamed, retyped]


def json_broken(data, rng):
    """One value of a JSON object of another kind, missing, or absurd."""
    value = json.loads(data)
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = rng.choice(
                [
                    None,
                    -1,
                    0,
                    10**9,
                    1e308,
                    "x",
                    "../../x",
                    [],
                    [0],
                    [1, 2, 3],
                    {},
                    True,
                    [[]],
                    "a" * 10_000,
                    [10**7, 10**7],
                ]
            )
    return json.dumps(value).encode() if rng.random() < 0.95 else b"[" * 100_000


def picture_broken(data, rng):
    """PNG: an enormous declared size, absurd chunks."""
    data = bytearray(data)
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(
            ">II", *rng.choice([(2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 0), (1, 2**30)])
        )
    return bytes(data)


# ---------------------------------------------------------------------------------------------- good files, and who reads them


def good_files(folder: Path, model) -> dict:
    """kind -> list of (good bytes, name of the file, reader of a path, ways to break it)."""
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet))
    about = {
        "settings": {"pos": "a", "neg": "b", "lr": 1e-3, "eta": 0.5},
        "probe": {"range": [-2, 2]},
        "meter": {"share": 1},
        "prompts": ["a"],
        "preserved": [],
    }
    kinds = {"slider": [], "picture": [], "state": [], "inversion": []}

    def use(path):  # what slider.py and tools.py do with a slider file
        import slider as script

        one = lora.load(path, model.unet)
        script.useful_scales([one])
        return one

    for naming in slider_files.NAMINGS:
        slider_files.write(folder / "x.safetensors", slider.parts(), about, naming, model.unet)
        kinds["slider"].append(
            ((folder / "x.safetensors").read_bytes(), "x.safetensors", use, SAFETENSORS)
        )
    torch.save({k: v for k, v in slider.state_dict().items()}, folder / "x.pt")
    kinds["slider"].append(((folder / "x.pt").read_bytes(), "x.pt", use, ANY))

    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    )
    for ending in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        picture.save(folder / f"x.{ending}")
        kinds["picture"].append(
            (
                (folder / f"x.{ending}").read_bytes(),
                f"x.{ending}",
                images.read_image,
                [*ANY, picture_broken],
            )
        )

    kept = Checkpoint(folder / "u")
    kept.save({"step": 1, "parameters": [torch.zeros(3)]})
    kept.part("p", lambda: {"x": torch.zeros(100)})
    kinds["state"].append(
        (
            (folder / "u" / "state.pt").read_bytes(),
            "state.pt",
            lambda p: Checkpoint(p.parent).load(),
            ANY,
        )
    )
    kinds["state"].append(
        (
            (folder / "u" / "p.safetensors").read_bytes(),
            "p.safetensors",
            lambda p: Checkpoint(p.parent).part("p", dict),
            SAFETENSORS,
        )
    )
    made = invert.Inversion(
        torch.zeros(1, 4, 2, 2), [(torch.zeros(1, 7, 3), torch.zeros(1, 3), torch.zeros(1, 6))] * 2
    )
    inversions.cached(folder / "i.safetensors", lambda _: made)
    kinds["inversion"].append(
        (
            (folder / "i.safetensors").read_bytes(),
            "i.safetensors",
            lambda p: inversions.cached(p, lambda _: made),
            SAFETENSORS,
        )
    )
    return kinds


def model_folder(folder: Path):
    """A copy of the miniature in which every file is a link to the good one."""
    for file in MINIATURE.rglob("*"):
        if file.is_file():
            to = folder / file.relative_to(MINIATURE)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.symlink_to(file)


def cases(n: int, seed: int, model, folder: Path):
    """Yields (what, reader, path) n times: broken sliders, pictures, states, inversions, single files, and model folders with
    one broken file each."""
    kinds = good_files(folder, model)
    parts = [f for f in sorted(MINIATURE.rglob("*")) if f.is_file()]
    small, large = (
        [f for f in parts if f.stat().st_size < 2**20],
        [f for f in parts if f.stat().st_size >= 2**20],
    )
    for i in range(n):
        rng = random.Random(seed * 1_000_003 + i)
        where = folder / "case"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        kind = rng.choice(
            ["slider"] * 4 + ["picture"] * 3 + ["state", "inversion"] + ["folder"] * 3 + ["single"]
        )
        if kind == "folder":
            model_folder(where)
            file = rng.choice(small * 3 + large)
            breaks = rng.choice(
                SAFETENSORS
                if file.suffix == ".safetensors"
                else [json_broken] * 3 + ANY
                if file.suffix == ".json"
                else ANY
            )
            target = where / file.relative_to(MINIATURE)
            target.unlink()
            if rng.random() > 0.05:
                target.write_bytes(broken(breaks, file.read_bytes(), rng))
            yield (
                f"folder {file.relative_to(MINIATURE)} {breaks.__name__}",
                lambda p: SDXL.load(p, device="cpu", dtype=torch.float16),
                where,
            )
        elif kind == "single":
            breaks = rng.choice(SAFETENSORS)
            (where / "x.safetensors").write_bytes(
                broken(
                    breaks,
                    (MINIATURE / "vae" / "diffusion_pytorch_model.safetensors").read_bytes(),
                    rng,
                )
            )
            yield (
                f"single {breaks.__name__}",
                lambda p: weights.find_weights(p, MINIATURE),
                where / "x.safetensors",
            )
        else:
            data, name, reader, ways = rng.choice(kinds[kind])
            breaks = rng.choice(ways)
            (where / name).write_bytes(broken(breaks, data, rng))
            yield f"{kind} {name} {breaks.__name__}", reader, where / name


def broken(breaks, data, rng) -> bytes:
    """Broken that way; where the way does not fit the data, in another."""
    try:
        return breaks(data, rng)
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError):
        return truncated(data, rng)


def run(n: int, seed: int, slow: float, memory: float) -> tuple[collections.Counter, list[str]]:
    """(how often each outcome, findings)."""
    warnings.simplefilter("ignore")
    model = SDXL.load(device="cpu", dtype=torch.float32, vae=False)
    outcomes, findings = collections.Counter(), []
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("precious").write_text("untouched")
            for what, reader, path in cases(n, seed, model, Path(folder)):

                def finding(text):
                    findings.append(f"{what}: {text}")

                at_first, started = cost.peak_memory(), time.time()
                limit = slow + 5 * what.startswith(
                    "folder"
                )  # a model folder that is whole after all takes its time to load
                try:
                    reader(path)
                    outcomes["read"] += 1
                except ValueError as error:
                    outcomes["refused"] += 1
                    if not str(error).strip():
                        finding("an empty message")
                except Exception as error:
                    outcomes["crashed"] += 1
                    finding(
                        f"{type(error).__name__}: {str(error)[:200]}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
                    )
                if time.time() - started > limit:
                    finding(f"took {time.time() - started:.1f} s")
                if cost.peak_memory() - at_first > memory * 2**20:
                    finding(f"took {(cost.peak_memory() - at_first) / 2**20:.0f} MiB")
                if Path(CANARY).exists():
                    finding("CODE RAN")
                    Path(CANARY).unlink()
            if Path("precious").read_text() != "untouched" or set(os.listdir(folder)) - {
                "precious",
                "case",
                "x.safetensors",
                "x.pt",
                "u",
                "i.safetensors",
                *(f"x.{e}" for e in ("png", "jpg", "gif", "bmp", "tif", "webp")),
            }:
                findings.append(f"files were touched: {os.listdir(folder)}")
        finally:
            os.chdir(before)
    return outcomes, findings


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cases", type=int, default=2000, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--slow",
        type=float,
        default=1.0,
        help="seconds that a reader may take (default: %(default)s; a model folder 5 more)",
    )
    p.add_argument(
        "--memory",
        type=float,
        default=600,
        help="MiB that the peak may rise by (default: %(default)s)",
    )
    args = p.parse_args()
    outcomes, findings = run(args.cases, args.seed, args.slow, args.memory)
    print(*findings, sep="\n")
    print(
        f"{args.cases} cases: {', '.join(f'{n} {what}' for what, n in outcomes.most_common())}; {len(findings)} findings"
    )
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
