"""What the experiments share: results that survive a stop, sliders trained once, tables made of
the committed results."""

import json
import os
import sys

import numpy as np
import pytest
import torch

import lora
from experiments import __main__ as everything
from experiments import claims, common, report
from experiments.common import Lab
from miniature import world


@pytest.fixture
def lab(tmp_path, monkeypatch):
    def make(*words):
        folders = ["--out", f"{tmp_path}/results", "--sliders", f"{tmp_path}/sliders"]
        monkeypatch.setattr(sys, "argv", ["x", "--pictures", "2", *folders, *words])
        return Lab("", "name")

    return make


def test_what_is_done_is_not_done_again(lab, tmp_path):
    first = lab()
    assert first.once("a", lambda: {"x": 1}) == {"x": 1}
    with pytest.raises(RuntimeError):
        first.once("b", lambda: exec("raise RuntimeError"))
    again = lab()
    assert again.once("a", lambda: pytest.fail("made again")) == {"x": 1}
    assert again.once("b", lambda: 2) == 2
    # Not the default's number of pictures: not the committed file.
    written = tmp_path / "results" / "name_2_pictures.json"
    assert json.loads(written.read_text()) == {"a": {"x": 1}, "b": 2}
    assert lab("--seed", "1").once("a", lambda: 3) == 3  # another seed, another file
    assert (tmp_path / "results" / "name_seed1_2_pictures.json").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_failure_does_not_stop_the_others(tmp_path, monkeypatch, jobs):
    model = "a model"
    for name, value in dict(
        RESULTS=tmp_path,
        DONE=tmp_path / "done.txt",
        SLIDERS=tmp_path / "sliders",
        ALL=["a --seed 0", "b --seed 0", "c --seed 0"],
    ).items():
        monkeypatch.setattr(everything, name, value)
    monkeypatch.setattr(everything.hashes, "files_hash", lambda files: model)
    monkeypatch.setattr(everything.report, "main", lambda: None)
    monkeypatch.setattr(everything.claims, "main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["x", "--jobs", str(jobs)])
    ran = []
    fails = lambda line: ran.append(line) or int(line.startswith("b"))
    monkeypatch.setattr(everything, "run", fails)
    threads = torch.get_num_threads(), dict(os.environ)
    (tmp_path / "old.json").write_text("another model's")
    for _ in range(2):
        with pytest.raises(SystemExit, match="failed: python -m experiments.b --seed 0"):
            everything.main()
    torch.set_num_threads(threads[0])
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= threads[1]
    assert sorted(ran) == ["a --seed 0", "b --seed 0", "b --seed 0", "c --seed 0"]
    assert not (tmp_path / "old.json").exists()


def test_directions_of_two_seeds_are_not_put_into_one_row():
    slider = dict(share=0.1, words=["+ a"], moved=0.5, next="hat", next_moved=0.1, along=[0.0])
    slider |= dict(cosine=0.9, monotonic=True)

    def run(attribute):
        sliders = [slider | {"attribute": attribute}]
        return {"independent": {"sliders": sliders, "mean_cosine": 0.9, "between": 0.1}}

    table = report.space(run("skin"), run("smile"))
    assert "| skin 50% |" in table and "| smile 50% |" in table and "skin 50%<br>" not in table


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_seed_that_was_stopped_waits_beside_the_other(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setitem(report.KINDS, "x", lambda found: " ".join(found))
    for seed, name in enumerate(("x.json", "x_seed1.json")):
        rows = {"a": 1} if seed == stopped else {"a": 1, "b": 2}
        (tmp_path / name).write_text(json.dumps(rows))
    assert report.filled("x") == "a b"


def test_sliders_are_trained_once(lab, monkeypatch):
    here, settings = lab(), dict(steps=1, trajectories=1)
    one = here.text_slider("smile", **settings)
    trained_again = lambda *_, **__: pytest.fail("trained again")
    monkeypatch.setattr(common.training, "fit_targets", trained_again)
    again = here.text_slider("smile", **settings)
    assert all((a == b).all() for a, b in zip(one.parameters(), again.parameters()))


@pytest.mark.slow
def test_full_fine_tuning_has_a_scale(lab):
    here = lab()
    full = here.text_slider("smile", full=True, lr=here.recipe["lr"] / 400, steps=2, trajectories=2)
    names = {lora.kohya_name(name) for name in lora.target_layers(here.model.unet)}
    assert {name for name, _ in full.named_children()} == names
    assert any(p.abs().max() > 0 for p in full.parameters())
    plain, changed = here.draw([[(full, 0.0)], [(full, 2.0)]], steps=3)
    assert here.draw([[]], steps=3)[0][0].tobytes() == plain[0].tobytes() != changed[0].tobytes()


def test_an_edit_is_measured(lab):
    here = lab()
    (before,) = here.draw([[]], steps=4)
    nothing = here.edit("smile", before, before)
    measured = [nothing[name]["mean"] for name in ("clip_change", "lpips", "moved")]
    assert [*measured, nothing["worst_other_moved"]] == [0, 0, 0, 0]
    faces = [world.sample(np.random.default_rng(i), kind="face", malformed=0) for i in range(8)]
    drawn = [[world.draw(a | {"smile": smile}) for a in faces] for smile in (-0.8, 0.8)]
    found = here.edit("smile", *drawn)
    assert found["moved"]["mean"] == pytest.approx(0.8, abs=0.1)
    assert found["worst_other_moved"] < 0.1 and found["clip_change"]["mean"] > 0


def test_the_tables_in_the_docs_are_of_the_committed_results(tmp_path, monkeypatch):
    """Filling the pages again changes nothing: no figure in them was written by hand, or is of an
    older run."""
    copies = [tmp_path / page.name for page in report.PAGES]
    before = [page.read_text() for page in report.PAGES]
    for copy, text in zip(copies, before):
        copy.write_text(text)
    monkeypatch.setattr(report, "PAGES", copies)
    report.main()
    assert [copy.read_text() for copy in copies] == before
    committed = {f.stem for f in common.RESULTS.glob("*.json") if "_seed" not in f.stem}
    assert set(report.KINDS) >= committed


def test_a_table_of_two_seeds_has_both_values_where_they_differ():
    one = report.table(" | moved | in order", [["age", "70%", "yes"], ["smile", "61%", "yes"]])
    two = report.table(" | moved | in order", [["age", "72%", "no"], ["smile", "61%", "yes"]])
    lines = report.both(one, two).splitlines()
    assert lines[:2] == one.splitlines()[:2] and lines[3] == one.splitlines()[3]
    assert lines[2] == "| age | 70%<br>72% | yes<br>no |"
    with pytest.raises(ValueError):  # tables of other rows are not of two seeds
        report.both(one, two.splitlines()[0])


def test_a_sentence_that_the_results_do_not_bear_out_is_named(tmp_path, monkeypatch):
    methods = {"slider, scale 2": 6.0, "prompt": 12.0}
    row = lambda value: {"clip_change": {"mean": value}, "lpips": {"mean": value / 4}}
    results = {
        f"{concept}: {method}": row(value) | {"mean_other_moved": value / 100}
        for concept in claims.CONCEPTS
        for method, value in methods.items()
    }
    (tmp_path / "text_sliders.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "CLAIMS", (claims.text_sliders,))
    reach = "at scale 2 the sliders reach 50% of prompting's change in CLIP score at 0.50 times"
    page = f"In the order the paper finds: {reach}\nits LPIPS, and move the mean of the other\n"
    page += "attributes by 50% as much."
    assert claims.broken(page) == []
    (missing,) = claims.broken(page.replace("reach 50%", "reach 60%"))
    assert missing.startswith("text_sliders: at scale 2 the sliders reach 50% of")
