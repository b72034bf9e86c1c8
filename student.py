"""The student: fit a slider to targets that a frozen teacher has collected. All trainers share this one loop.

A teacher (train_text.py, say) visits noised latents x_t with the frozen model and notes, for each, what the model
predicts (eps_0) and the change it should be taught (delta). The student then makes eps of the model with the slider at
scale s equal to eps_0 + s * delta, for s = +1 and, by default, -1.
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass
class Targets:
    """What a teacher collected: n samples."""
    x_t: torch.Tensor  # (n, 4, h, w)
    t: torch.Tensor  # (n,) noise levels
    prompt: torch.Tensor  # (n,) row of `cond` that belongs to each sample
    eps_0: torch.Tensor  # (n, 4, h, w): the frozen model's own prediction
    delta: torch.Tensor  # (n, 4, h, w): the change to be taught at scale 1; its negative at scale -1
    cond: tuple  # context (m, 77, d), pooled (m, p), time_ids (m, 6) of the m prompts

    def __len__(self):
        return len(self.t)

    def __getitem__(self, rows) -> "Targets":
        return Targets(self.x_t[rows], self.t[rows], self.prompt[rows], self.eps_0[rows], self.delta[rows], self.cond)


def predict(unet, slider, batch: Targets, scale):
    """eps_{theta*}(x_t, c_t, t) with the slider at `scale` (a number or (n,)), shape (n, 4, h, w)."""
    with slider.at(scale):
        return unet(batch.x_t, batch.t, *(c[batch.prompt] for c in batch.cond))


def fit(unet, slider, train: Targets, held_out: Targets, *, steps: int, batch: int, lr: float, both_ends: bool = True,
        seed: int = 0, meter_every: int = 25) -> dict:
    """Train `slider` (attached to `unet`), show a progress bar with loss and meter; returns the final meter.

    The loss is the mean squared error divided by that of doing nothing: 1 is an untrained slider, 0 a perfect copy of
    the teacher. Raises FloatingPointError when the loss is no longer finite or far above 1.
    """
    parameters = [p for p in slider.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1.0, (i + 1) / warmup) * min(1.0, 2 * (steps - i) / steps))
    generator = torch.Generator().manual_seed(seed)
    nothing = train.delta.float().square().mean()  # the squared error of scale 0
    reading = meter(unet, slider, held_out, batch)
    average, order = None, []
    with tqdm(total=steps, unit="step", desc="train") as bar:
        for i in range(steps):
            if len(order) < batch:  # every sample once before any comes again
                order = torch.randperm(len(train), generator=generator).tolist()
            rows, order = torch.tensor(order[:batch]), order[batch:]
            here = train[rows]
            s = torch.ones(len(rows), device=here.x_t.device)
            if both_ends:
                here, s = train[torch.cat([rows, rows])], torch.cat([s, -s])
            target = here.eps_0.float() + s.view(-1, 1, 1, 1) * here.delta.float()
            loss = (predict(unet, slider, here, s).float() - target).square().mean() / nothing
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            value = loss.item()
            if not value < 10:  # NaN too
                raise FloatingPointError(f"training diverged at step {i + 1} (loss {value:.3g}): try a lower --lr than {lr:.2g}")
            average = value if average is None else 0.9 * average + 0.1 * value
            if (i + 1) % meter_every == 0 or i + 1 == steps:
                reading = meter(unet, slider, held_out, batch)
            bar.set_postfix_str(f"loss {average:.2f}  learned {reading['share']:.0%}  cosine {reading['cosine']:.2f}")
            bar.update()
    return reading | {"loss": average}


@torch.no_grad()
def meter(unet, slider, held_out: Targets, batch: int) -> dict:
    """The slider meter: how much of the teacher's direction the slider makes on x_t that it was not trained on.

    share:  projection of eps_s - eps_0 onto s * delta, in units of delta; 1 is all of it (mean over s = +1 and -1).
    cosine: between the two; near 0 the slider does something else. `plus` and `minus` are the shares of either end.
    """
    dot, change, ends = 0.0, 0.0, {}
    length = held_out.delta.float().square().sum()
    for name, s in (("plus", 1.0), ("minus", -1.0)):
        along = 0.0
        for rows in torch.arange(len(held_out)).split(2 * batch):
            here = held_out[rows]
            moved = (predict(unet, slider, here, s).float() - here.eps_0.float()) * s
            along += (moved * here.delta.float()).sum()
            change += moved.square().sum()
        ends[name] = (along / length).item()
        dot += along
    return {"share": (dot / (2 * length)).item(), "cosine": (dot / (2 * length * change).sqrt().clamp(min=1e-12)).item(), **ends}


def verdict(reading: dict, difference: float) -> list[str]:
    """Plain words about the final meter. difference: |delta| / |eps|, how much the teacher itself sees between the ends."""
    lines = [f"The slider makes {reading['share']:.0%} of the teacher's change on unseen x_t (cosine {reading['cosine']:.2f}; "
             f"positive end {reading['plus']:.0%}, negative end {reading['minus']:.0%})."]
    if difference < 0.02:
        lines.append(f"WARNING: the model itself hardly tells the two prompts apart ({difference:.1%} of its prediction): "
                     "stronger words in --pos and --neg, or a higher --eta, may help.")
    if reading["share"] < 0.25:
        lines.append("WARNING: it learned next to nothing. Try more --steps, or a higher --lr.")
    elif reading["cosine"] < 0.5:
        lines.append("WARNING: most of what it does is something else. Try a lower --lr, more --trajectories, or a higher --rank.")
    else:
        lines.append("It works: try scales -3 to 3.")
    return lines
