"""The page in a real browser: dragging, keys and touch change the picture to the right frame."""

import json

import pytest
from browser import after
from PIL import Image

from support import page

COLOUR = """
    const $$ = id => document.getElementById(id);
    const colour = async () => {
        const image = $$('picture');
        await image.decode();
        const c = document.createElement('canvas'), x = c.getContext('2d');
        x.drawImage(image, 0, 0, 1, 1);
        return [...x.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
"""


def frames(rows, second, first):
    """A picture whose colour says which it is."""
    frame = lambda r, j, i: Image.new("RGB", (8, 8), (10 * i, 20 * j, 100 * r))
    row = lambda r, j: [frame(r, j, i) for i in range(first)]
    return [[row(r, j) for j in range(second)] for r in range(rows)]


def test_one_slider(tmp_path):
    text = page.render_page(
        "Age <of> a person",
        [("age", [-2.0, 0.0, 1.0, 2.0])],
        ["seed 0", "seed 1"],
        frames(2, 1, 4),
        [[["young", "plain", "older", "old"]]] * 2,
    )
    assert "Age &lt;of> a person" in text and "http" not in text
    script = """
        const seen = [[await colour(), $$('say').textContent]];
        const range = $$('range0');
        for (const value of [3, 0]) {
            range.value = value;
            range.dispatchEvent(new Event('input', {bubbles: true}));
            seen.push([await colour(), $$('say').textContent]);
        }
        const second = document.querySelectorAll('#seeds input')[1];
        second.click();
        seen.push([await colour(), $$('picture').alt]);
        const label = document.querySelector('label[for=range0]').textContent;
        const text = range.getAttribute('aria-valuetext');
        out = JSON.stringify({seen, label, text, plane: $$('plane').hidden})"""
    found = json.loads(after(text, COLOUR + script, tmp_path))
    assert found["seen"] == [
        [[10, 0, 0], "age 0: plain"],
        [[30, 0, 0], "age +2: old"],
        [[0, 0, 0], "age -2: young"],
        [[0, 0, 100], "seed 1, age -2"],
    ]
    assert found["label"] == "age" and found["text"] == "-2" and found["plane"]


def test_two_sliders_are_a_plane(tmp_path):
    text = page.render_page(
        "x",
        [("age", [-1.0, 0.0, 1.0]), ("smile", [-2.0, 0.0, 2.0, 4.0])],
        ["seed 0"],
        frames(1, 4, 3),
    )
    script = """
        const plane = $$('plane'), box = plane.getBoundingClientRect(), seen = [await colour()];
        const touch = {buttons: 1, pointerId: 1, bubbles: true, pointerType: 'touch'};
        const at = (kind, x, y) => {
            const clientX = box.left + x * box.width, clientY = box.top + y * box.height;
            plane.dispatchEvent(new PointerEvent(kind, {...touch, clientX, clientY}));
        };
        plane.setPointerCapture = undefined;
        at('pointerdown', 0.98, 0.02);
        seen.push(await colour());
        at('pointermove', -0.5, 0.66);
        seen.push(await colour());
        $$('range1').value = 0;
        $$('range1').dispatchEvent(new Event('input'));
        seen.push(await colour());
        const say = $$('say').textContent, left = $$('knob').style.left;
        out = JSON.stringify({seen, say, left, alone: $$('seeds').hidden})"""
    found = json.loads(after(text, COLOUR + script, tmp_path))
    assert found["seen"] == [[10, 20, 0], [20, 60, 0], [0, 20, 0], [0, 0, 0]]
    assert found["say"] == "age -1, smile -2" and found["left"] == "0%" and found["alone"]


def contrast(a, b):
    """WCAG 2's contrast of two colours."""

    def light(c):
        c = [int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear))

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    "ink, ground, accent", [("1a1a1a", "ffffff", "1f5fbf"), ("eeeeee", "161616", "7fb0ff")]
)
def test_colours_can_be_read(ink, ground, accent):
    short = lambda c: f"#{c[0]}{c[2]}{c[4]}" if c[0::2] == c[1::2] else f"#{c}"
    assert all(short(c) in page.TEMPLATE for c in (ink, ground, accent))
    assert contrast(ink, ground) > 7 and contrast(accent, ground) > 4.5


def test_a_title_of_the_template_s_own_words():
    text = page.render_page("DATA and TITLE", [("age", [0.0])], ["seed 0"], frames(1, 1, 1))
    assert "<h1>DATA and TITLE</h1>" in text and 'const data = {"sliders"' in text
