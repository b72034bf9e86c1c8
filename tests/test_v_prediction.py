"""v-prediction and zero terminal SNR: against closed forms, diffusers' DDIM scheduler and pipeline,
and the miniature turned into a v-network."""

import json
import warnings

import numpy as np
import pytest
import torch
import v_network
from commands import TRAIN, run
from safetensors import safe_open
from test_networks import relative_error
from test_weights import one_file
from torch import nn

import invert
import lora
import sampler
import slider
import student
import train_pairs
import train_space
import train_text
from formats import schedule, single_file, weights
from miniature import world
from sdxl import MINIATURE, SDXL
from support import inversions, training

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
ZERO_SNR = sampler.make_alpha_bar(CONFIG | {"rescale_betas_zero_snr": True})
COND = (torch.zeros(1), torch.zeros(1), torch.zeros(1))


@pytest.fixture(scope="module")
def v_model(model, tmp_path_factory):
    """The miniature as a v-network on its own schedule: to draw and train as the miniature does."""
    return v_network.load(tmp_path_factory.mktemp("v") / "m", model.alpha_bar)


@pytest.fixture(scope="module")
def zero_snr_model(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("z") / "m"
    return v_network.load(path, model.alpha_bar, **v_network.ZERO_SNR)


# ----------------------------------------------------------------------------------------- schedule


def their_scheduler(**settings):
    diffusers = pytest.importorskip("diffusers")
    ends = dict(set_alpha_to_one=False, clip_sample=False, steps_offset=1)
    return diffusers.DDIMScheduler(**CONFIG, **ends, **settings)


def test_zero_terminal_snr_is_diffusers_rescaling_and_ends_just_above_0():
    theirs = their_scheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert torch.allclose(ZERO_SNR[:-1], theirs[:-1], rtol=1e-3, atol=1e-7)
    assert theirs[-1] == 0 and 0 < ZERO_SNR[-1] < 1e-6 and (ZERO_SNR.diff() < 0).all()
    plain = sampler.make_alpha_bar(CONFIG)
    assert torch.allclose(ZERO_SNR[0], plain[0]) and plain[-1] > 1e-3


@pytest.mark.parametrize("spacing", schedule.SPACINGS)
@pytest.mark.parametrize("steps", [2, 4, 7, 20, 30, 50, 77, 500, 1000])
def test_spacings_agree_with_diffusers(spacing, steps):
    theirs = their_scheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    beyond = int(theirs.timesteps[0]) - 999  # theirs asks for level 1000 of leading's 1000 steps
    levels = [t - max(beyond, 0) for t in theirs.timesteps.tolist()]
    assert sampler.timesteps(steps, spacing=spacing) == levels


# ---------------------------------------------------------------------------------------- one place


class Gaussian(nn.Module):
    """The exact v for data x_0 ~ N(mean, std^2), computed in float64 and rounded to `dtype`, which
    is also all that it sees of x_t: what a half-precision UNet does at best."""

    def __init__(self, alpha_bar, mean, std, dtype):
        super().__init__()
        self.alpha_bar, self.mean, self.std, self.dtype = alpha_bar.double(), mean, std, dtype

    def forward(self, x_t, t, *cond):
        a, x = self.alpha_bar[t].view(-1, 1, 1, 1), x_t.to(self.dtype).double()
        eps = (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)
        x_0 = self.mean + a.sqrt() * self.std**2 * (x - a.sqrt() * self.mean) / (
            a * self.std**2 + 1 - a
        )
        return (a.sqrt() * eps - (1 - a).sqrt() * x_0).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_eps_and_the_implied_x_0_are_those_of_the_closed_form(dtype):
    """At every kind of level, the last included, where alpha_bar is 2^-28."""
    unet = Gaussian(ZERO_SNR, 0.7, 0.3, dtype)
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([999, 998, 990, 700, 300, 10, 0])
    a = ZERO_SNR[t].double().view(-1, 1, 1, 1)
    x_0, eps = torch.randn(2, 7, 4, 5, 5, generator=g, dtype=torch.float64)
    x_t = (a.sqrt() * (0.7 + 0.3 * x_0) + (1 - a).sqrt() * eps).to(dtype)
    v = unet(x_t, t).double()
    sampler.convert_v_to_eps(unet, ZERO_SNR)
    predicted = unet(x_t, t)
    assert predicted.dtype == torch.promote_types(dtype, torch.float32)
    exact = a.sqrt() * v + (1 - a).sqrt() * x_t.double()
    assert torch.allclose(predicted.double(), exact, atol=1e-6)
    # x_0 = sqrt(a) x_t - sqrt(1 - a) v, whatever eps was rounded to on the way.
    implied = sampler.implied_x_0(sampler.at_least_float32(x_t), predicted, a.to(predicted.dtype))
    exact = a.sqrt() * x_t.double() - (1 - a).sqrt() * v
    assert (implied.double() - exact).abs().max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sampler_s_x_t_stay_exact_for_a_half_precision_v_model(dtype):
    """The same network that rounds its v to `dtype` and one that rounds nothing, from pure noise:
    the pictures differ by what v's own rounding makes, not by 1 / sqrt(alpha_bar) times it."""
    x_T = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = []
    for kind in (dtype, torch.float64):
        unet, seen = Gaussian(ZERO_SNR, 0.7, 0.3, kind), []
        sampler.convert_v_to_eps(unet, ZERO_SNR)
        steps = sampler.timesteps(20, spacing="trailing")
        settings = dict(alpha_bar=ZERO_SNR, steps=steps, guidance=7.0)
        settings["on_step"] = lambda i, t, x_t, eps: seen.append(x_t.dtype)
        drawn.append(sampler.sample(unet, x_T.to(kind), COND, COND, **settings))
        assert drawn[-1].dtype == torch.promote_types(kind, torch.float32)
        assert set(seen[1:]) == {drawn[-1].dtype}
    rounding = torch.finfo(dtype).eps
    assert (drawn[0] - drawn[1]).abs().max() < max(3 * rounding, 1e-4)


def test_a_plain_model_is_left_alone(model):
    assert model.prediction == "epsilon" and model.spacing == "leading"
    assert not model.unet._forward_hooks


# ----------------------------------------------------------------------------------- whole pictures


def test_the_wrapped_miniature_draws_what_the_miniature_does(model, v_model):
    names = v_model.unet.state_dict().keys()
    assert names == model.unet.state_dict().keys() and v_model.prediction == "v"
    x_T = sampler.noise([0, 1], (4, 8, 8))
    prompts = model.condition([TARGET] * 2, (64, 64)), model.condition([""], (64, 64))
    settings = dict(alpha_bar=model.alpha_bar, steps=8, guidance=5.0)
    ours = sampler.sample(v_model.unet, x_T, *prompts, **settings)
    assert relative_error(ours, sampler.sample(model.unet, x_T, *prompts, **settings)) < 1e-3


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_whole_picture_agrees_with_diffusers_ddim_scheduler(zero_snr, v_model, zero_snr_model):
    """diffusers' scheduler takes v as the network returns it; guidance is of v's too."""
    ours = zero_snr_model if zero_snr else v_model
    spacing = dict(timestep_spacing=ours.spacing, rescale_betas_zero_snr=zero_snr)
    theirs = their_scheduler(prediction_type="v_prediction", **spacing)
    assert ours.spacing == ("trailing" if zero_snr else "leading")
    x_T = sampler.noise([3, 4], (4, 8, 8))
    prompts = ("a photo of an old man", "")
    cond, uncond = (ours.condition([text] * 2, (64, 64)) for text in prompts)
    theirs.set_timesteps(10)
    x = x_T
    with torch.no_grad():
        for t in theirs.timesteps:
            v_c, v_u = (ours.unet.forward(x, t.repeat(2), *c) for c in (cond, uncond))
            x = theirs.step(v_u + 5.0 * (v_c - v_u), t, x).prev_sample
    steps = sampler.timesteps(10, spacing=ours.spacing)
    settings = dict(alpha_bar=ours.alpha_bar, steps=steps, guidance=5.0)
    drawn = sampler.sample(ours.unet, x_T, cond, uncond, **settings)
    assert relative_error(drawn, x) < 1e-3
    assert drawn.std() > 0.3  # a picture


@pytest.mark.slow
@pytest.mark.parametrize("said", [{}, v_network.ZERO_SNR], ids=["plain", "zero SNR"])
def test_a_whole_picture_agrees_with_diffusers_pipeline(said, tmp_path):
    """On one folder that says v-prediction. Its UNet is the miniature's own, whose output is taken
    for v: no picture that one would look at, but one that both must make alike."""
    diffusers = pytest.importorskip("diffusers")
    path = v_network.folder(tmp_path / "m", prediction_type="v_prediction", **said)
    ours = SDXL.load(path, device="cpu", dtype=torch.float32)
    options = dict(torch_dtype=torch.float32, add_watermarker=False)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(path, **options)
    x_T, prompt = sampler.noise([7], (4, 16, 16)), "a photo of an old man with glasses"
    settings = dict(num_inference_steps=20, guidance_scale=5.0, height=128, width=128)
    theirs = theirs(prompt=[prompt], latents=x_T, output_type="latent", **settings).images
    steps = sampler.timesteps(20, spacing=ours.spacing)
    settings = dict(alpha_bar=ours.alpha_bar, steps=steps, guidance=5.0)
    prompts = ours.condition([prompt]), ours.condition([""])
    assert relative_error(sampler.sample(ours.unet, x_T, *prompts, **settings), theirs) < 1e-3


def test_generate_begins_at_pure_noise(zero_snr_model):
    """slider.generate spaces its levels as the scheduler's config asks."""
    seen = []
    look = lambda unet, inputs: seen.append(int(inputs[1][0]))
    handle = zero_snr_model.unet.register_forward_pre_hook(look)
    slider.generate(zero_snr_model, "a man", [0], steps=4, size=(64, 64))
    handle.remove()
    assert seen == [999, 749, 499, 249]


# ------------------------------------------------------------------------------ trainers, inversion

TARGET, POS, NEG = "a photo of a person", "a photo of an old person", "a photo of a young person"


def teach(model, **changes):
    prompts = train_text.encode(model, [TARGET], POS, NEG, [], (64, 64))
    settings = dict(eta=2.0, trajectories=2, per_trajectory=4, denoising_steps=8, guidance=3.0)
    settings |= dict(size=(64, 64), seed=5, batch=8) | changes
    return train_text.collect(model, prompts, **settings)


def test_the_text_teacher_s_targets_are_the_plain_model_s(model, v_model):
    plain, ours = teach(model), teach(v_model)
    assert torch.equal(plain.t, ours.t)
    for name in ("x_t", "eps_0", "target"):
        assert relative_error(getattr(ours, name), getattr(plain, name)) < 1e-3, name
    assert relative_error(ours.delta, plain.delta) < 1e-2


def fit(model, train, held_out, **settings):
    torch.manual_seed(0)
    made = lora.Slider(lora.target_layers(model.unet)).attach(model.unet)
    reading = training.fit_targets(model.unet, made, train, held_out, **settings)
    made.detach()
    return reading


def test_a_few_steps_of_a_text_slider_are_the_plain_model_s(model, v_model):
    settings = dict(steps=6, batch=4, lr=1.3e-3)
    here = [
        (m, teach(m, trajectories=1), teach(m, trajectories=1, seed=6)) for m in (model, v_model)
    ]
    plain, ours = (fit(*parts, **settings) for parts in here)
    assert plain["share"] > 0.01
    for name in ("share", "cosine", "loss"):
        assert ours[name] == pytest.approx(plain[name], rel=0.02), name


@pytest.mark.slow
def test_a_text_slider_on_a_v_network_reaches_what_the_plain_one_does(
    model, v_model, zero_snr_model
):
    """As train_text.py does it, on half of its x_t. All are read on the plain model's held-out
    x_t, as what a zero-SNR model visits has other noise levels."""
    readings, held_out, ends = [], None, (f"{TARGET}, very old", f"{TARGET}, very young")
    for m in (model, v_model, zero_snr_model):
        preserve = ["with glasses", "without glasses"]
        prompts = train_text.encode(m, [TARGET], *ends, preserve, (128, 128))
        settings = dict(eta=0.5, size=(128, 128), batch=32)
        train, unseen = train_text.teach(m, prompts, seed=0, trajectories=8, **settings)
        held_out = held_out or unseen
        torch.manual_seed(0)
        made = lora.Slider(lora.target_layers(m.unet)).attach(m.unet)
        training.fit_targets(m.unet, made, train, unseen, steps=40, batch=8, lr=4e-3)
        made.detach()
        made.attach(model.unet)
        readings.append(student.meter(model.unet, made, held_out, 32))
        made.detach()
    plain, ours, zero = readings
    for kind, reading in zip(("plain", "v", "v, zero SNR"), readings):
        print(f"{kind}: share {reading['share']:.2f}, cosine {reading['cosine']:.2f}")
    assert plain["share"] > 0.5 and plain["cosine"] > 0.85
    for name in ("share", "cosine"):
        assert ours[name] == pytest.approx(plain[name], abs=0.02), name
        assert zero[name] == pytest.approx(plain[name], abs=0.08), name


def test_pairs_at_every_level_of_a_zero_snr_model(zero_snr_model):
    """Their targets are finite, and at level 999 the frozen model's eps is x_t."""
    m, g = zero_snr_model, torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2, 4, 8, 8, generator=g)
    x_0, eps = latents[0], sampler.noise([0], (4, 8, 8)).expand(2, -1, -1, -1)
    last = torch.tensor([999, 999])
    x_t = sampler.add_noise(x_0, eps, last, m.alpha_bar)
    assert torch.allclose(x_t, eps, atol=2e-3) and not torch.equal(x_t, eps)
    cond = m.condition([TARGET], (64, 64))
    with torch.no_grad():
        predicted = m.unet(x_t, last, *sampler.expand(cond, 2))
    assert torch.allclose(predicted, x_t, atol=2e-3)
    targets = train_pairs.collect(
        m, latents, torch.tensor([-1.0, 1.0]), cond, noises=12, seed=0, batch=24
    )
    assert targets.t.max() > 900 and targets.delta.isfinite().all() and targets.delta.norm() > 0
    made = lora.Slider(lora.target_layers(m.unet)).attach(m.unet)
    loss = student.make_loss(m.unet, made, targets)(torch.arange(4))
    loss.sum().backward()
    made.detach()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_sliderspace_sees_minus_v_at_pure_noise(zero_snr_model):
    """Its loss is of the predicted x_0, which is -v there, with a finite gradient."""
    m = zero_snr_model
    space = train_space.Space.__new__(train_space.Space)
    space.model, space.guidance, space.alpha_bar = m, 1.0, m.alpha_bar
    space.x_t, space.t = sampler.noise([0, 1], (4, 8, 8)), torch.tensor([999, 999])
    space.prompt = torch.zeros(2, dtype=torch.long)
    space.cond = space.uncond = m.condition([TARGET], (64, 64))
    made = lora.Slider(lora.target_layers(m.unet)).attach(m.unet)
    made.scale = 1.0
    x_0 = space.predict_x_0(torch.arange(2))
    x_0.square().mean().backward()
    made.scale = 0.0
    made.detach()
    with torch.no_grad():
        v = m.unet.forward(space.x_t, space.t, *sampler.expand(space.cond, 2))
    assert (x_0 + v).abs().max() < 5e-3
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.norm() > 0 for g in gradients)


def test_inversion_climbs_to_pure_noise_and_leads_back(zero_snr_model):
    """On levels as the scheduler's config asks. A step up is only nearly a step down backwards; the
    one onto pure noise, where eps is x_t, leads a little further astray."""
    m = zero_snr_model
    cond, uncond = m.condition([TARGET], (64, 64)), m.condition([""], (64, 64))
    steps = sampler.timesteps(40, spacing=m.spacing)
    settings = dict(alpha_bar=m.alpha_bar, steps=steps)
    x_0 = sampler.sample(m.unet, sampler.noise([0], (4, 8, 8)), cond, guidance=1, **settings)
    way = sampler.ddim_inversion(m.unet, x_0, cond, **settings)
    assert way.isfinite().all()
    again = sampler.sample(m.unet, way[0], cond, guidance=1, **settings)
    assert (again - x_0).norm() < 0.3 * x_0.norm()
    settings = dict(alpha_bar=m.alpha_bar, guidance=3.0, inner=2)
    null = invert.null_text(m.unet, way[[0, 1, -1]], steps[:2], cond, uncond, **settings)
    assert all(part.isfinite().all() for parts in null.uncond for part in parts)
    assert not torch.equal(null.uncond[0][0], uncond[0])  # the step from pure noise is fitted


@pytest.mark.slow
def test_null_text_inversion_of_a_picture_from_pure_noise(model, zero_snr_model):
    """With guidance it comes back about as near as on the plain model."""
    rng = np.random.default_rng(5)
    face = world.sample(rng, kind="face", malformed=0)
    picture, caption, off = world.draw(face), world.caption(face, rng), []
    for m in (model, zero_snr_model):
        z, cond, uncond = m.encode([picture]), m.condition([caption]), m.condition([""])
        settings = dict(alpha_bar=m.alpha_bar, steps=sampler.timesteps(20, spacing=m.spacing))
        settings |= dict(guidance=5.0)
        found = invert.invert(m.unet, z, cond, uncond, **settings)
        again = sampler.sample(m.unet, found.x_T, cond, found.uncond, **settings)
        off.append(((again - z).norm() / z.norm()).item())
    plain, from_pure_noise = off
    assert plain < 0.05 and from_pure_noise < 1.5 * plain + 0.01, off


def test_all_of_it_in_bfloat16(tmp_path):
    """x_t and eps are float32 all the same: teachers, meter, inversion and edits take them so. What
    is drawn is the float32 model's, as nearly as bfloat16's weights allow."""
    said = dict(prediction_type="v_prediction", **v_network.ZERO_SNR)
    path, drawn = v_network.folder(tmp_path / "m", **said), []
    for dtype in (torch.float32, torch.bfloat16):
        m = SDXL.load(path, device="cpu", dtype=dtype)
        settings = dict(alpha_bar=m.alpha_bar, steps=sampler.timesteps(4, spacing=m.spacing))
        cond, uncond = m.condition([TARGET], (64, 64)), m.condition([""], (64, 64))
        x_T = sampler.noise([0], (4, 8, 8), dtype=dtype)
        drawn.append(sampler.sample(m.unet, x_T, cond, uncond, guidance=1, **settings))
    x_0 = drawn[1]
    assert x_0.dtype == torch.float32 and relative_error(x_0, drawn[0]) < 0.1
    targets = teach(m, trajectories=1, per_trajectory=2, denoising_steps=2)
    assert targets.t.tolist() == [999, 499] * 2
    assert {targets.x_t.dtype, targets.target.dtype} == {torch.float32}
    made = lora.Slider(lora.target_layers(m.unet)).attach(m.unet)
    student.make_loss(m.unet, made, targets)(torch.arange(2)).sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())
    made.detach()
    few = dict(guidance=3.0, inner=1)
    found = invert.invert(m.unet, m.encode([m.decode(x_0)[0]]), cond, uncond, **few, **settings)
    assert found.x_T.dtype == torch.float32
    assert {part.dtype for part in found.uncond[0]} == {torch.bfloat16}
    slider.generate(m, TARGET, [0], steps=2, size=(64, 64))


# -------------------------------------------------------------------------- what a model says of it


def test_a_folder_says_it_and_the_option_overrules(tmp_path):
    said = dict(prediction_type="v_prediction", **v_network.ZERO_SNR)
    path = v_network.folder(tmp_path / "v", **said)
    load = lambda path, **options: SDXL.load(path, device="cpu", vae=False, **options)
    ours = load(path)
    assert (ours.prediction, ours.spacing) == ("v", "trailing")
    assert torch.equal(ours.alpha_bar, ZERO_SNR)
    with pytest.warns(
        UserWarning, match="--prediction epsilon: this model says that it predicts v"
    ):
        assert load(path, prediction="epsilon").prediction == "epsilon"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load(MINIATURE, prediction="v")
        load(MINIATURE, prediction="epsilon")
    assert (ours.prediction, ours.spacing) == ("v", "leading")
    assert len(ours.unet._forward_hooks) == 1
    with pytest.raises(ValueError, match="prediction: 'x' is neither"):
        load(MINIATURE, prediction="x")


@pytest.mark.parametrize("kind", ["sample", "flow_prediction", None, ["v"]])
def test_other_predictions_are_refused(kind):
    with pytest.raises(ValueError, match="prediction_type .* is not supported; --prediction"):
        schedule.check(CONFIG | {"prediction_type": kind})
    assert schedule.check(CONFIG | {"prediction_type": kind}, "v")["prediction_type"] == "v"


@pytest.mark.parametrize(
    "odd, what",
    [
        ({"beta_schedule": "linear"}, "beta_schedule"),
        ({"beta_start": None}, "missing or odd numbers"),
        ({"num_train_timesteps": 2.5}, "missing or odd numbers"),
        ({"beta_end": "0.1"}, "missing or odd numbers"),
        ({"timestep_spacing": "log"}, "timestep_spacing 'log' is none of leading, trailing"),
        ({"timestep_spacing": []}, "timestep_spacing"),
    ],
)
def test_odd_schedules_are_refused(odd, what):
    with pytest.raises(ValueError, match=f"scheduler: {what}"):
        schedule.check(CONFIG | odd)


def test_a_single_file_s_marks(tmp_path):
    """As tensors, as its metadata has them, and over what --base says."""

    def read(more=(), metadata=None, base=MINIATURE):
        path = tmp_path / "m.safetensors"
        one_file(path, lambda tensors: tensors | {k: torch.zeros(0) for k in more}, metadata)
        return schedule.check(weights.find_weights(path, base).configs["scheduler"])

    plain, v, zero = read(), read(["v_pred"]), read(["v_pred", "ztsnr"])
    assert plain == schedule.check(json.loads((MINIATURE / SCHEDULER).read_text()))
    assert v == plain | {"prediction_type": "v"}
    assert zero == v | v_network.ZERO_SNR
    assert read(metadata={"modelspec.prediction_type": "v"}) == v
    base = v_network.folder(tmp_path / "base", prediction_type="v_prediction")
    assert read(base=base) == v
    assert read(metadata={"modelspec.prediction_type": "epsilon"}, base=base) == plain
    assert read(metadata={"modelspec.prediction_type": ""}, base=base) == v
    assert "prediction_type" not in schedule.of_single_file([], {})
    assert single_file.SDXL["scheduler"]["prediction_type"] == "epsilon"  # as it was
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        read(metadata={"modelspec.prediction_type": "sample"})


SCHEDULER = "scheduler/scheduler_config.json"


def test_a_marked_single_file_is_loaded(tmp_path):
    marks = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    file = one_file(tmp_path / "m.safetensors", lambda tensors: tensors | marks)
    ours = SDXL.load(file, device="cpu", base=MINIATURE, vae=False)
    assert (ours.prediction, ours.spacing) == ("v", "trailing")
    assert torch.equal(ours.alpha_bar, ZERO_SNR)


def test_command_lines(tmp_path):
    path = v_network.folder(tmp_path / "v", prediction_type="v_prediction")
    few = f"--seeds 0 --steps 1 --no-metadata --out {tmp_path}/o"
    done = run(f"slider.py --prompt 'a man' --model {path} --size 64 {few}")
    assert done.returncode == 0 and not done.stderr.count("warning"), done.stderr
    picture = (tmp_path / "o" / "seed0.png").read_bytes()
    done = run(f"slider.py --prompt 'a man' --model {path} --prediction epsilon --size 64 {few}")
    assert done.returncode == 0
    assert done.stderr.count("warning: --prediction epsilon: this model says") == 1
    assert (tmp_path / "o" / "seed0.png").read_bytes() != picture
    done = run(f"slider.py --prompt 'a man' --prediction v --size 64 {few}")
    assert done.returncode == 0 and (tmp_path / "o" / "seed0.png").read_bytes() == picture
    path = v_network.folder(tmp_path / "sample", prediction_type="sample")
    for command in ("slider.py --prompt 'a man'", "train_text.py --pos 'a, b' --neg 'a, c'"):
        done = run(f"{command} --model {path} --out {tmp_path}/{command[:3]}.safetensors")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("error: scheduler: prediction_type 'sample' is not supported")
        assert "--prediction v" in line
    done = run("train_pairs.py --prediction x")
    assert done.returncode == 2 and "--prediction" in done.stderr


def test_a_trainer_keeps_the_option_and_like_asks_for_it_again(tmp_path):
    small = "--trajectories 1 --per-trajectory 1 --denoising-steps 2 --size 64"
    small += " --steps 1 --batch 2 --probe 0"
    file = tmp_path / "a.safetensors"
    done = run(f"{TRAIN} --prediction v {small} --out {file}")
    assert done.returncode == 0, done.stderr
    assert "--out out/a --prediction v\n" in done.stdout  # the command that is suggested
    with safe_open(file, "pt") as f:
        assert f.metadata()["modelspec.prediction_type"] == "v"
    done = run(f"train_text.py --like {file} --out {tmp_path}/b.safetensors")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "was trained with a --prediction of its own: name it here too" in done.stderr


def test_an_inversion_kept_for_one_prediction_is_not_taken_for_another(tmp_path):
    load = lambda **options: SDXL.load(device="cpu", vae=False, **options)
    z, models = torch.zeros(1, 4, 8, 8), [load(), load(), load(prediction="v")]
    a, again, b = (inversions.cache_key(m, z, "a man") for m in models)
    assert a == again != b
    zero = SDXL.load(v_network.folder(tmp_path / "z", **v_network.ZERO_SNR), device="cpu")
    assert inversions.cache_key(zero, z, "a man") not in (a, b)
