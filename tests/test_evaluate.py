"""The measures of an edit against closed forms, and the real judges' code against the packages
that it stands on."""

import numpy as np
import pytest
import torch
from commands import run

from experiments.common import moved
from extras import metrics
from miniature import world
from miniature.judges import miniature_judges


@pytest.fixture(scope="module")
def judges(model):
    return miniature_judges(model)


def faces(n, **attributes):
    draws = [np.random.default_rng([77, i]) for i in range(n)]
    sampled = [world.sample(rng, kind="face", malformed=0) for rng in draws]
    return [world.draw(face | attributes) for face in sampled]


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2. And it does not care how the axes are
    turned."""
    rng = np.random.default_rng(0)
    m, s = np.array([0.5, -1.0, 2.0]), np.array([2.0, 0.5, 1.0])
    x, y = rng.normal(size=(200_000, 3)), m + s * rng.normal(size=(200_000, 3))
    expected = np.square(m).sum() + np.square(s - 1).sum()
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert metrics.frechet(x, y) == pytest.approx(expected, rel=0.01)
    assert metrics.frechet(x @ turn, y @ turn) == pytest.approx(expected, rel=0.01)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [metrics.interval(rng.normal(3.0, 2.0, 60), draws=300) for _ in range(300)]
    assert 0.90 < np.mean([i["low"] < 3.0 < i["high"] for i in intervals]) < 0.98
    width = np.mean([i["high"] - i["low"] for i in intervals])
    assert width == pytest.approx(2 * 1.96 * 2 / 60**0.5, rel=0.1)


def test_the_miniatures_judges_see_an_edit(judges):
    """Aged faces come closer to the words for it and no closer to the opposite; a larger edit is
    further away."""
    young, middle, old = (faces(24, age=a, glasses=0, hat=0) for a in (0.1, 0.4, 0.9))
    toward = metrics.clip_change(judges, young, old, "a photo of a person, very old")
    away = metrics.clip_change(judges, young, old, "a photo of a person, very young")
    assert metrics.interval(toward)["low"] > 0
    assert metrics.interval(away)["high"] < 0
    assert (metrics.lpips(judges, young, young) == 0).all()
    assert metrics.lpips(judges, young, middle).mean() < metrics.lpips(judges, young, old).mean()
    assert metrics.fid(judges, young, middle) < metrics.fid(judges, young, old)


def test_moved_reads_what_was_moved_in_units_of_its_range():
    before, after = faces(24, eye_size=0.8, smile=0.0), faces(24, eye_size=1.3, smile=0.4)
    found = moved(before, after, "eye_size")
    assert found["moved"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert found["worst_other"] == "smile"
    assert found["worst_other_moved"] == pytest.approx(0.2, abs=0.05) and found["malformed"] < 0.2


def test_real_lpips_is_the_packages_own(tmp_path):
    """On random AlexNet weights, from a file as a user without network would give it."""
    try:
        import lpips as package
        import torch_fidelity  # noqa: F401
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        pytest.skip(f"needs requirements-judges.txt: {error}")
    torch.manual_seed(0)
    alexnet = models.alexnet(weights=None)
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    reference = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for mine, theirs in zip(reference.net.parameters(), alexnet.features.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    judges = metrics.real_judges(alexnet=str(tmp_path / "alexnet.pth"))
    a, b = faces(2, age=0.1), faces(2, age=0.9)
    pixels = lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1
    x, y = (torch.stack([pixels(p) for p in pictures]) for pictures in (a, b))
    with torch.no_grad():
        expected = reference.eval()(x, y).flatten().numpy()
    assert np.allclose(metrics.lpips(judges, a, b), expected, rtol=1e-3) and (expected > 0).all()


def test_the_command(tmp_path):
    for name, age in (("young", 0.1), ("old", 0.9)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(faces(3, age=age)):
            picture.save(tmp_path / name / f"{i}.png")
    edited = f"--edited {tmp_path}/old --judges miniature"
    command = f"-m extras.evaluate --original {tmp_path}/young {edited} --prompt 'an old person'"
    done = run(f"{command} --json {tmp_path / 'r.json'}")
    assert done.returncode == 0 and "3 pairs" in done.stdout, done.stderr
    assert "clip_change" in (tmp_path / "r.json").read_text()
    again = run(f"{command} --json {tmp_path / 'r.json'}")
    assert again.returncode == 2 and "r.json: is there already" in again.stderr
    for name in ("young", "old"):
        (tmp_path / name / "1.png").unlink(), (tmp_path / name / "2.png").unlink()
    done = run(command)
    assert done.returncode == 0 and "lpips" in done.stdout and "it needs two pairs" in done.stdout
    done = run(f"-m extras.evaluate --original {tmp_path}/nowhere {edited} --prompt x")
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr


def test_other_weights_than_alexnets_are_one_line(tmp_path):
    pytest.importorskip("lpips")
    (tmp_path / "x.pth").write_bytes(b"no weights")
    try:
        judges = metrics.real_judges(alexnet=str(tmp_path / "x.pth"))
    except ValueError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="--alexnet .*x.pth: no such weights"):
        metrics.lpips(judges, faces(1), faces(1))
