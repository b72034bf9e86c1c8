"""A page with a real slider to drag: one HTML file, every picture inside, no network.  slider.py
... --html out.html"""

import base64
import io
import json
import re

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
  :root { color-scheme: light dark; --ink: #1a1a1a; --ground: #fff; --accent: #1f5fbf; font: 17px/1.5 system-ui, sans-serif }
  @media (prefers-color-scheme: dark) { :root { --ink: #eee; --ground: #161616; --accent: #7fb0ff } }
  body { max-width: 34rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--ground) }
  h1 { font-size: 1.2rem }
  figure { margin: 0 }
  #picture { width: 100%; max-width: 32rem; display: block; margin: 0 auto; border-radius: .4rem; image-rendering: auto }
  label, legend { font-weight: 600 }
  label { display: block }
  input[type=range] { width: 100%; height: 2rem; accent-color: var(--accent) }
  input[type=text], input[type=number] { width: 100%; font: inherit; font-weight: 400; box-sizing: border-box }
  input:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
  fieldset { border: 0; padding: 0; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem }
  fieldset label { font-weight: 400; padding: .3rem }
  #plane { position: relative; width: 100%; max-width: 16rem; aspect-ratio: 1; margin: 1rem auto; border: 2px solid currentColor; border-radius: .4rem; touch-action: none; cursor: crosshair }
  #knob { position: absolute; width: 1.4rem; height: 1.4rem; margin: -.7rem; border-radius: 50%; background: var(--accent); border: 2px solid var(--ground); pointer-events: none }
  output { font-variant-numeric: tabular-nums }
</style>
<h1>TITLE</h1>
"""

TEMPLATE = (
    HEAD
    + """<figure>
  <img id="picture" alt="">
  <figcaption aria-live="polite"><output id="say"></output></figcaption>
</figure>
<div id="ranges"></div>
<div id="plane" hidden aria-hidden="true"><div id="knob"></div></div>
<fieldset id="seeds"><legend>Picture</legend></fieldset>
<p>Drag, or use the arrow keys.</p>
<script>
const data = DATA;  // {sliders: [{name, scales}], rows: [name], frames: [row][second][first] of {src, say}}
const $ = id => document.getElementById(id), at = data.sliders.map(s => s.scales.indexOf(0) < 0 ? Math.floor(s.scales.length / 2) : s.scales.indexOf(0));
let row = 0;
const signed = x => x > 0 ? "+" + x : String(x);

data.sliders.forEach((s, i) => {
  const label = document.createElement("label"), range = document.createElement("input");
  range.type = "range"; range.min = 0; range.max = s.scales.length - 1; range.step = 1; range.id = "range" + i;
  label.htmlFor = range.id; label.textContent = s.name;
  range.addEventListener("input", () => { at[i] = Number(range.value); show() });
  $("ranges").append(label, range);
});
data.rows.forEach((name, i) => {
  const label = document.createElement("label"), radio = document.createElement("input");
  radio.type = "radio"; radio.name = "seed"; radio.value = i; radio.checked = i === 0;
  radio.addEventListener("change", () => { row = i; show() });
  label.append(radio, " " + name);
  $("seeds").append(label);
});
$("seeds").hidden = data.rows.length < 2;

if (data.sliders.length === 2) {  // for pointers; the ranges do the same for keys
  const plane = $("plane");
  plane.hidden = false;
  const move = event => {
    const box = plane.getBoundingClientRect(), to = (share, n) => Math.round(Math.min(1, Math.max(0, share)) * (n - 1));
    at[0] = to((event.clientX - box.left) / box.width, data.sliders[0].scales.length);
    at[1] = to(1 - (event.clientY - box.top) / box.height, data.sliders[1].scales.length);
    show();
  };
  plane.addEventListener("pointerdown", event => { plane.setPointerCapture?.(event.pointerId); move(event) });
  plane.addEventListener("pointermove", event => { if (event.buttons) move(event) });
}

function show() {
  const frame = data.frames[row][at[1] ?? 0][at[0]];
  $("picture").src = frame.src;
  const scales = data.sliders.map((s, i) => `${s.name} ${signed(s.scales[at[i]])}`).join(", ");
  $("say").textContent = scales + (frame.say ? `: ${frame.say}` : "");
  $("picture").alt = `${data.rows[row]}, ${scales}`;
  data.sliders.forEach((s, i) => { $("range" + i).value = at[i]; $("range" + i).setAttribute("aria-valuetext", signed(s.scales[at[i]])) });
  if (at.length === 2) {
    $("knob").style.left = 100 * at[0] / (data.sliders[0].scales.length - 1) + "%";
    $("knob").style.top = 100 - 100 * at[1] / (data.sliders[1].scales.length - 1) + "%";
  }
}
show();
</script>
</html>
"""
)


def render_page(
    title: str, sliders: list[tuple[str, list[float]]], rows: list[str], frames, says=None
) -> str:
    """The page. sliders: one or two of (name, scales); rows: names of the pictures to choose from;
    frames: frames[row][j][i] a PIL image at the first slider's scale i and the second's j (one j
    if there is one slider); says: alike, words to show with each."""
    table = [
        [
            [
                {"src": data_url(picture), "say": says[r][j][i] if says else ""}
                for i, picture in enumerate(line)
            ]
            for j, line in enumerate(grid)
        ]
        for r, grid in enumerate(frames)
    ]
    data = {
        "sliders": [
            {"name": name, "scales": [round(float(s), 3) for s in scales]}
            for name, scales in sliders
        ],
        "rows": rows,
        "frames": table,
    }
    return fill_template(TEMPLATE, title, data)


def fill_template(template: str, title: str, data) -> str:
    """The template with `title` for TITLE and `data`, as JSON, for DATA, so that neither can end
    the script or be taken for a tag."""
    values = {
        "TITLE": title.replace("&", "&amp;").replace("<", "&lt;"),
        "DATA": json.dumps(data).replace("</", "<\\/"),
    }
    return re.sub(
        "TITLE|DATA", lambda m: values[m[0]], template
    )  # in one go: a title may hold either word


def data_url(picture, lossless: bool | None = None) -> str:
    """The picture as a data address, without name or metadata: PNG if lossless, JPEG if not; None:
    PNG where it is small."""
    out, png = io.BytesIO(), max(picture.size) <= 256 if lossless is None else lossless
    picture.convert("RGB").save(out, "PNG" if png else "JPEG", **({} if png else {"quality": 90}))
    return (
        f"data:image/{'png' if png else 'jpeg'};base64," + base64.b64encode(out.getvalue()).decode()
    )
