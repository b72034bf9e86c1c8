"""When a CUDA graph is recorded, and what it is replayed with: on the CPU, with a stand-in for the
recording. tests/test_gpu.py has the real thing."""

import copy

import pytest
import torch
from test_lora import trained_slider

from support import graphs
from support.merge import Composed


@pytest.fixture
def recorded(monkeypatch):
    """A list of what was recorded. A replay here is the function run once more, on the buffers; it
    leaves Python's side alone, as a graph does: hooks and scales are as they were."""
    made = []

    def record(function, inputs, pool=None):
        outputs = function(*inputs)
        pairs = lambda new: zip(*(x if isinstance(x, tuple) else (x,) for x in (outputs, new)))

        def replay():
            for old, new in pairs(function(*inputs)):
                old.copy_(new)

        made.append(function)
        return replay, outputs

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "usable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


def test_it_is_recorded_once_for_each_shape_and_replayed_on_what_comes(recorded):
    calls = []
    double = graphs.captured(lambda x, k: calls.append(1) or (x * k, x + k), "cpu")
    for n in (2, 3, 2, 2):
        x = torch.randn(n)
        a, b = double(x, torch.tensor(3.0))
        assert torch.equal(a, 3 * x) and torch.equal(b, x + 3)
    assert len(recorded) == 2


def test_what_cannot_be_recorded_runs_as_it_is(recorded, monkeypatch):
    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "record", fail)
    call = graphs.captured(lambda x: 2 * x, "cpu")
    with pytest.warns(UserWarning, match="no CUDA graph.*: operation not permitted.*capturing$"):
        assert call(torch.ones(1)) == 2
    assert call(torch.ones(1)) == 2


@torch.no_grad()
def test_the_unet_is_recorded_for_each_state_of_its_sliders(model, inputs, recorded, monkeypatch):
    unet = copy.deepcopy(model.unet)
    slider = trained_slider(unet)

    def check(new: int):
        """unet(*inputs) is right, and that many graphs were recorded for it."""
        before = len(recorded)
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "usable", lambda device: False)
            expected = unet(*inputs)
        assert torch.equal(unet(*inputs), expected) and len(recorded) == before + new

    check(1), check(0)
    slider.attach(unet)
    check(1)
    with slider.at(2.0):
        check(1), check(0)
        next(slider.parameters()).mul_(3)
        check(0)
    with slider.at(torch.tensor([1.0, 0.5, -1.0])):
        check(1)
    with slider.at(torch.tensor([0.0, 2.5, 1.0])):
        check(0)
    with slider.at(torch.randn(3, 4)):
        check(1)  # another shape
    assert slider.scale == 0.0
    slider.detach()
    composed = Composed(unet, [(slider, 1.0), (trained_slider(unet, 1), -1.0)])
    composed.scale = 1.0
    check(1)
    composed.detach()
    unet.conv_in.weight = torch.nn.Parameter(2 * unet.conv_in.weight)
    check(1)


@torch.no_grad()
def test_hooks_are_called_and_large_batches_not_recorded(model, inputs, recorded, monkeypatch):
    seen = []
    handle = model.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        model.unet(*inputs)
    handle.remove()
    assert len(seen) == 3 and not recorded
    monkeypatch.setattr(graphs, "MAX_PLACES", 2 * 16 * 16)
    model.unet(*inputs)  # three samples
    assert not recorded
    with torch.enable_grad():
        model.unet(*(x[:1] for x in inputs))
    assert not recorded
    model.unet(*(x[:1] for x in inputs))
    assert len(recorded) == 1
    model.unet.__dict__.pop("graphs")
