"""Does guidance multiply a slider?

    python -m experiments.guidance

A slider was taught at a prompt c_t, but is on in both predictions that guidance combines. If it
makes the same change D in both, it passes through once:

    (eps_u + D) + g ((eps_c + D) - (eps_u + D))  =  eps_u + g (eps_c - eps_u) + D

* The change at scale 1 in eps_u against that in eps_c, at x_t of noises that training has not seen.
* What the slider at scale 2 does to pictures drawn at guidance 1 to 10, each against the plain
  picture at the same guidance."""

import dataclasses
import functools

import torch

import student
import train_text
from experiments.common import Lab
from support import cli
from support.sweep import composed

GUIDANCE = [1.0, 2.0, 3.0, 5.0, 7.5, 10.0]


@torch.no_grad()
def changes(lab, concept: str, slider) -> dict:
    """Cosine between the slider's change of eps_u and its change of eps_c, and the length of the
    first in units of the second's."""
    prompts, batch = lab.encode(concept), 4 * lab.recipe["batch"]
    settings = dict(eta=1.0, trajectories=8, per_trajectory=4, size=lab.size, batch=batch)
    seen = train_text.collect(lab.model, prompts, seed=1000 + lab.seed, **settings)
    at_c = seen[seen.scale > 0]  # every x_t once
    at_u = dataclasses.replace(at_c, cond=prompts[2], prompt=torch.zeros_like(at_c.prompt))

    def all_changes(samples):
        batches = torch.arange(len(samples)).split(batch)
        return torch.cat([change(lab.model.unet, slider, samples[rows]) for rows in batches])

    with composed(lab.model.unet, [(slider, 1.0, 0.0)]):
        D_c, D_u = all_changes(at_c), all_changes(at_u)
    cosine = torch.cosine_similarity(D_u.flatten(), D_c.flatten(), 0).item()
    return {"cosine": cosine, "length": (D_u.norm() / D_c.norm()).item()}


def change(unet, slider, samples):
    """eps_1 - eps_0, (b, 4, h, w)."""
    off = dataclasses.replace(samples, scale=torch.zeros_like(samples.scale))
    eps_1, eps_0 = (student.predict(unet, slider, at).float() for at in (samples, off))
    return eps_1 - eps_0


def main():
    lab, shown = Lab(__doc__, "guidance", count=16, dtype="float32"), []
    plain = functools.cache(lambda g, prompts: lab.draw([[]], prompts, guidance=g)[0])
    for concept in lab.concepts:
        slider = lab.text_slider(concept)
        lab.once(concept, lambda: changes(lab, concept, slider))
        for g in GUIDANCE:
            # Drawn once, be it measured, shown or both.
            prompts = tuple(lab.prompts_for(concept))
            draw = functools.cache(lambda: lab.draw([[(slider, 2.0)]], prompts, guidance=g)[0])
            edit = lambda: lab.edit(concept, plain(g, prompts), draw())
            lab.once(f"{concept}: guidance {g:g}", edit)
            if concept == "age" and g in (1, 5, 10):
                shown += [(f"guidance {g:g}", plain(g, prompts)), ("age 2", draw())]
    names, columns = zip(*shown)
    lab.sheet(columns, names)


if __name__ == "__main__":
    cli.run(main)
