"""How a picture was made, as text in its PNG: the chunk `parameters`, in the form that A1111's web
UI writes and that the field's viewers read. The prompt, the negative prompt, and one line such as

    Steps: 30, Sampler: DDIM, CFG scale: 5, Seed: 0, Size: 128x128, Model: miniature,
    Sliders: age 2 from 0.3 on; smile -1 from 0.3 on
"""

import json
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from support import training


class Infotext:
    """What slider.py's options say of its pictures. columns, etas, to be set: those that were drawn
    last, as slider.sweep takes them. picture and sheet: Pillow's options that put the text in."""

    def __init__(self, args, size: tuple[int, int], sliders: dict):
        """size: (height, width). sliders: {lora.Slider: its name}."""
        self.args, self.sliders = args, sliders
        self.columns, self.etas = [], None
        about = training.provenance(args)
        inverted = args.image and args.strength is None
        self.seeds = [None] if inverted else args.seeds  # what is inverted has no seed
        self.fields = {
            "Steps": args.steps if isinstance(args.steps, int) else len(args.steps),
            "Sampler": "DDIM",
            "CFG scale": f"{args.guidance:g}",
            "Seed": None,
            "Size": f"{size[1]}x{size[0]}",
            "Model hash": about.get("ss_sd_model_hash"),
            "Model": about["ss_sd_model_name"].removesuffix(".safetensors"),
            "Merged": "; ".join(f"{Path(p).name} {1 if w is None else w:g}" for p, w in args.merge),
            "Denoising strength": args.strength,
            "Inversion": args.invert if inverted else None,
            "Noise levels": None if isinstance(args.steps, int) else args.steps,
            "Eq. (8)": args.guide and f"+ {args.guide[0]} - {args.guide[1]}",
            "Preserved": "; ".join(args.preserve),
        }

    def picture(self, c: int, r: int) -> dict:
        """Of row r in column c."""
        on = [(self.sliders[s], scale, start) for s, scale, start in self.columns[c] if scale]
        sliders = "; ".join(f"{name} {scale:g} from {start:g} on" for name, scale, start in on)
        eta = f"{self.etas[c]:g}" if self.etas else None
        return self.chunk({"Seed": self.seeds[r], "Sliders": sliders, "Eta": eta})

    def sheet(self, names: list[str], r: int | None = None) -> dict:
        """Of several pictures: all rows, or row r; names of the columns."""
        seeds = self.seeds if r is None else self.seeds[r : r + 1]
        more = {"Seeds": seeds} if len(seeds) > 1 else {}
        more |= {"Sliders": "; ".join(self.sliders.values()), "Scales": ", ".join(names)}
        return self.chunk({"Seed": seeds[0]} | more)

    def chunk(self, more: dict) -> dict:
        if self.args.no_metadata:
            return {}
        negative = [f"Negative prompt: {self.args.negative}"] if self.args.negative else []
        fields = {k: v for k, v in (self.fields | more).items() if v not in (None, "")}
        line = ", ".join(f"{name}: {quoted(value)}" for name, value in fields.items())
        info = PngInfo()
        info.add_itxt("parameters", "\n".join([self.args.prompt, *negative, line]))
        return {"pnginfo": info}


def quoted(value) -> str:
    """In quotation marks if it holds what divides fields, as A1111 has it."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text
