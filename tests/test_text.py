"""The teacher against eq. (8) computed the slow way, and the student against what it must be able
to learn."""

import dataclasses
from argparse import Namespace

import pytest
import torch
from test_lora import trained_slider
from test_networks import UNET, randomise, unet_inputs

import lora
import sampler
import student
import train_text
from miniature import effect
from sdxl_unet import UNet
from support import options, training
from support.sweep import composed
from support.training import set_checkpointing

TARGET = "a photo of a person"
POS, NEG = f"{TARGET}, very old", f"{TARGET}, very young"
PRESERVE = ["with glasses", "without glasses", "man"]


def collect(model, preserve=PRESERVE, **changes):
    prompts = train_text.encode(model, [TARGET, "a photo of a man"], POS, NEG, preserve, (128, 128))
    settings = dict(eta=2.0, trajectories=3, per_trajectory=4, denoising_steps=8, guidance=3.0)
    settings |= dict(size=(128, 128), seed=5, batch=7)
    return train_text.collect(model, prompts, **(settings | changes))


@pytest.fixture(scope="module")
def collected(model):
    return collect(model)


@pytest.fixture
def targets(collected):
    """A test may set its fields to other tensors."""
    return dataclasses.replace(collected)


def test_what_is_measured_begins_with_no_noise_that_is_trained_on(model, monkeypatch):
    seen = []
    noise = sampler.noise
    record = lambda seeds, *rest: seen.extend(seeds) or noise(seeds, *rest)
    monkeypatch.setattr(sampler, "noise", record)
    prompts = train_text.encode(model, [TARGET], POS, NEG, [], (64, 64))
    few = dict(trajectories=2, per_trajectory=1, denoising_steps=2, eta=1.0, batch=8, size=(64, 64))
    for seed in range(3):
        train_text.teach(model, prompts, seed=seed, **few)
    assert len(seen) == len(set(seen)) == 3 * 3  # nor does the meter: two to train on, one for it
    begun = {first + i for first in seen for i in range(256)}
    for training_seed in (0, 1):  # experiments/common.py: of the second, 1000 later
        assert not begun & {seed + 1000 * training_seed for seed in effect.SEEDS}


def test_prompts_are_told_the_size(model):
    for cond in train_text.encode(model, [TARGET], POS, NEG, [], (64, 96)):
        assert cond[2].unique(dim=0).tolist() == [[64, 96, 0, 0, 64, 96]]


@pytest.mark.parametrize("preserve", [[], PRESERVE], ids=["nothing", "concepts"])
def test_the_teachers_targets_are_the_right_hand_side_of_eq_8(model, targets, preserve):
    targets = targets if preserve else collect(model, preserve)
    assert len(targets) == 24
    ends = [(f"{POS}, {p}", f"{NEG}, {p}") for p in preserve] or [(POS, NEG)]

    @torch.no_grad()
    def eps(i, prompt):
        row = slice(i, i + 1)
        return model.unet(targets.x_t[row], targets.t[row], *model.condition([prompt]))[0]

    for i in (0, 5, 11):
        total = sum(eps(i, pos) - eps(i, neg) for pos, neg in ends)
        delta = 2.0 * total / len(ends)
        eps_0 = eps(i, [TARGET, "a photo of a man"][targets.prompt[i]])
        for j, s in ((i, 1.0), (12 + i, -1.0)):  # every x_t comes at either end
            assert targets.scale[j] == s
            assert torch.equal(targets.x_t[j], targets.x_t[i])
            assert targets.t[j] == targets.t[i] and targets.prompt[j] == targets.prompt[i]
            assert torch.allclose(targets.eps_0[j], eps_0, atol=1e-4)
            assert (targets.target[j] - eps_0 - s * delta).norm() < 1e-3 * delta.norm() + 1e-4


def test_x_t_lie_on_the_frozen_models_own_way(model, targets):
    """Each kept x_t is what partial denoising to its t gives; every trajectory keeps the same
    number, at its own levels."""
    x_T = sampler.noise(range(5000, 5003), (4, 16, 16))
    cond = model.condition([TARGET, "a photo of a man", TARGET])
    settings = dict(alpha_bar=model.alpha_bar, steps=8, guidance=3.0)
    for i in (0, 6, 11):
        stop = sampler.timesteps(8).index(int(targets.t[i]))
        uncond = model.condition([""] * 3)
        reached = sampler.sample(model.unet, x_T, cond, uncond, **settings, stop=stop)
        assert (reached[i // 4] - targets.x_t[i]).abs().max() < 1e-4
    assert targets.prompt.tolist() == 2 * ([0] * 4 + [1] * 4 + [0] * 4)
    # One in each quarter of the way, at a place of each trajectory's own.
    step = torch.tensor([sampler.timesteps(8).index(t) for t in targets.t[:12].tolist()]).view(3, 4)
    assert (step // 2 == torch.arange(4)).all()
    one = collect(model, [], trajectories=6, per_trajectory=1)
    assert len(set(one.t.tolist())) > 2


def test_a_prediction_is_the_unets_at_each_samples_scale_and_prompt(model, targets):
    rows = targets[torch.tensor([0, 5, 17])]
    slider = trained_slider(model.unet).attach(model.unet)
    with torch.no_grad():
        found = student.predict(model.unet, slider, rows)
        for i in range(3):
            cond = (part[rows.prompt[i]][None] for part in rows.cond)
            with slider.at(float(rows.scale[i])):
                alone = model.unet(rows.x_t[i : i + 1], rows.t[i : i + 1], *cond)
            assert torch.allclose(found[i], alone[0], atol=1e-4)
    slider.detach()
    assert rows.prompt.unique().numel() == 2 and rows.scale.unique().numel() == 2


def test_the_loss_is_the_error_in_units_of_the_teachers_change(model, targets):
    few = targets[torch.tensor([0, 5, 17])]
    slider = trained_slider(model.unet).attach(model.unet)
    with torch.no_grad():
        loss = student.make_loss(model.unet, slider, few)(torch.tensor([2, 0]))
        error = student.predict(model.unet, slider, few) - few.target
    slider.detach()
    whole = (few.target - few.eps_0).square().mean()
    expected = error.square().mean((1, 2, 3))[[2, 0]] / whole
    assert torch.allclose(loss, expected, rtol=1e-3)


def test_every_sample_comes_once_before_any_comes_again():
    state = student.TrainingState(torch.nn.Linear(1, 1), lr=1.0)
    rows = torch.cat([state.draw(7, 3) for _ in range(7)]).view(3, 7)
    assert (rows.sort(1).values == torch.arange(7)).all()
    rates = [student.learning_rate(i, 40, 1.0) for i in (0, 1, 20, 30, 39)]
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 0.05])


def test_each_step_is_adam_s_at_the_rate_of_its_place():
    """While the gradient stays the same a step of Adam is the learning rate itself. It warms up
    over 2 of 40 steps and falls from the 21st on; nothing decays the weight."""
    layer = torch.nn.Linear(1, 1, bias=False).double()
    layer.weight.data.fill_(100.0)
    state = student.TrainingState(layer, lr=1e-2)
    steps = student.fit(state, lambda rows: layer.weight[rows, 0], 1, steps=40, batch=1)
    at = [100.0, *(layer.weight.item() for _ in steps)]
    rates = [0.5] + [1.0] * 20 + [1 - i / 20 for i in range(1, 20)]
    moved = [(before - after) / 1e-2 for before, after in zip(at, at[1:])]
    assert moved == pytest.approx(rates, rel=1e-5)


def test_the_loss_that_is_reported_is_a_running_mean():
    """A tenth of it is the last step's."""
    slider, losses = lora.Slider({"layer": torch.nn.Linear(3, 2)}, rank=2), iter([1.0, 2.0, 4.0])
    nothing = lambda: 0 * sum(p.sum() for p in slider.parameters())
    loss = lambda rows: torch.full((len(rows),), next(losses)) + nothing()
    read = lambda: {"share": 0.0, "cosine": 0.0}
    reading = training.train(slider, loss, 4, read, steps=3, batch=2, lr=1.0)
    assert reading["loss"] == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4)


def test_gradients_that_float16_has_no_number_for_are_kept():
    state = student.TrainingState(torch.nn.Linear(1, 1, bias=False), lr=1.0)
    (p,) = state.parameters
    loss = lambda rows: (p.half() * 1e-3).float().flatten()[rows] * 1e-5
    next(student.fit(state, loss, 1, steps=1, batch=1))
    assert p.grad.item() == pytest.approx(1e-8, rel=1e-2)


def test_meter_reads_what_is_there(model, targets):
    """A slider whose effect is taken as the target reads share 1 and cosine 1; twice that target,
    a half; its negative, -1. With twice the target at one end only, that end reads a half."""
    targets = targets[torch.tensor([0, 3, 5, 11, 12, 15, 17, 23])]  # four x_t, at both ends
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet, "noxattn")).requires_grad_(False)
    for name, p in slider.named_parameters():
        if "lora_up" in name:
            p.normal_(std=1e-2)
    slider.attach(model.unet)
    with torch.no_grad():
        effect = student.predict(model.unet, slider, targets) - targets.eps_0
    for factor, share, cosine in ((1.0, 1.0, 1.0), (2.0, 0.5, 1.0), (-1.0, -1.0, -1.0)):
        targets.target = targets.eps_0 + factor * effect
        reading = student.meter(model.unet, slider, targets, batch=5)
        assert reading["share"] == pytest.approx(share, rel=1e-3)
        assert reading["cosine"] == pytest.approx(cosine, rel=1e-3)
    twice_at_one_end = torch.where(targets.scale > 0, 2.0, 1.0).view(-1, 1, 1, 1)
    targets.target = targets.eps_0 + twice_at_one_end * effect
    reading = student.meter(model.unet, slider, targets, batch=5)
    assert reading["plus"] == pytest.approx(0.5, rel=1e-3)
    assert reading["minus"] == pytest.approx(1, rel=1e-3)
    slider.detach()


@pytest.mark.slow
@pytest.mark.parametrize("both_ends", [True, False])
def test_the_student_learns_unseen_x_t_and_touches_nothing_else(model, both_ends):
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    train = collect(model, trajectories=4, per_trajectory=6)
    held_out = collect(model, trajectories=2, seed=6)
    torch.manual_seed(0)
    slider = lora.Slider(lora.target_layers(model.unet)).attach(model.unet)
    start = student.meter(model.unet, slider, held_out, 4)
    train = train if both_ends else train[train.scale > 0]
    settings = dict(steps=30, batch=8, lr=1.3e-3)
    reading = training.fit_targets(model.unet, slider, train, held_out, **settings)
    slider.detach()
    assert abs(start["share"]) < 1e-6
    assert reading["share"] > 0.2 and reading["cosine"] > 0.4 and reading["loss"] < 0.9
    if not both_ends:  # so small a change is nearly linear in the scale
        assert reading["plus"] > reading["minus"] - 0.02
    assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())
    assert all(p.grad is None for p in model.unet.parameters())


def test_training_in_bfloat16_keeps_the_slider_in_float32():
    """On a small network, as some processors are slow at bfloat16. The teacher is the network with
    another slider."""
    unet = randomise(UNet(UNET)).bfloat16().requires_grad_(False)
    _, _, context, *cond = (x.bfloat16() for x in unet_inputs())
    x_t = torch.randn(24, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    t, prompt, one = torch.randint(0, 1000, (24,)), torch.arange(24) % 3, torch.ones(24)
    targets = student.Targets(x_t, t, one, prompt, x_t, x_t, (context[:, :4], *cond))
    torch.manual_seed(0)
    teacher = lora.Slider(lora.target_layers(unet))
    for p in teacher.parameters():
        p.data.normal_(std=0.2)
    with torch.no_grad(), composed(unet, [(teacher, 1.0, 0.0)]):
        targets.target = student.predict(unet, teacher, targets)
        targets.eps_0 = student.predict(unet, teacher, dataclasses.replace(targets, scale=0 * one))
    slider = lora.Slider(lora.target_layers(unet)).attach(unet)
    train, held_out = targets[torch.arange(20)], targets[torch.arange(20, 24)]
    settings = dict(steps=12, batch=4, lr=2e-2)
    reading = training.fit_targets(unet, slider, train, held_out, **settings)
    assert all(p.dtype == torch.float32 for p in slider.parameters())
    assert reading["share"] > 0.5, reading


def test_same_seed_same_slider(model, targets):
    """Neither readings in between nor gradient checkpointing change anything."""
    sliders, settings = [], dict(steps=3, batch=2, lr=1e-3)
    for meter_every, checkpointing in ((1, False), (100, True)):
        set_checkpointing(model.unet, checkpointing)
        torch.manual_seed(0)
        slider = lora.Slider(lora.target_layers(model.unet, "attn")).attach(model.unet)
        settings |= dict(meter_every=meter_every)
        training.fit_targets(model.unet, slider, targets, targets[torch.arange(3)], **settings)
        slider.detach()
        set_checkpointing(model.unet, False)
        sliders.append(slider.state_dict())
    assert all(torch.equal(v, sliders[1][k]) for k, v in sliders[0].items())


def test_divergence_stops_training(model, targets):
    slider = lora.Slider(lora.target_layers(model.unet)).attach(model.unet)
    with pytest.raises(FloatingPointError, match="lower --lr"):
        training.fit_targets(model.unet, slider, targets, targets, steps=30, batch=2, lr=10.0)
    slider.detach()


@pytest.mark.parametrize("spikes, stops", [({4}, False), ({4, 5, 6}, True)])
def test_one_batch_with_an_outlier_is_no_divergence(spikes, stops):
    slider, losses = lora.Slider({"layer": torch.nn.Linear(3, 2)}, rank=2), []
    total = lambda: sum(p.square().sum() for p in slider.parameters())

    def loss(rows):
        losses.append(50.0 if len(losses) + 1 in spikes else 0.5)
        return losses[-1] + 0.0 * total() * rows

    train = lambda: training.train(slider, loss, 8, dict, steps=9, batch=1, lr=1e-3)
    if stops:
        with pytest.raises(FloatingPointError, match="diverged at step 6"):
            train()
    else:
        train()
        assert len(losses) == 9


def test_nothing_to_learn_is_said(model, targets):
    targets.target = targets.eps_0.float().clone()
    slider = lora.Slider(lora.target_layers(model.unet)).attach(model.unet)
    with pytest.raises(ValueError, match="no difference"):
        training.fit_targets(model.unet, slider, targets, targets, steps=3, batch=2, lr=1e-3)
    slider.detach()


def test_a_prompt_that_is_too_long_is_said(model):
    start = ", ".join(["a photo of a person"] * 30)
    with pytest.warns(UserWarning, match="the model does not see its end, .*with glasses"):
        one, _ = model.encode_prompt([f"{start}, with glasses"])
    with pytest.warns(UserWarning, match="too long"):
        other, _ = model.encode_prompt([f"{start}, without glasses"])
    assert torch.equal(one, other)


def test_verdicts():
    good = {"share": 0.8, "cosine": 0.9, "plus": 0.8, "minus": 0.8}

    def verdict(difference=0.1, unknown_words=(), **reading):
        lines = training.verdict(good | reading, difference, unknown_words=unknown_words)
        return " ".join(lines)

    assert "It works" in verdict() and "WARNING" not in verdict()
    assert "in part" in verdict(share=0.4)
    assert "next to nothing" in verdict(share=0.05, loss=0.97)
    assert "by heart" in verdict(share=0.05, loss=0.5)
    assert "something else" in verdict(cosine=0.2)
    assert "hardly tells" in verdict(difference=0.01)
    of_a_zebra = verdict(unknown_words={"zebra"})
    assert "never saw the words zebra" in of_a_zebra and "It works" not in of_a_zebra


def test_shared_part():
    args = lambda pos, neg: Namespace(prompt=None, pos=pos, neg=neg)
    assert options.target_prompts(args(POS, NEG)) == [TARGET]
    with pytest.raises(ValueError, match="--prompt"):
        options.target_prompts(args("an old man", "a young man"))


def test_preserved_concepts_combine():
    assert options.combinations([]) == options.combinations([" , "]) == []
    assert options.combinations(["man, woman,"]) == ["man", "woman"]
    every = ["a, c, d", "a, c, e", "b, c, d", "b, c, e"]
    assert options.combinations(["a, b", "c", "d, e"]) == every
