"""The preference study: the page in a real browser, and the sum of votes against sums by hand."""

import csv
import io
import json
from math import comb
from urllib.parse import unquote

import pytest
from browser import after
from PIL import Image

from experiments import preference
from extras import metrics


@pytest.fixture
def folders(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{i}.png")
    return tmp_path / "a", tmp_path / "b"


KEY = "const key = k => dispatchEvent(new KeyboardEvent('keydown', {key: k, cancelable: true}));"


def test_votes_in_a_browser(folders, tmp_path):
    """Always for the blue picture, wherever it is: every vote in the CSV is for b; one is taken
    back, one is for neither."""
    page = preference.page(*folders, "Which <is> better?", most=5)
    assert page.count('"name"') == 5 and "http" not in page
    assert str(tmp_path) not in page and "&lt;is>" in page
    script = """
        const blue = async image => {
          await image.decode();
          const c = document.createElement('canvas'), x = c.getContext('2d');
          x.drawImage(image, 0, 0, 1, 1);
          return x.getImageData(0, 0, 1, 1).data[2] > 128;
        };
        const seen = [];
        key('1'); key('Backspace');
        for (let i = 0; i < 5; i++) {
          const left = await blue(document.querySelector('#left img'));
          if (left === await blue(document.querySelector('#right img'))) throw 'both the same';
          seen.push(left);
          if (i === 4) key('0');
          else if (i === 3) document.getElementById(left ? 'left' : 'right').click();
          else key(left ? '1' : '2');
        }
        key('1');
        out = JSON.stringify({seen, over: !document.getElementById('end').hidden,
          csv: document.getElementById('download').href})"""
    found = json.loads(after(page, KEY + script, tmp_path))
    rows = list(csv.DictReader(io.StringIO(unquote(found["csv"].split(",", 1)[1]))))
    assert [r["choice"] for r in rows] == ["b"] * 4 + [""] and found["over"]
    assert [(r["left"] == "b") for r in rows] == found["seen"]
    assert len({r["pair"] for r in rows}) == 5 and len({r["rater"] for r in rows}) == 1
    (tmp_path / "votes.csv").write_text(unquote(found["csv"].split(",", 1)[1]))
    assert preference.count([tmp_path / "votes.csv"])["b"] == 4


def test_order_and_sides_differ_between_raters(folders, tmp_path):
    page = preference.page(*folders, "?", most=6)
    script = "out = order.map(o => o.pair.name + (o.flipped ? '-' : '+')).join()"
    orders = set()
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        orders.add(after(page, script, tmp_path / str(i)))
    assert len(orders) == 3


def write(path, votes):
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["rater", "pair", "left", "side", "choice"])
        out.writerows(votes)
    return path


def test_count(tmp_path):
    votes = [("x", i, "a", 2, "b") for i in range(8)]
    votes += [("x", 8, "a", 1, "a"), ("y", 8, "b", 2, "a"), ("y", 9, "a", 0, "")]
    one = write(tmp_path / "1.csv", votes)
    again = write(tmp_path / "2.csv", votes[:5])  # the same votes saved a second time
    found = preference.count([one, again])
    assert (found["a"], found["b"], found["neither"], found["raters"]) == (2, 8, 1, 2)
    assert found["p"] == pytest.approx(2 * (comb(9, 8) + 1) / 512)  # 8 pairs for b, one for a
    assert found["share"]["mean"] == pytest.approx(8 / 9)
    assert found["share"]["low"] < 8 / 9 < found["share"]["high"] == 1
    assert found["left"] == pytest.approx(0.1)
    # The bounds of Wilson's interval solve |k/n - p| = z sd(p).
    of_ten = metrics.wilson(8, 10)
    for p in (of_ten["low"], of_ten["high"]):
        assert abs(0.8 - p) == pytest.approx(1.96 * (p * (1 - p) / 10) ** 0.5)
    assert metrics.wilson(0, 7)["low"] == 0 and metrics.wilson(7, 7)["high"] == 1


def test_what_is_no_vote(tmp_path):
    with pytest.raises(ValueError, match="not a CSV of votes"):
        (tmp_path / "x.csv").write_text("a,b\n1,2\n")
        preference.count([tmp_path / "x.csv"])
    with pytest.raises(ValueError, match="only a, b and nothing"):
        preference.count([write(tmp_path / "y.csv", [("x", 1, "a", 1, "c")])])
    with pytest.raises(ValueError, match="no vote for either"):
        preference.count([write(tmp_path / "z.csv", [("x", 1, "a", 0, "")])])
