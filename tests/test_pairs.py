"""Visual sliders: the pictures that go in, the teacher against its equation, and what the student
learns."""

import numpy as np
import pytest
import torch
from PIL import Image

import lora
import sampler
import train_pairs
from miniature import world
from support import images, training

SCALES = [-2.0, -1.0, 1.0]


@pytest.fixture(scope="module")
def latents(model):
    """(4, 3, 4, 16, 16): four faces at three eye sizes."""
    return torch.stack([encode(model, [7, i], (0.6, 0.8, 1.4)) for i in range(4)])


def encode(model, seed, eye_sizes):
    """Latents of one face with eyes of these sizes: (len(eye_sizes), 4, 16, 16)."""
    face = world.sample(np.random.default_rng(seed), kind="face", malformed=0)
    return model.encode([world.draw(face | {"eye_size": size}) for size in eye_sizes])


def collect(model, latents, scales=SCALES, **changes):
    settings = dict(noises=5, seed=3, batch=7) | changes
    cond = model.condition(["a photo of a person"])
    return train_pairs.collect(model, latents, torch.tensor(scales), cond, **settings)


def test_noise_and_level_are_the_same_within_a_pair_and_spread_over_the_schedule(model, latents):
    targets = collect(model, latents, target="noise")
    assert len(targets) == 60 and targets.scale.tolist() == SCALES * 20
    # (pair and noise, scale, ...)
    x_t, t, target = (x.unflatten(0, (20, 3)) for x in (targets.x_t, targets.t, targets.target))
    assert torch.equal(t[:, 0], t[:, 1])
    assert (t[:, 0].view(4, 5) // 200 == torch.arange(5)).all()
    a = model.alpha_bar[t].view(20, 3, 1, 1, 1)
    # x_t solved for its noise.
    eps = (x_t - a.sqrt() * latents.repeat_interleave(5, 0)) / (1 - a).sqrt()
    assert torch.allclose(eps, target, atol=1e-3 / (1 - a).sqrt().min())
    assert torch.equal(target[:, 0], target[:, 2])
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert not torch.allclose(eps[0], eps[1], atol=0.5)


def test_eps_0_is_the_frozen_models_prediction(model, latents):
    targets, cond = collect(model, latents), model.condition(["a photo of a person"])
    with torch.no_grad():
        for i in (0, 35):
            (eps,) = model.unet(targets.x_t[i : i + 1], targets.t[i : i + 1], *cond)
            assert torch.allclose(eps, targets.eps_0[i], atol=1e-4)


@pytest.mark.parametrize("scales", [[-1.0, 1.0], [-2.0, -1.0, 1.0], [0.0, 1.0], [1.0, 2.0, 4.0]])
def test_the_shared_prediction_is_the_lines_value_at_scale_0(scales):
    eps_0 = torch.randn(3, len(scales), 2, 4, 4)
    ours = train_pairs.shared_prediction(eps_0, torch.tensor(scales))
    # numpy's least squares: slope and value at 0.
    _, line = np.polyfit(scales, eps_0.transpose(0, 1).flatten(1).double().numpy(), 1)
    assert np.allclose(ours.flatten().numpy(), line, atol=1e-5)


def test_both_targets_ask_for_the_same_slider(latents):
    """For a slider that adds s * D and scales that sum to 0, the D that minimises the paper's loss
    and the one that minimises ours are the same, whatever eps is: gradient descent on each, in
    float64."""
    scales = torch.tensor([-2.0, 0.5, 1.5]).double()
    eps_0, eps = torch.randn(1, 3, 2, 4, 4).double(), torch.randn(1, 1, 2, 4, 4).double()
    found = []
    for target in (eps, train_pairs.shared_prediction(eps_0, scales).double()):
        D = torch.zeros(1, 1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(200):
            loss = (eps_0 + scales.view(1, -1, 1, 1, 1) * D - target).square().sum()
            (grad,) = torch.autograd.grad(loss, D)
            D = (D - 0.05 * grad).detach().requires_grad_()
        found.append(D.detach())
    assert torch.allclose(*found, atol=1e-6) and found[0].abs().max() > 0.1


@pytest.mark.slow
def test_the_student_learns_unseen_faces_in_the_direction_of_the_pairs(model):
    """The slider turned up must change the predicted picture towards bigger eyes: along z_B - z_A
    of a face it never saw."""
    latents = torch.stack([encode(model, [8, i], (0.6, 1.6)) for i in range(9)])
    train = collect(model, latents[1:], [-1.0, 1.0], noises=16, seed=0)
    held_out = collect(model, latents[:1], [-1.0, 1.0], noises=16, seed=1)
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet)).attach(model.unet)
    settings = dict(steps=80, batch=8, lr=1.3e-3)
    reading = training.fit_targets(model.unet, slider, train, held_out, **settings)
    t, a, uncond = torch.tensor([500]), model.alpha_bar[500], model.condition([""])
    x_t = sampler.add_noise(latents[0, :1], sampler.noise([99], (4, 16, 16)), t, model.alpha_bar)
    x_0 = []
    for scale in (-1.0, 1.0):
        with torch.no_grad(), slider.at(scale):
            x_0.append((x_t - (1 - a).sqrt() * model.unet(x_t, t, *uncond)) / a.sqrt())
    slider.detach()
    change, bigger_eyes = (x_0[1] - x_0[0]).flatten(), (latents[0, 1] - latents[0, 0]).flatten()
    along = torch.nn.functional.cosine_similarity(change, bigger_eyes, dim=0)
    assert reading["share"] > 0.1 and reading["cosine"] > 0.25 and along > 0.5


# ----------------------------------------------------------------------------------------- pictures


def test_every_kind_of_picture_is_read_as_a_viewer_shows_it(tmp_path):
    ramp = np.indices((20, 30)).sum(0) * 5
    rgb = Image.fromarray(ramp[..., None].repeat(3, -1).astype(np.uint8))
    grey = rgb.convert("L")
    rgb.save(tmp_path / "rgb.png"), grey.save(tmp_path / "grey.png")
    rgb.quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    clear, opaque = rgb.convert("RGBA"), np.where(np.arange(30) < 15, 0, 255).astype(np.uint8)
    clear.putalpha(Image.fromarray(opaque[None].repeat(20, 0)))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer turns the picture by 90 degrees
    rgb.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    for name, most in (("rgb", 0), ("grey", 0), ("palette", 8), ("deep", 0), ("turned", 0)):
        seen = images.read_image(tmp_path / f"{name}.png")
        assert seen.mode == "RGB" and seen.size == (30, 20), name
        assert np.abs(np.asarray(seen).astype(int) - np.asarray(rgb)).max() <= most, name
    seen = np.asarray(images.read_image(tmp_path / "clear.png"))
    assert (seen[:, :15] == 255).all() and (seen[:, 15:] == np.asarray(rgb)[:, 15:]).all()


def test_a_pair_of_other_sizes_is_cropped_alike(tmp_path):
    big = world.draw(world.sample(np.random.default_rng(1), kind="face")).resize((300, 200))
    big.save(tmp_path / "a.png")
    big.resize((150, 100), Image.Resampling.LANCZOS).save(tmp_path / "b.png")
    a, b = images.read_group([tmp_path / "a.png", tmp_path / "b.png"], (64, 64))
    assert a.size == b.size == (64, 64)
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() < 3


def bad_folders(root):
    """name of the case -> (what the line must name, its folders): each wrong in one way."""
    picture = Image.new("RGB", (64, 64), "white")
    for name in ("empty", "good", "more", "corrupt", "wide", "twice"):
        (root / name).mkdir()
    for name in ("good", "more", "corrupt", "wide", "twice"):
        picture.save(root / name / "1.png")
    picture.save(root / "more" / "extra.png")
    picture.save(root / "twice" / "1.jpg")
    (root / "corrupt" / "1.png").write_bytes((root / "good" / "1.png").read_bytes()[:60])
    picture.resize((128, 64)).save(root / "wide" / "1.png")
    (root / "empty" / "notes.txt").write_text("not a picture")
    return {
        "empty": "holds no pictures",
        "more": "extra.png: has no partner",
        "corrupt": "1.png: not a readable picture",
        "wide": "crop them to the same proportions",
        "twice": "has both",
        "nowhere": "no such folder",
    }


def test_what_cannot_be_paired_is_refused_by_name(tmp_path):
    for case, line in bad_folders(tmp_path).items():
        with pytest.raises(ValueError, match=line) as error:
            for files in images.match_by_name([tmp_path / "good", tmp_path / case]):
                images.read_group(files, (64, 64))
        assert case in str(error.value)


def test_slider_py_s_overviews_are_no_pictures_of_a_folder(tmp_path):
    names = ("seed0.png", "seed1.png", "strip.png", "sweep.gif")
    for folder, drawn in (("a", names), ("b", names[:2])):
        (tmp_path / folder).mkdir()
        for name in drawn:
            Image.new("RGB", (64, 64)).save(tmp_path / folder / name)
    groups = images.match_by_name([tmp_path / "a", tmp_path / "b"])
    assert [[file.name for file in group] for group in groups] == [[n, n] for n in names[:2]]
