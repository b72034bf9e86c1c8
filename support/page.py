"""A page with a real slider to drag: one HTML file, every picture inside, no network
(slider.py ... --html out.html). The templates are head.html and page.html."""

import base64
import io
import json
import re
from pathlib import Path

HEAD = Path(__file__).with_name("head.html").read_text()
TEMPLATE = HEAD + Path(__file__).with_name("page.html").read_text()


def render_page(title: str, sliders, rows: list[str], frames, captions=None) -> str:
    """The page. sliders: one or two of (name, scales). rows: names of the pictures to choose from.
    frames: frames[row][j][i] a PIL image at the first slider's scale i and the second's j (one j if
    there is one slider). captions: alike, words to show with each."""

    def frame(r, j, i):
        caption = captions[r][j][i] if captions else ""
        return {"src": data_url(frames[r][j][i]), "say": caption}

    columns = lambda r, j: [frame(r, j, i) for i in range(len(frames[r][j]))]
    table = [[columns(r, j) for j in range(len(frames[r]))] for r in range(len(frames))]
    rounded = lambda scales: [round(float(scale), 3) for scale in scales]
    named = [{"name": name, "scales": rounded(scales)} for name, scales in sliders]
    return fill_template(TEMPLATE, title, {"sliders": named, "rows": rows, "frames": table})


def fill_template(template: str, title: str, data) -> str:
    """The template with `title` for TITLE and `data`, as JSON, for DATA, so that neither can end
    the script or be taken for a tag."""
    title = title.replace("&", "&amp;").replace("<", "&lt;")
    values = {"TITLE": title, "DATA": json.dumps(data).replace("</", "<\\/")}
    # In one go: a title may hold either word.
    return re.sub("TITLE|DATA", lambda m: values[m[0]], template)


def data_url(picture, lossless: bool | None = None) -> str:
    """The picture as a data address, without name or metadata: PNG if lossless, JPEG if not; None:
    PNG where it is small."""
    out, png = io.BytesIO(), max(picture.size) <= 256 if lossless is None else lossless
    kind, options = ("png", {}) if png else ("jpeg", {"quality": 90})
    picture.convert("RGB").save(out, kind.upper(), **options)
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
