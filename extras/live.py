"""A page that draws while you drag:

    python -m extras.live --slider age.safetensors --slider smile.safetensors

Serves http://127.0.0.1:8000 to this machine alone. Every position of the sliders is drawn when it
is asked for: about a second on the miniature. For a page to keep or to send, with its pictures
inside, see slider.py --html."""

import http.server
import io
import threading
import time
import urllib.parse
from pathlib import Path

import lora
import slider
from formats import slider_files
from support import cli, page, sizes
from support.checkpoint import deferred_interrupt

TEMPLATE = page.HEAD + Path(__file__).with_name("live.html").read_text()


def make_server(model, sliders: list, prompt: str, port: int, **settings):
    """An http.server that answers / with the page and /picture?prompt=...&seed=...&s0=...&s1=...
    with a PNG. sliders: triples (name, lora.Slider, (lowest, highest scale)). settings:
    slider.sweep's. Port 0 is any free one. OSError if the port is taken."""
    one_at_a_time = threading.Lock()
    shown = [{"name": name, "low": low, "high": high} for name, _, (low, high) in sliders]
    html = page.fill_template(TEMPLATE, "Sliders, live", {"prompt": prompt, "sliders": shown})

    def draw(query: str):
        words = dict(urllib.parse.parse_qsl(query))
        scales = [cli.number(words.get(f"s{i}", "0")) for i in range(len(sliders))]
        seed = cli.seed(words.get("seed", "0"))
        if not all(abs(scale) <= 100 for scale in scales):
            raise ValueError("scales: numbers up to 100")
        at = [(one, scale) for (_, one, _), scale in zip(sliders, scales)]
        with one_at_a_time:
            return slider.generate(model, words.get("prompt") or prompt, [seed], at, **settings)[0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host, url = self.headers.get("Host", ""), urllib.parse.urlsplit(self.path)
            # Under another name that leads here a page elsewhere is asking.
            if host.rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                return self.answer(403, "text/plain", b"only as 127.0.0.1")
            if url.path == "/":
                return self.answer(200, "text/html; charset=utf-8", html.encode())
            if url.path != "/picture":
                return self.answer(404, "text/plain", b"there is / and /picture")
            out = io.BytesIO()
            try:
                draw(url.query).save(out, "PNG")
            except Exception as error:  # whatever was asked, the next one is answered
                return self.answer(400, "text/plain", str(error).encode())
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
    file = "slider file, or a folder of them; may be repeated"
    p.add_argument("--slider", action="append", required=True, metavar="FILE", help=file)
    prompt = "what is drawn at first (default: %(default)s)"
    p.add_argument("--prompt", default="a portrait of a person", help=prompt)
    steps = "DDIM steps (default: %(default)s)"
    p.add_argument("--steps", type=cli.steps_or_levels, default=15, help=steps)
    p.add_argument("--guidance", type=cli.guidance, default=5.0, help="default: %(default)s")
    start = "as in slider.py (default: %(default)s)"
    p.add_argument("--start", type=cli.fraction, default=0.3, help=start)
    size = "pixels, 1024 or width x height as 832x1216 (default: the model's own)"
    p.add_argument("--size", type=sizes.size, help=size)
    port = "default: %(default)s; 0 for any free one"
    p.add_argument("--port", type=int, default=8000, help=port)
    args = p.parse_args()
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, not {args.port}")
    files = [file for given in args.slider for file in slider_files.list_files(given)]
    model = cli.load_model(args)
    stems = [Path(file).stem for file in files]
    sliders = []
    for file, stem in zip(files, stems):
        one = lora.load(file, model.unet)
        low, *_, high = slider.useful_scales([one])
        sliders.append((stem if stems.count(stem) == 1 else file, one, (low, high)))
    settings = {name: getattr(args, name) for name in ("steps", "guidance", "start")}
    settings["size"] = args.size and sizes.height_width(args.size)
    model.latent_shape(settings["size"])  # refuse what cannot be
    try:
        serving = make_server(model, sliders, args.prompt, args.port, **settings)
    except OSError as error:
        remedy = "another one, or 0 for any that is free"
        raise ValueError(f"--port {args.port}: {error.strerror}; {remedy}") from None
    names = ", ".join(name for name, _, _ in sliders)
    print(f"http://127.0.0.1:{serving.server_port} shows {names}; Ctrl-C ends it", flush=True)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    with deferred_interrupt() as stop:
        while not stop():
            time.sleep(0.2)
    serving.shutdown()


if __name__ == "__main__":
    cli.run(main)
