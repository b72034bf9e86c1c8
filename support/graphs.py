"""CUDA graphs: what a GPU does in a function, recorded once and launched as one.

A training step of SDXL's UNet launches thousands of operations, and for small batches launching
takes many times as long as the arithmetic. A graph launches them all at once. It is recorded at the
first call, and replayed at every further one with new contents in the same buffers. So what Python
does in the function happens once: it may depend on nothing but its inputs and on tensors that are
changed in place.

On a CPU, and with --no-cuda-graphs, everything here leaves functions as they are.
"""

import functools
import warnings
from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle

enabled = True  # --no-cuda-graphs (support/cli.py)

# Latent places in a batch up to which an evaluation without gradients is launched as a graph: 8
# samples of 512 pixels. Above that the arithmetic takes as long as the launching (docs/speed.md),
# and a graph would only hold memory.
MAX_PLACES = 8 * 64 * 64
MAX_GRAPHS = 4  # of one UNet, kept at a time


def usable(device) -> bool:
    return enabled and torch.device(device).type == "cuda"


def record(function, inputs, pool=None):
    """(replay, outputs): replay() runs function(*inputs) on what the inputs then hold, and leaves
    the results in `outputs`. pool: memory to share with other graphs. RuntimeError if it cannot be
    recorded."""
    with torch.cuda.device(inputs[0].device):  # streams and graphs are of the current one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)  # libraries load and choose their kernels, which cannot be recorded
        torch.cuda.current_stream().wait_stream(stream)
        generator = torch.cuda.default_generators[stream.device_index]
        state = generator.graphsafe_get_state()
        # A recording that fails leaves the random generator's state unusable: so it gets a copy.
        generator.graphsafe_set_state(generator.clone_state())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = function(*inputs)
        finally:
            generator.graphsafe_set_state(state)
        return graph.replay, outputs


def captured(function, device, pool=None):
    """function(*tensors) -> a tensor or a tuple of them, as one CUDA graph for each combination of
    shapes. Its outputs are overwritten by the next call. Where it cannot be recorded, one warning
    says so, and it runs as it is."""
    if not usable(device):
        return function
    recorded: dict = {}

    def call(*inputs):
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in recorded:
            buffers = [x.to(device, copy=True) for x in inputs]
            try:
                recorded[key] = buffers, *record(function, buffers, pool)
            except RuntimeError as error:
                recorded[key] = None
                why = str(error).splitlines()[0]
                warnings.warn(f"no CUDA graph, so it takes longer: {why}", stacklevel=2)
        if recorded[key] is None:
            return function(*inputs)
        buffers, replay, outputs = recorded[key]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x)
        replay()
        return outputs

    return call


# ------------------------------------------------------------------- the UNet, without gradients

changes: WeakKeyDictionary = WeakKeyDictionary()  # UNet -> {number: what is attached to it}


def note_attached(unet, change) -> RemovableHandle:
    """To be called as a slider is attached to `unet`, so that no graph of it without the slider is
    replayed. change.scale is a number or a tensor, change.handles its hooks, with this one.
    remove() the handle as it is detached."""
    handle = RemovableHandle(changes.setdefault(unet, OrderedDict()))
    changes[unet][handle.id] = change
    return handle


def replayed(forward):
    """Decorates UNet.forward: without gradients, a small batch is launched as one CUDA graph. There
    is one for each set of attached sliders, with the scales that are numbers."""

    @functools.wraps(forward)
    def call(unet, x_t, *inputs):
        small = x_t[:, 0].numel() <= MAX_PLACES
        if not small or torch.is_grad_enabled() or not usable(x_t.device):
            return forward(unet, x_t, *inputs)
        return from_graph(forward, unet, (x_t, *inputs))

    return call


def from_graph(forward, unet, inputs):
    """forward(unet, *inputs), replayed; as it is, where somebody's hooks want to be called."""
    attached = dict(changes.get(unet, {}))
    scales = {i: change.scale for i, change in attached.items()}
    tensors = [i for i, scale in scales.items() if torch.is_tensor(scale)]
    addresses, hooks = addresses_and_hooks(unet)
    if hooks != sum(len(change.handles) - 1 for change in attached.values()):
        return forward(unet, *inputs)
    pool, recorded = unet.__dict__.setdefault("graphs", (torch.cuda.graph_pool_handle(), {}))
    state = (addresses, *((i, None if i in tensors else scales[i]) for i in scales))

    def run(*buffers):
        for i in scales:  # set anew, so that the cast of its weights is recorded too
            attached[i].scale = scales[i]
        for i, scale in zip(tensors, buffers[len(inputs) :]):
            attached[i].scale = scale
        return forward(unet, *buffers[: len(inputs)])

    if state not in recorded:
        recorded[state] = captured(run, inputs[0].device, pool)
        if len(recorded) > MAX_GRAPHS:
            del recorded[next(iter(recorded))]  # the oldest
    try:
        return recorded[state](*inputs, *(scales[i] for i in tensors)).clone()
    finally:
        for i in scales:  # not the graph's buffers, nor weights that were cast in its memory
            attached[i].scale = scales[i]


def addresses_and_hooks(unet) -> tuple[int, int]:
    """Where all weights are, as one number: a graph reads them there. How many hooks there are."""
    addresses, hooks = [], 0
    for module in unet.modules():
        addresses += [p.data_ptr() for p in module._parameters.values() if p is not None]
        if module is not unet:  # its own are called outside of a graph
            hooks += len(module._forward_hooks) + len(module._forward_pre_hooks)
    return hash(tuple(addresses)), hooks
