"""bench/published.py without the published trainers: what it changes in a clone, and what its
driver notes of any trainer."""

import json
import subprocess
import sys

import pytest
from torch import nn

import lora
from bench import published
from sdxl import SDXL
from support import training

TRAINER = """
import sys, torch
from safetensors.torch import save_file

class UNet2DConditionModel(torch.nn.Linear):
    pass

unet = UNet2DConditionModel(2, 2)
for i in range(2):
    with torch.no_grad():
        unet(torch.randn(3, 2))
    unet(torch.randn(1, 2)).sum().backward()
    torch.save({"x": torch.randn(1)}, f"{sys.argv[1]}/{i}.pt")
torch.save({"x": torch.randn(1)}, f"{sys.argv[1]}/optimizer.pt")
save_file({"x": torch.randn(1)}, f"{sys.argv[1]}/last.safetensors.tmp")
"""


def test_the_driver_counts_what_passes_through_the_unet(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log = tmp_path / f"{name}.log"
        rows = published.run(sys.executable, log, 7, [script, tmp_path / name])
        assert [(r["frozen"], r["trained"]) for r in rows] == [(3, 1), (6, 2), (6, 2)]
        assert [r["file"].rsplit("/")[-1] for r in rows] == ["0.pt", "1.pt", "last.safetensors"]
        assert 0 <= rows[0]["seconds"] <= rows[-1]["seconds"]
    same = [(tmp_path / name / "last.safetensors.tmp").read_bytes() for name in ("a", "b")]
    assert same[0] == same[1]  # the seed is the trainer's


def clone(folder, leave_out=""):
    for name, changes in published.SUBSTITUTIONS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{old}\n" for old, _ in changes if old != leave_out))
    return folder


def test_only_the_listed_text_is_changed_and_only_in_a_copy(tmp_path, capsys):
    theirs = clone(tmp_path / "theirs")
    before = {path: path.read_text() for path in theirs.rglob("*.py")}
    copy = tmp_path / "copy"
    published.copied(theirs, copy, "--authors", published.TEXT)
    published.substitute(copy)
    said = capsys.readouterr().out
    for name, changes in published.SUBSTITUTIONS.items():
        code = (copy / name).read_text()
        for old, new in changes:
            assert old not in code and new in code and repr(new) in said
    assert {path: path.read_text() for path in theirs.rglob("*.py")} == before


def test_another_version_of_their_code_is_named(tmp_path):
    theirs = clone(tmp_path / "theirs", leave_out=published.CPU[0])
    with pytest.raises(ValueError, match=r"train_lora_xl.py does not say .* another version"):
        published.substitute(theirs)
    with pytest.raises(ValueError, match="--authors: .*nowhere has no trainscripts/textsliders"):
        published.copied(tmp_path / "nowhere", tmp_path / "copy", "--authors", published.TEXT)


def test_their_prompts_are_our_words(tmp_path):
    entries = published.prompts_of("age", from_pairs=False)
    assert len(entries) == 4  # glasses and hats, with and without
    for entry in entries:
        p = entry["target"].removeprefix("a photo of a person")
        assert p and entry["neutral"] == entry["target"]
        assert entry["positive"] == f"a photo of a person, very old{p}"
        assert entry["unconditional"] == f"a photo of a person, very young{p}"
    published.authors(tmp_path, tmp_path, "age", False, 100, 100)
    assert json.loads((tmp_path / "prompts.yaml").read_text()) == entries


def test_ai_toolkit_has_our_words_rank_layers_and_eta(tmp_path):
    script, config = published.ai_toolkit(tmp_path, *[tmp_path] * 2, "age", 30, 10, seed=1)
    (process,) = json.loads(config.read_text())["config"]["process"]
    said = process["slider"]
    assert said["positive_prompt"] == "a photo of a person, very old"
    assert said["negative_prompt"] == "a photo of a person, very young"
    assert said["guidance_strength"] == training.ETA
    network = process["network"]
    assert network["linear"] == network["conv"] == 4 and network["linear_alpha"] == 4
    left_out = network["network_kwargs"]["ignore_if_contains"]
    unet = SDXL.load(device="cpu").unet
    whole = {n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    # What its network wraps: all linear layers and convolutions of these blocks.
    blocks = (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers.")
    theirs = {n for n in whole if any(b in n for b in blocks) and not any(x in n for x in left_out)}
    assert theirs == set(lora.target_layers(unet))
    assert process["train"]["steps"] == 30 and process["save"]["save_every"] == 10


def test_other_settings_do_not_go_into_the_committed_results(tmp_path, monkeypatch):
    command = ["x", "--authors", str(tmp_path), "--precision", "float32", "--ai-steps", "9"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="--ai-steps, --precision needs --json FILE"):
        published.main()


@pytest.mark.parametrize("option", ["--authors", "--ai-toolkit"])
def test_a_missing_clone_is_one_line(tmp_path, option):
    command = [sys.executable, "-m", "bench.published", option, str(tmp_path / "none")]
    command += ["--json", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=published.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and option in done.stderr
