"""Our training against the published loop and ai-toolkit's, on the miniature:  python -m bench.recipe --seeds 0-2

The opponents restate, on our UNet, LoRA and schedule, so that nothing but the recipe differs:

published   the authors' train_lora_xl.py: for every optimiser step a new noise is denoised with the LoRA on at scale 1 to a
            random step of 50, at guidance 3; then three frozen predictions and one trained one, each in a batch of two whose
            empty-prompt half is thrown away; one preserved concept at a time; AdamW at 2e-4, alpha / r 1/4, bfloat16 (the
            LoRA's own numbers in float32, which is kinder). It trains scale +1 alone, so all are read at +1 as well as at
            both ends.
ai-toolkit  its TrainSliderProcess with the settings of its train_slider.example.yml: for every step four new noises are denoised
            with the LoRA off to a random step of 40, at guidance 3; three frozen predictions of each in one batch; two of the four
            trained at +1, two at -1; rank 8, alpha 4, AdamW at 2e-4, the loss weighted by min(SNR, 5) / SNR. It knows no
            preserved concepts. Kinder than it is: DDIM in the place of DDPM steps, and eq. (8) around the target prompt's own
            prediction, where its code has the empty prompt's.

All are read by the same meter on the same x_t, that none has seen, and by the measuring stick. A UNet evaluation is
one sample; one with gradients counts as three. Every run is written to --json as soon as it is done, and not run again.
"""

import json
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import lora
import sampler
import student
import train_text
from miniature import effect
from support import cli, options, training

TARGET = "a photo of a person"
CONCEPTS = {  # attribute of the measuring stick -> positive, negative, --preserve
    "eye_size": (f"{TARGET} with big eyes", f"{TARGET} with small eyes", ["man, woman"]),
    "age": (
        f"{TARGET}, very old",
        f"{TARGET}, very young",
        ["with glasses, without glasses", "with a hat, without a hat"],
    ),
    "smile": (f"{TARGET} with a big smile", f"{TARGET} with a big frown", ["man, woman"]),
}


@contextmanager
def counted(unet):
    """with counted(unet) as n: ... counts the samples that pass through `unet`: n["frozen"], and n["trained"] with gradients."""
    n = {"frozen": 0, "trained": 0}

    def count(module, inputs):
        n["trained" if torch.is_grad_enabled() else "frozen"] += len(inputs[0])

    handle = unet.register_forward_pre_hook(count)
    try:
        yield n
    finally:
        handle.remove()


def published(
    model,
    slider,
    prompts,
    *,
    eta,
    size,
    steps,
    seed,
    lr=2e-4,
    denoising_steps=50,
    guidance=3.0,
    on_step=None,
):
    """The published loop on an attached `slider`. prompts: from train_text.encode."""
    cond, ends, uncond = prompts
    unet, shape, n_p = model.unet, model.latent_shape(size), len(ends[0]) // 2
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    opt = torch.optim.AdamW(slider.parameters(), lr=lr)
    ts = sampler.timesteps(denoising_steps)

    def predict(c):  # guidance 1: the empty prompt's half is computed and thrown away
        return unet(
            x_t.repeat(2, 1, 1, 1), t.repeat(2), *(torch.cat(part) for part in zip(uncond, c))
        )[1:]

    for i in range(steps):
        p, stop = draw(0, n_p), draw(1, denoising_steps)
        pos, neg = tuple(e[p : p + 1] for e in ends), tuple(e[n_p + p : n_p + p + 1] for e in ends)
        x_T = sampler.noise([seed * 100_000 + i], shape, model.device, model.dtype)
        x_t = sampler.sample(
            unet,
            x_T,
            cond,
            uncond,
            alpha_bar=model.alpha_bar,
            steps=denoising_steps,
            guidance=guidance,
            sliders=[(slider, 1.0)],
            start=0.0,
            stop=stop,
        )
        t = torch.tensor([ts[stop]], device=model.device)
        with torch.no_grad(), slider.at(0.0):
            eps_pos, eps_0, eps_neg = predict(pos), predict(cond), predict(neg)
        with slider.at(1.0):
            loss = (
                (predict(cond).float() - (eps_0 + eta * (eps_pos - eps_neg)).float())
                .square()
                .mean()
            )
            opt.zero_grad()
            loss.backward()
        opt.step()
        if on_step:
            on_step(i + 1)


def ai_toolkit(
    model,
    slider,
    prompts,
    *,
    eta,
    size,
    steps,
    seed,
    lr=2e-4,
    denoising_steps=40,
    guidance=3.0,
    gamma=5.0,
    on_step=None,
):
    """ai-toolkit's loop on an attached `slider`. prompts: from train_text.encode, without preserved concepts."""
    cond, ends, uncond = prompts
    unet, shape, ab = model.unet, model.latent_shape(size), model.alpha_bar
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(slider.parameters(), lr=lr)
    ts, way = (
        sampler.timesteps(denoising_steps),
        torch.tensor([1.0, 1.0, -1.0, -1.0], device=model.device),
    )
    for i in range(steps):
        stop = int(torch.randint(1, denoising_steps - 1, (), generator=g))
        x_T = sampler.noise(
            range(seed * 100_000 + 4 * i, seed * 100_000 + 4 * i + 4),
            shape,
            model.device,
            model.dtype,
        )
        x_t = sampler.sample(
            unet,
            x_T,
            cond,
            uncond,
            alpha_bar=ab,
            steps=denoising_steps,
            guidance=guidance,
            stop=stop,
        )
        t, snr = torch.full((4,), ts[stop], device=model.device), ab[ts[stop]] / (1 - ab[ts[stop]])
        with torch.no_grad():
            three = tuple(
                torch.cat([e[:1], c, e[1:]]).repeat_interleave(4, 0) for e, c in zip(ends, cond)
            )
            eps_pos, eps_0, eps_neg = (
                unet(x_t.repeat(3, 1, 1, 1), t.repeat(3), *three).float().chunk(3)
            )
        with slider.at(way):
            target = eps_0 + eta * way.view(-1, 1, 1, 1) * (eps_pos - eps_neg)
            loss = (
                (unet(x_t, t, *sampler.expand(cond, 4)).float() - target).square().mean()
                * min(snr, gamma)
                / snr
            )
            opt.zero_grad()
            loss.backward()
        opt.step()
        if on_step:
            on_step(i + 1)


def ours(model, slider, prompts, *, eta, size, seed, recipe):
    """What train_text.py does with its defaults, its own meter included, the probe of the useful range left out."""
    train, held_out = train_text.teach(
        model, prompts, eta=eta, size=size, seed=seed, batch=4 * recipe["batch"]
    )
    training.fit_targets(
        model.unet,
        slider,
        train,
        held_out,
        steps=recipe["steps"],
        batch=recipe["batch"],
        lr=recipe["lr"],
        seed=seed,
    )


OPPONENTS = {"published": published, "ai-toolkit": ai_toolkit}


def main():
    p = cli.model_parser(__doc__)
    p.add_argument(
        "--attribute", choices=CONCEPTS, action="append", help="may be repeated (default: eye_size)"
    )
    p.add_argument(
        "--seeds", type=cli.seed_list, default=[0, 1, 2], help="training seeds (default: 0-2)"
    )
    p.add_argument(
        "--steps",
        type=int,
        default=500,
        help="of the published loop and ai-toolkit's (default: %(default)s, their own)",
    )
    p.add_argument(
        "--every", type=int, default=50, help="their steps between readings (default: %(default)s)"
    )
    p.add_argument(
        "--against", choices=OPPONENTS, action="append", help="may be repeated (default: published)"
    )
    p.add_argument(
        "--pictures",
        type=int,
        default=32,
        help="that the measuring stick reads at each of scales -3, 0, 3 (default: %(default)s)",
    )
    p.add_argument(
        "--json",
        default="bench/recipe.json",
        help="results; runs that are in it are not run again (default: %(default)s)",
    )
    args = p.parse_args()
    args.dtype = args.dtype or cli.fast_dtype()
    model = cli.load_model(args)
    size, recipe, path = (
        (min(model.size, 512),) * 2,
        training.text_recipe(model.unet),
        Path(args.json),
    )
    done = json.loads(path.read_text()) if path.exists() else []
    for attribute in args.attribute or ["eye_size"]:
        pos, neg, preserve = CONCEPTS[attribute]
        prompts = train_text.encode(model, [TARGET], pos, neg, options.combinations(preserve), size)
        held_out = train_text.collect(
            model,
            prompts,
            eta=recipe["eta"],
            trajectories=32,
            per_trajectory=2,
            denoising_steps=50,
            guidance=3.0,
            size=size,
            seed=999,
            batch=32,
        )
        plain = train_text.encode(model, [TARGET], pos, neg, [], size)
        for seed in args.seeds:
            for who in ["ours", *(args.against or ["published"])]:
                if any(
                    r["attribute"] == attribute and r["seed"] == seed and r["recipe"] == who
                    for r in done
                ):
                    continue
                run = one(
                    model,
                    who,
                    plain if who == "ai-toolkit" else prompts,
                    held_out,
                    attribute,
                    seed,
                    args,
                    size,
                    recipe,
                )
                done.append({"recipe": who, "attribute": attribute, "seed": seed, "readings": run})
                path.write_text(json.dumps(done, indent=1))
    table(done)


def one(model, who, prompts, held_out, attribute, seed, args, size, recipe) -> list[dict]:
    """Train once; the readings on the way (of ours, at the end), each with the cost so far. Reading costs nothing."""
    torch.manual_seed(seed)
    shape = dict(rank=8, alpha=4.0) if who == "ai-toolkit" else {}
    slider = (
        lora.Slider(lora.target_layers(model.unet), **shape).to(model.device).attach(model.unet)
    )
    readings, spent, started = [], 0.0, time.time()

    def read(step, pictures=False):
        nonlocal spent, started
        spent += time.time() - started
        here = (
            student.meter(model.unet, slider, held_out, 32) | {"step": step, "seconds": spent} | now
        )
        if pictures:
            slider.detach()
            table = effect.readings(
                model, [[(slider, s)] for s in (-3, 0, 3)], list(range(1000, 1000 + args.pictures))
            )
            found = effect.summary(table, attribute, [-3, 0, 3])
            here |= {
                name: found[name] for name in ("means", "moved", "worst_other", "worst_other_moved")
            }
        readings.append(here)
        started = time.time()

    with (
        counted(model.unet) as n,
        tqdm(total=args.steps, desc=f"{who}, {attribute}, seed {seed}") as bar,
    ):
        now = {}

        def on_step(step):
            bar.update()
            if step % args.every == 0:
                now.update(n)
                read(step, pictures=step == args.steps)
                n.update(now)

        if who in OPPONENTS:
            OPPONENTS[who](
                model,
                slider,
                prompts,
                eta=recipe["eta"],
                size=size,
                steps=args.steps,
                seed=seed,
                on_step=on_step,
            )
        else:
            ours(model, slider, prompts, eta=recipe["eta"], size=size, seed=seed, recipe=recipe)
            now.update(n)
            read(recipe["steps"], pictures=True)
    slider.detach()
    return readings


def cost(reading) -> int:
    return reading["frozen"] + 3 * reading["trained"]


def table(done):
    print(
        "| attribute | seed | recipe | steps | frozen | trained | cost | s | share (+1, -1) | cosine | moves | most moved other |\n"
        + "|---" * 12
        + "|"
    )
    ratios = {who: [] for who in OPPONENTS}
    for attribute, seed in dict.fromkeys((r["attribute"], r["seed"]) for r in done):
        runs = {
            r["recipe"]: r["readings"]
            for r in done
            if (r["attribute"], r["seed"]) == (attribute, seed)
        }
        rows = [("ours", runs["ours"][-1])] if "ours" in runs else []
        for who in filter(runs.get, OPPONENTS):
            last = runs[who][-1]
            if "ours" in runs:
                mine = rows[0][1]
                same = next(
                    (
                        r
                        for r in runs[who]
                        if r["plus"] >= mine["plus"] and r["cosine"] >= mine["cosine"]
                    ),
                    None,
                )
                ratios[who].append(
                    (
                        cost(mine) / cost(same or last),
                        mine["seconds"] / (same or last)["seconds"],
                        same is None,
                    )
                )
                if same and same is not last:
                    rows.append((f"{who}, when as good", same))
            rows.append((who, last))
        for who, r in rows:
            seen = (
                f"{r['moved']:.0%} | {r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}"
                if "moved" in r
                else " | "
            )
            print(
                f"| {attribute} | {seed} | {who} | {r['step']} | {r['frozen']:,} | {r['trained']:,} | {cost(r):,} | {r['seconds']:.0f} | "
                f"{r['share']:.2f} ({r['plus']:.2f}, {r['minus']:.2f}) | {r['cosine']:.2f} | {seen} |"
            )
    for who, found in ratios.items():
        if found:
            print(
                f"\nOurs to {who}, both at that one's first reading that is as good as ours at +1 (share and cosine; its last, "
                f"where none is: {sum(r[2] for r in found)} of {len(found)} runs), medians: "
                f"cost 1/{1 / statistics.median(r[0] for r in found):.1f}, time 1/{1 / statistics.median(r[1] for r in found):.1f}"
            )


if __name__ == "__main__":
    cli.run(main)
