"""The student: fit a slider to what a frozen teacher has collected. All trainers share `fit`.

A teacher (train_text.py, train_pairs.py) runs the frozen model on noised latents x_t. For each it
keeps the model's own prediction (eps_0), a scale s, and what a slider at s should predict (target):

    L = mean over x_t and s of  || eps_{theta, s}(x_t, c_t, t) - target ||^2

The samples of all scales are shuffled together, so the +1 and -1 samples of one x_t usually land in
different batches. In one batch they would be nearly redundant: a slider is almost linear in s."""

from dataclasses import dataclass, fields

import torch

from support.batches import in_batches


@dataclass
class Targets:
    """What a teacher collected: n samples."""

    x_t: torch.Tensor  # (n, 4, h, w)
    t: torch.Tensor  # (n,) noise levels
    scale: torch.Tensor  # (n,) the slider's scale there
    prompt: torch.Tensor  # (n,) row of `cond` that belongs to each
    eps_0: torch.Tensor  # (n, 4, h, w) the frozen model's prediction: 0 is the scale, not a level
    target: torch.Tensor  # (n, 4, h, w) what the model with the slider is to predict
    cond: tuple  # context (m, 77, d), pooled (m, p), time_ids (m, 6) of the m prompts

    def __len__(self):
        return len(self.t)

    def __getitem__(self, rows) -> "Targets":
        samples = [getattr(self, f.name)[rows] for f in fields(self)[:-1]]  # all but cond
        return Targets(*samples, self.cond)  # type: ignore[call-arg]

    @property
    def delta(self):  # the change of prediction that is asked for, (n, 4, h, w)
        return self.target.float() - self.eps_0.float()


def predict(unet, slider, batch: Targets):
    """eps_{theta, s}(x_t, c_t, t) with the attached slider at each sample's scale: (b, 4, h, w).
    The scale stays set: gradient checkpointing runs parts of the UNet again during backward."""
    slider.scale = batch.scale  # (b,)
    return unet(batch.x_t, batch.t, *(c[batch.prompt] for c in batch.cond))


def distance(error):
    """Elementwise loss of a prediction's error (b, 4, h, w). To try another loss, edit this."""
    return error.square()


def make_loss(unet, slider, targets: Targets):
    """The loss of a text or a visual slider: a function rows (b,) -> (b,), each sample's distance
    from its target, divided by the mean distance of all samples with no slider. 1 is an untrained
    slider, 0 a copy of the teacher. ValueError if the teacher's two ends are the same."""
    no_slider = distance(targets.delta).mean()
    if not no_slider > 0:
        raise ValueError("the model sees no difference between the two ends: nothing to learn")

    def loss(rows):
        batch = targets[rows]
        error = predict(unet, slider, batch).float() - batch.target.float()  # (b, 4, h, w)
        return distance(error).mean((1, 2, 3)) / no_slider

    return loss


class TrainingState:
    """What changes while a slider is fitted, for a checkpoint to hold."""

    def __init__(self, slider, lr: float, seed: int = 0):
        self.parameters, self.lr, self.step = list(slider.parameters()), lr, 0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.remaining: list[int] = []  # samples still to come in this epoch

    def draw(self, n: int, batch: int):
        """The next `batch` of n samples: every one comes once before any comes again."""
        if len(self.remaining) < batch:
            self.remaining += torch.randperm(n, generator=self.generator).tolist()
        rows, self.remaining = self.remaining[:batch], self.remaining[batch:]
        return torch.tensor(rows)

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "remaining": self.remaining,
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "parameters": [p.detach() for p in self.parameters],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        self.step, self.remaining = state["step"], state["remaining"]
        self.generator.set_state(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        for p, value in zip(self.parameters, state["parameters"], strict=True):
            p.copy_(value)


def fit(state: TrainingState, loss, n: int, *, steps: int, batch: int, capture=lambda f: f):
    """Fit a slider: yields the loss, a number on the device, after each step. loss: function of
    rows (batch,) of the n samples -> (batch,), such as make_loss's. capture: makes a CUDA graph of
    a function (support/graphs.py). The rest is support/training.train's."""

    def loss_and_gradients(rows):
        total = loss(rows).sum() / batch  # not mean(): each of several processes has some of rows
        gradients = torch.autograd.grad(total * 2**10, state.parameters)  # loss scaling: float16
        return total.detach(), *torch._foreach_mul(gradients, 2**-10)

    loss_and_gradients = capture(loss_and_gradients)
    while state.step < steps:
        total, *gradients = loss_and_gradients(state.draw(n, batch))
        for p, gradient in zip(state.parameters, gradients):
            p.grad = gradient
        state.optimizer.param_groups[0]["lr"] = learning_rate(state.step, steps, state.lr)
        state.optimizer.step()
        state.step += 1
        yield total


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Linear warmup over the first twentieth, constant, linear decay to 0 over the second half."""
    return lr * min(1.0, (step + 1) / max(1, steps // 20)) * min(1.0, 2 * (steps - step) / steps)


@torch.no_grad()
def meter(unet, slider, held_out: Targets, batch: int) -> dict[str, float]:
    """How much of the teacher's change the slider makes, on x_t that it was not trained on.
    share:  projection of eps_s - eps_0 onto target - eps_0, in units of the latter; 1 is all of it;
            plus, minus: at the positive and at the negative scales (0 where there are none).
    cosine: between the two; near 0 the slider does something else."""

    def products(rows):
        here = held_out[rows]
        made, wanted = predict(unet, slider, here).float() - here.eps_0.float(), here.delta
        terms = torch.stack([made * wanted, wanted.square(), made.square()])  # (3, b, 4, h, w)
        return {"products": terms.sum((2, 3, 4)).T}

    with slider.at(0.0):  # predict sets the scale; this restores it afterwards
        found = in_batches(products, len(held_out), batch)["products"]  # (n, 3)
    dot, wanted_sq, made_sq = found.T  # (n,) each: <made, wanted>, |wanted|^2, |made|^2
    share = lambda rows: (dot[rows].sum() / wanted_sq[rows].sum().clamp(min=1e-12)).item()
    positive = held_out.scale > 0
    cosine = (dot.sum() / (wanted_sq.sum() * made_sq.sum()).sqrt().clamp(min=1e-12)).item()
    shares = {"share": share(slice(None)), "plus": share(positive), "minus": share(~positive)}
    return shares | {"cosine": cosine}
