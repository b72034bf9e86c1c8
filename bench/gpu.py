"""SDXL's UNet on a GPU: as CUDA graphs, without them, and diffusers' with peft.

    python -m bench.gpu

The same random weights in all three, bfloat16. Forward passes without gradients, and whole training
steps of a rank-4 text slider (ours by student.fit: forward, loss, backward, optimizer). The three
take turns in one process; medians, and the peak of memory with what a graph holds, weights
included. The last column is the relative difference between a graph and the same without it: of the
predictions, or of the slider after three steps from one start. --small tries it out on a CPU."""

import gc
import statistics
import time

import torch

import lora
import student
from bench.unet import CONFIGS, GIB, add_peft, call_diffusers, empty, inputs
from sdxl_unet import UNet
from support import batches, cli, graphs, training

FORWARD = [(64, 1), (64, 8), (128, 2), (128, 8)]  # side of the latents, samples
STEPS = [(64, 1, False), (64, 4, False), (64, 8, False), (128, 1, False), (64, 8, True)]
COLUMNS = ["graph", "no graph", "diffusers"]


class Bench:
    def __init__(self, device, config, rounds):
        import diffusers

        self.device, self.config, self.rounds = device, config, rounds
        self.unet = empty(UNet, config=config, device=device)
        with torch.device("meta"):
            theirs = diffusers.UNet2DConditionModel(**config)
        theirs.load_state_dict(self.unet.state_dict(), assign=True)
        self.theirs = theirs.eval().requires_grad_(False)
        self.weights = self.allocated()

    def allocated(self, peak=False):
        if self.device == "cpu":
            return 0
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()

    def synchronize(self):
        if self.device != "cpu":
            torch.cuda.synchronize()

    def inputs(self, side, n):
        return [x.to(self.device) for x in inputs(side=side, n=n, config=self.config)]

    def row(self, name, functions: dict, difference):
        """Times the functions in turns, and prints a row. difference: called after three calls."""
        seconds, memory = {who: [] for who in functions}, {}
        for who, function in functions.items():
            gc.collect()
            before = self.allocated()
            if self.device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            for _ in range(3):  # warm-up, and the recording
                function()
            self.synchronize()
            memory[who] = (self.weights + self.allocated(peak=True) - before) / GIB
        difference = difference()
        for _ in range(self.rounds):
            for who, function in functions.items():
                self.synchronize()
                started = time.perf_counter()
                function()
                self.synchronize()
                seconds[who].append(time.perf_counter() - started)
        middle = {who: 1000 * statistics.median(taken) for who, taken in seconds.items()}
        cells = [name, *(f"{middle[who]:.1f}" for who in COLUMNS)]
        cells += [f"{middle[who] / middle['graph']:.2f}" for who in COLUMNS[1:]]
        cells += [f"{memory[who]:.2f}" for who in COLUMNS] + [f"{difference:.1e}"]
        print(f"| {' | '.join(cells)} |", flush=True)

    @torch.no_grad()
    def forward(self, side, n):
        x = self.inputs(side, n)
        ours = {True: lambda: with_graphs(True, self.unet, *x)}
        ours[False] = lambda: with_graphs(False, self.unet, *x)
        a, b = (ours[on]().float() for on in (True, False))
        theirs = call_diffusers(self.theirs)
        functions = dict(zip(COLUMNS, (ours[True], ours[False], lambda: theirs(*x))))
        self.row(f"forward, {8 * side} px, batch {n}", functions, lambda: relative(a, b))
        self.unet.__dict__.pop("graphs", None)

    def step(self, side, n, checkpointing):
        training.set_checkpointing(self.unet, checkpointing)
        if checkpointing:
            self.theirs.enable_gradient_checkpointing()
            self.theirs.train()
        pairs = {who: self.fit(side, n, who == "graph") for who in COLUMNS[:2]}
        functions = {who: lambda steps=steps: next(steps) for who, (steps, _) in pairs.items()}
        flat = lambda s: torch.cat([p.detach().flatten() for p in s.parameters()])
        difference = lambda: relative(*(flat(slider) for _, slider in pairs.values()))
        functions["diffusers"] = self.their_step(side, n)
        name = f"training step, {8 * side} px, batch {n}{', checkpointed' * checkpointing}"
        self.row(name, functions, difference)

    def fit(self, side, n, graph: bool):
        """(student.fit's steps, the slider), on random targets."""
        x_t, t, *cond = self.inputs(side, 2 * n)
        noise = lambda: torch.randn(x_t.shape, device=self.device).to(x_t)
        torch.manual_seed(0)
        slider = lora.Slider(lora.target_layers(self.unet)).to(self.device)
        one = torch.ones(n, device=self.device)
        rows = torch.arange(2 * n, device=self.device)
        targets = student.Targets(x_t, t, torch.cat([one, -one]), rows, noise(), noise(), cond)

        loss = student.make_loss(self.unet, slider, targets)
        capture = (lambda f: graphs.captured(f, self.device)) if graph else lambda f: f
        state = student.TrainingState(slider, 1e-4)
        steps = student.fit(state, loss, 2 * n, steps=10**6, batch=n, capture=capture)

        def alone():  # two sliders take turns on one UNet
            slider.attach(self.unet)
            for loss in steps:
                slider.scale = 0.0
                yield loss

        return alone(), slider

    def their_step(self, side, n):
        if not hasattr(self, "trained"):
            self.trained = add_peft(self.theirs)
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        x, predict = self.inputs(side, n), call_diffusers(self.theirs)
        target = torch.randn(x[0].shape, device=self.device).to(x[0])

        def step():
            self.optimizer.zero_grad()
            (predict(*x).float() - target.float()).square().mean().backward()
            self.optimizer.step()

        return step


def with_graphs(on: bool, unet, *x):
    graphs.enabled = on
    try:
        return unet(*x)
    finally:
        graphs.enabled = True


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def main():
    p = cli.plain_parser(__doc__)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--what", choices=["forward", "step"], help="default: both")
    p.add_argument("--small", action="store_true", help="the miniature's UNet, on a CPU")
    args = p.parse_args()
    if not args.small and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: --small tries it out on a CPU")
    device = "cpu" if args.small else "cuda"
    bench = Bench(device, CONFIGS["miniature" if args.small else "full"], args.rounds)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}\n")
    times = ["graph, ms", "no graph", "diffusers", "no graph / graph", "diffusers / graph"]
    memory = [f"GiB, {who}" for who in COLUMNS]
    print(f"| | {' | '.join([*times, *memory, 'difference'])} |\n" + "|---" * 10 + "|")
    smaller = 4 if args.small else 1
    for side, n in FORWARD if args.what != "step" else []:
        bench.forward(side // smaller, n)
    for side, n, checkpointing in STEPS if args.what != "forward" else []:
        bench.step(side // smaller, n, checkpointing)
    shape = (4, 64, 64)
    kinds = (batches.FROZEN, batches.TRAINED, batches.CHECKPOINTED)
    sizes = [batches.sample_bytes(bench.unet, shape, kind) / GIB for kind in kinds]
    print(
        "\nA sample of 512 px is taken to need", ", ".join(f"{size:.3f}" for size in sizes), "GiB"
    )
    print("(frozen, trained, trained with --checkpointing)")


if __name__ == "__main__":
    cli.run(main)
