"""A page that draws while you drag:  python live.py --slider age.safetensors --slider smile.safetensors

Serves http://127.0.0.1:8000 to this machine alone. Every position of the sliders is drawn when it is asked for: about a second on the
miniature. For a page to keep or to send, with its pictures inside, see slider.py --html.
"""

import http.server
import io
import threading
import urllib.parse
from pathlib import Path

import lora
import slider
from support import cli, page
from support.checkpoint import deferred_interrupt

TEMPLATE = (
    page.HEAD
    + """<img id="picture" alt="">
<p><output id="say" aria-live="polite"></output></p>
<div id="controls"></div>
<script>
const data = DATA;  // {prompt, sliders: [{name, low, high}]}
const say = document.getElementById("say"), picture = document.getElementById("picture"), inputs = {};
function control(name, label, attributes) {
  const box = document.createElement("label"), input = inputs[name] = Object.assign(document.createElement("input"), attributes);
  box.append(label, input);
  input.addEventListener("input", draw);
  document.getElementById("controls").append(box);
}
data.sliders.forEach((s, i) => control("s" + i, s.name, { type: "range", min: Math.floor(4 * s.low) / 4, max: Math.ceil(4 * s.high) / 4, step: 0.25, value: 0 }));
control("seed", "seed", { type: "number", min: 0, step: 1, value: 0 });
control("prompt", "prompt", { type: "text", value: data.prompt });

let busy = false, again = false;
async function draw() {  // one picture at a time, and then the newest position
  if (busy) { again = true; return }
  busy = true;
  do {
    again = false;
    const asked = new URLSearchParams(Object.entries(inputs).map(([name, input]) => [name, input.value]));
    say.textContent = "drawing ...";
    const answer = await fetch("/picture?" + asked).catch(() => null);
    if (answer?.ok) {
      URL.revokeObjectURL(picture.src);
      picture.src = URL.createObjectURL(await answer.blob());
      picture.alt = say.textContent = data.sliders.map((s, i) => s.name + " " + inputs["s" + i].value).join(", ");
    } else say.textContent = answer ? await answer.text() : "the server is gone";
  } while (again);
  busy = false;
}
draw();
</script>
</html>
"""
)


def server(
    model, sliders: list, prompt: str, port: int, **settings
) -> http.server.ThreadingHTTPServer:
    """Serves the page and /picture?prompt=...&seed=...&s0=...&s1=..., a PNG. sliders: triples (name, lora.Slider, (lowest, highest scale));
    settings: slider.sweep's. Port 0 is any free one. OSError if the port is taken."""
    one_at_a_time = threading.Lock()
    shown = [{"name": name, "low": low, "high": high} for name, _, (low, high) in sliders]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host, asked = self.headers.get("Host", ""), urllib.parse.urlsplit(self.path)
            if host.rsplit(":", 1)[0] not in (
                "127.0.0.1",
                "localhost",
            ):  # some other name that leads here: a page elsewhere is asking
                return self.answer(403, "text/plain", b"only as 127.0.0.1")
            if asked.path == "/":
                return self.answer(
                    200,
                    "text/html; charset=utf-8",
                    page.fill_template(
                        TEMPLATE, "Sliders, live", {"prompt": prompt, "sliders": shown}
                    ).encode(),
                )
            if asked.path != "/picture":
                return self.answer(404, "text/plain", b"there is / and /picture")
            try:
                words = dict(urllib.parse.parse_qsl(asked.query))
                scales = [cli.numbers(words.get(f"s{i}", "0"))[0] for i in range(len(sliders))]
                seed = cli.seed_list(words.get("seed", "0"))[0]
                if not all(abs(s) <= 100 for s in scales):
                    raise ValueError("scales: numbers up to 100")
                with one_at_a_time:
                    drawn = slider.generate(
                        model,
                        words.get("prompt") or prompt,
                        [seed],
                        [(one, scale) for (_, one, _), scale in zip(sliders, scales)],
                        **settings,
                    )[0]
            except Exception as error:  # whatever was asked, the next one is answered
                return self.answer(400, "text/plain", str(error).encode())
            out = io.BytesIO()
            drawn.save(out, "PNG")
            self.answer(200, "image/png", out.getvalue())

        def answer(self, status: int, kind: str, body: bytes):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main():
    p = cli.model_parser(__doc__)
    p.add_argument(
        "--slider",
        action="append",
        required=True,
        metavar="FILE",
        help="slider file, or a folder of them; may be repeated",
    )
    p.add_argument(
        "--prompt",
        default="a portrait of a person",
        help="what is drawn at first (default: %(default)s)",
    )
    p.add_argument(
        "--steps", type=cli.steps_or_levels, default=15, help="DDIM steps (default: %(default)s)"
    )
    p.add_argument("--guidance", type=cli.guidance, default=5.0, help="default: %(default)s")
    p.add_argument(
        "--start", type=cli.fraction, default=0.3, help="as in slider.py (default: %(default)s)"
    )
    p.add_argument(
        "--port", type=int, default=8000, help="default: %(default)s; 0 for any free one"
    )
    args = p.parse_args()
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, not {args.port}")
    files = [file for given in args.slider for file in slider.in_folder(given)]
    model = cli.load_model(args)
    stems = [Path(file).stem for file in files]
    sliders = []
    for file, stem in zip(files, stems):
        one = lora.load(file, model.unet)
        low, *_, high = slider.useful_scales([one])
        sliders.append((stem if stems.count(stem) == 1 else file, one, (low, high)))
    try:
        serving = server(
            model,
            sliders,
            args.prompt,
            args.port,
            steps=args.steps,
            guidance=args.guidance,
            start=args.start,
        )
    except OSError as error:
        raise ValueError(
            f"--port {args.port}: {error.strerror}; another one, or 0 for any that is free"
        ) from None
    print(
        f"http://127.0.0.1:{serving.server_port} shows {', '.join(name for name, _, _ in sliders)}; Ctrl-C ends it",
        flush=True,
    )
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    with deferred_interrupt() as stop:
        while not stop():
            threading.Event().wait(0.2)
    serving.shutdown()


if __name__ == "__main__":
    cli.run(main)
