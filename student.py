"""The student: fit a slider to targets that a frozen teacher has collected. All trainers share this one loop.

A teacher (train_text.py, train_pairs.py) visits noised latents x_t with the frozen model and notes, for each, what the
model predicts (eps_0), at which scale s the slider is to be asked there, and what it is to answer (target):

    L = mean over x_t and s of  || eps_{theta, s}(x_t, c_t, t) - target ||^2

The samples of all scales are shuffled together: an x_t that is asked at 1 and at -1 is so in different steps, since the
two would say nearly the same about the slider, which is nearly linear in its scale, at the price of two evaluations.
"""

from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

import parallel
import unfinished


@dataclass
class Targets:
    """What a teacher collected: n samples."""

    x_t: torch.Tensor  # (n, 4, h, w)
    t: torch.Tensor  # (n,) noise levels
    scale: torch.Tensor  # (n,): the slider's scale there
    prompt: torch.Tensor  # (n,) row of `cond` that belongs to each
    eps_0: torch.Tensor  # (n, 4, h, w): the frozen model's own prediction
    target: torch.Tensor  # (n, 4, h, w): what the model with the slider should predict
    cond: tuple  # context (m, 77, d), pooled (m, p), time_ids (m, 6) of the m prompts

    def __len__(self):
        return len(self.t)

    def __getitem__(self, rows) -> "Targets":
        return Targets(*(getattr(self, f.name)[rows] for f in fields(self)[:-1]), self.cond)  # type: ignore[call-arg]  # mypy counts the star as one

    @property
    def wanted(self):
        """The change of prediction that is asked for, (n, 4, h, w)."""
        return self.target.float() - self.eps_0.float()


def predict(unet, slider, batch: Targets):
    """eps_{theta*}(x_t, c_t, t) with the slider at each sample's scale, shape (n, 4, h, w).

    Leaves the slider at them: with gradient checkpointing, backward() runs parts of the UNet again, slider and all.
    """
    slider.scale = batch.scale
    return unet(batch.x_t, batch.t, *(c[batch.prompt] for c in batch.cond))


def fit(unet, slider, train: Targets, held_out: Targets, *, batch: int, kept=unfinished.NOTHING, **settings) -> dict:
    """Train `slider` (attached to `unet`) on the teacher's targets; returns the final meter. settings: loop's.

    The loss is the mean squared error divided by that of doing nothing: 1 is an untrained slider, 0 a perfect copy of the
    teacher. ValueError if the teacher's two ends are the same.
    """
    nothing = train.wanted.square().mean()  # the squared error of scale 0
    if not nothing > 0:
        kept.remove()  # of no use to a corrected command
        raise ValueError("the model sees no difference between the two ends: there is nothing to learn")
    batch = min(batch, len(train))

    def loss(rows):
        here = train[rows]
        return (predict(unet, slider, here).float() - here.target.float()).square().mean((1, 2, 3)) / nothing

    return loop(slider, len(train), loss, lambda: meter(unet, slider, held_out, batch), batch=batch, kept=kept, **settings)


def loop(
    slider, n: int, loss, read, *, steps: int, batch: int, lr: float, seed: int = 0, meter_every: int = 25, on_meter=None, kept=unfinished.NOTHING
) -> dict:
    """The loop: shows a progress bar with loss and meter; returns the final meter and loss.

    n: samples to learn from. loss: function of a few of their numbers, (b,) -> one loss for each, (b,). read: the meter, a dict
    with share and cosine. batch: samples in a step, of all processes together (parallel.py). on_meter: called as
    on_meter(step) after each reading. kept: where the state is kept every meter_every steps, and gone on from.
    Raises FloatingPointError when the loss is no longer finite or far above 1, KeyboardInterrupt, after the step, if told to stop.
    """
    parameters = [p for p in slider.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 20)
    rate = lambda i: lr * min(1.0, (i + 1) / warmup) * min(1.0, 2 * (steps - i) / steps)
    generator = torch.Generator().manual_seed(seed)
    if batch < parallel.processes():
        raise ValueError(f"{batch} samples in a step are too few for {parallel.processes()} processes")
    average, order, reading, first = None, [], {}, 0
    if state := kept.load():
        first, average, order, reading = state["step"], state["average"], state["order"], state["reading"]
        generator.set_state(state["generator"])
        opt.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for p, value in zip(parameters, state["parameters"], strict=True):
                p.copy_(value)
    with slider.at(0.0), unfinished.stoppable() as stop, tqdm(total=steps, initial=first, unit="step", desc="train") as bar:
        for i in range(first, steps):
            if len(order) < batch:  # every sample once before any comes again
                order = order + torch.randperm(n, generator=generator).tolist()
            rows, order = torch.tensor(order[:batch]), order[batch:]
            opt.zero_grad()
            total = loss(parallel.mine(rows)).sum() / batch  # of several processes, each has a part of the batch, and of the loss
            total.backward()
            stopping = total.new_tensor(float(stop()))  # added up too: all processes stop at the same step
            value, asked = (x.item() for x in parallel.add_up([total.detach(), stopping, *(p.grad for p in parameters)])[:2])
            opt.param_groups[0]["lr"] = rate(i)
            opt.step()
            if not value < 10:  # NaN too
                good = (kept.load() or {"step": 0})["step"]
                raise FloatingPointError(
                    f"training diverged at step {i + 1} (loss {value:.3g}): try a lower --lr than {lr:.2g}"
                    + (f"; --resume with it goes on from {f'step {good}' if good else 'what is collected'}" if kept.folder else "")
                )
            average = value if average is None else 0.9 * average + 0.1 * value
            if (i + 1) % meter_every == 0 or i + 1 == steps:
                reading = read()
                if on_meter:
                    on_meter(i + 1)
            if ((i + 1) % meter_every == 0 and i + 1 < steps) or asked:  # not at the end: another process may be removing the folder
                kept.save(
                    {
                        "step": i + 1,
                        "average": average,
                        "order": order,
                        "reading": reading,
                        "generator": generator.get_state(),
                        "optimiser": opt.state_dict(),
                        "parameters": [p.detach() for p in parameters],
                    }
                )
            if asked:
                raise KeyboardInterrupt(f"stopped after step {i + 1}" + "; the same command with --resume goes on from there" * bool(kept.folder))
            learned = f"learned {reading['share']:.0%}  cosine {reading['cosine']:.2f}" if reading else "learned ?"  # until the first reading
            bar.set_postfix_str(f"loss {average:.2f}  {learned}")
            bar.update()
    return reading | {"loss": average}


@torch.no_grad()
def meter(unet, slider, held_out: Targets, batch: int) -> dict:
    """The slider meter: how much of the teacher's direction the slider makes on x_t that it was not trained on.

    share:  projection of eps_s - eps_0 onto target - eps_0, in units of the latter; 1 is all of it (over all scales).
    cosine: between the two; near 0 the slider does something else.
    plus, minus: the shares at the positive and at the negative scales (0 where there are none).
    """
    products = []  # for each sample: along, length, change
    with slider.at(0.0):
        for rows in parallel.mine(torch.arange(len(held_out))).split(batch):
            here = held_out[rows]
            moved, wanted = predict(unet, slider, here).float() - here.eps_0.float(), here.wanted
            products.append(torch.stack([moved * wanted, wanted.square(), moved.square()]).sum((2, 3, 4)).T)  # (batch, 3)
    along, length, change = parallel.gather(torch.cat(products) if products else held_out.target.new_zeros(0, 3).float(), len(held_out)).T
    share = lambda which: (along[which].sum() / length[which].sum().clamp(min=1e-12)).item()
    plus = held_out.scale > 0
    return {
        "share": share(slice(None)),
        "cosine": (along.sum() / (length.sum() * change.sum()).sqrt().clamp(min=1e-12)).item(),
        "plus": share(plus),
        "minus": share(~plus),
    }


def verdict(reading: dict, difference: float, enough: tuple[float, float] = (0.25, 0.5), guessed=()) -> list[str]:
    """Plain words about the final meter. difference: |wanted| / |eps|, how much the teacher itself sees between the ends.
    enough: the share and the cosine below which a slider of this kind is no good. guessed: words that the model never saw."""
    lines = [
        f"The slider makes {reading['share']:.0%} of the teacher's change on unseen x_t (cosine {reading['cosine']:.2f}; "
        f"positive end {reading['plus']:.0%}, negative end {reading['minus']:.0%})."
    ]
    if difference < 0.02:
        lines.append(
            f"WARNING: the model itself hardly tells the two ends apart ({difference:.1%} of its prediction): "
            "a clearer difference between them, or a higher --eta, may help."
        )
    if reading["share"] < enough[0] and reading["loss"] < 0.8:
        lines.append(
            f"WARNING: it learned by heart what it was trained on (loss {reading['loss']:.2f}) and little else: give it more to learn from, such as more pairs."
        )
    elif reading["share"] < enough[0]:
        lines.append("WARNING: it learned next to nothing. Try more --steps, or a higher --lr.")
    elif reading["cosine"] < enough[1]:
        lines.append("WARNING: most of what it does is something else. Try a lower --lr, more x_t, or a higher --rank.")
    if guessed:
        lines.append(f"WARNING: the model never saw the words {', '.join(sorted(guessed))}: the slider does what it makes of them, whatever that is.")
    if len(lines) > 1:
        return lines
    if reading["share"] < 2 * enough[0]:
        return lines + [
            "It works in part: turned further, beyond scale 1, it comes nearer to what the frozen model changes between the two ends. Look at pictures."
        ]
    return lines + ["It works: it changes what the frozen model itself changes between the two ends. Whether that is what you meant, pictures say."]
