"""The page that draws while one drags: what it answers, to whom, and what it refuses."""

import io
import json
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from browser import after
from PIL import Image

import lora
import slider
from extras import live


@pytest.fixture(scope="module")
def served(model):
    one = lora.Slider(lora.target_layers(model.unet, "xattn")).requires_grad_(False)
    for name, p in one.named_parameters():
        if "lora_up" in name:
            p.data.normal_(std=0.3)
    serving = live.make_server(
        model, [("one", one, (-2.1, 3.0))], "a person", 0, steps=2, guidance=1.0
    )
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}", one
    serving.shutdown()


def get(address, **headers):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(address, headers=headers), timeout=60)


def test_what_is_asked_for_is_drawn(model, served):
    address, one = served
    for scale, prompt in ((0.0, "a person"), (2.0, "a hat")):
        answer = get(f"{address}/picture?seed=3&s0={scale}&prompt={prompt.replace(' ', '%20')}")
        seen = np.asarray(Image.open(io.BytesIO(answer.read())))
        expected = slider.generate(model, prompt, [3], [(one, scale)], steps=2, guidance=1.0)[0]
        assert np.array_equal(seen, np.asarray(expected))
    assert not one.handles  # the model is left as it was


def test_the_page_names_the_sliders(served):
    text = get(served[0]).read().decode()
    assert '"sliders": [{"name": "one", "low": -2.1, "high": 3.0}]' in text
    assert "http" not in text.split("<script>")[1]


def test_dragging_draws(model, served, tmp_path):
    """In a real browser: the slider dragged to 2 by its keys or the mouse, the picture that is
    then shown is the slider's at 2."""
    script = """
        const say = document.getElementById("say"), picture = document.getElementById("picture");
        const range = document.querySelector("input[type=range]");
        const drawn = async () => {
            while (say.textContent.startsWith("drawing") || !picture.naturalWidth)
                await new Promise(r => setTimeout(r, 20));
            await picture.decode();
        };
        await drawn();
        const before = say.textContent;
        for (const value of [0.5, 1, 2]) {
            range.value = value;
            range.dispatchEvent(new Event("input", {bubbles: true}));
        }
        await drawn();
        const c = document.createElement("canvas"), x = c.getContext("2d");
        c.width = picture.naturalWidth;
        c.height = picture.naturalHeight;
        x.drawImage(picture, 0, 0);
        const pixels = [...x.getImageData(0, 0, c.width, c.height).data];
        const label = range.closest("label").textContent;
        out = JSON.stringify({before, after: say.textContent, label, pixels})"""
    seen = json.loads(after(served[0], script, tmp_path))
    settings = dict(steps=2, guidance=1.0)
    (picture,) = slider.generate(model, "a person", [0], [(served[1], 2.0)], **settings)
    expected = np.asarray(picture.convert("RGBA"))
    assert (seen["before"], seen["after"], seen["label"]) == ("one 0", "one 2", "one")
    assert np.array_equal(np.reshape(seen["pixels"], expected.shape), expected)


NONSENSE = [
    ("/picture?seed=-1", 400),
    ("/picture?s0=x", 400),
    ("/picture?s0=nan", 400),
    ("/etc/passwd", 404),
]


@pytest.mark.parametrize("path, status", NONSENSE)
def test_nonsense_is_answered_and_the_server_goes_on(served, path, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(served[0] + path)
    assert error.value.code == status
    assert get(served[0]).status == 200


def test_pages_elsewhere_cannot_ask(served):
    """A name of somebody else's that leads to this machine."""
    with pytest.raises(urllib.error.HTTPError) as error:
        get(served[0], Host="evil.example:8000")
    assert error.value.code == 403
