"""Our training against the published loop, on the miniature:

    python -m bench.recipe --seeds 0-2

The opponent restates the authors' train_lora_xl.py on our UNet, LoRA and schedule, so that nothing
but the recipe differs: for every optimizer step a new noise is denoised with the LoRA on at scale 1
to a random step of 50, at guidance 3; then three frozen predictions and one trained one, each in a
batch of two whose empty-prompt half is thrown away; one preserved concept at a time; AdamW at 2e-4,
alpha / r 1/4, bfloat16 (the LoRA's own numbers in float32, which is kinder). It trains scale +1
alone, so both are read at +1 as well as at both ends. Our eta is used for both.

Both are read by the same meter on the same x_t, that none has seen, and by the measuring stick. A
UNet evaluation is one sample; one with gradients counts as three. Every run is written to --json as
soon as it is done, and not run again."""

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
from support.options import default_help

TARGET = "a photo of a person"
MEN_AND_WOMEN = ["man, woman"]
GLASSES_AND_HATS = ["with glasses, without glasses", "with a hat, without a hat"]
CONCEPTS = {  # attribute of the measuring stick -> positive, negative, --preserve
    "eye_size": (f"{TARGET} with big eyes", f"{TARGET} with small eyes", MEN_AND_WOMEN),
    "age": (f"{TARGET}, very old", f"{TARGET}, very young", GLASSES_AND_HATS),
    "smile": (f"{TARGET} with a big smile", f"{TARGET} with a big frown", MEN_AND_WOMEN),
}


@contextmanager
def counted(unet):
    """with counted(unet) as n: ... counts the samples that pass through `unet`: n["frozen"], and
    n["trained"] with gradients."""
    n = {"frozen": 0, "trained": 0}

    def count(module, inputs):
        n["trained" if torch.is_grad_enabled() else "frozen"] += len(inputs[0])

    handle = unet.register_forward_pre_hook(count)
    try:
        yield n
    finally:
        handle.remove()


# -------------------------------------------------------------------------------------- the recipes


def published(model, slider, prompts, *, eta, size, steps, seed, on_step):
    """The published loop on an attached `slider`. prompts: from train_text.encode. on_step: called
    with the number of steps done."""
    cond, ends, uncond = prompts
    unet, shape, n_p = model.unet, model.latent_shape(size), len(ends[0]) // 2
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    optimizer, ts = torch.optim.AdamW(slider.parameters(), lr=2e-4), sampler.timesteps(50)
    walk = dict(alpha_bar=model.alpha_bar, steps=50, guidance=3.0, start=0.0)

    def predict(c):  # guidance 1: the empty prompt's half is computed and thrown away
        both = (torch.cat(part) for part in zip(uncond, c))
        return unet(x_t.repeat(2, 1, 1, 1), t.repeat(2), *both)[1:]

    for i in range(steps):
        p, stop = draw(0, n_p), draw(1, 50)
        pos, neg = tuple(e[p : p + 1] for e in ends), tuple(e[n_p + p : n_p + p + 1] for e in ends)
        x_T = sampler.noise([seed * 100_000 + i], shape, model.device, model.dtype)
        x_t = sampler.sample(unet, x_T, cond, uncond, sliders=[(slider, 1.0)], stop=stop, **walk)
        t = torch.tensor([ts[stop]], device=model.device)
        with torch.no_grad(), slider.at(0.0):
            eps_pos, eps_0, eps_neg = predict(pos), predict(cond), predict(neg)
            target = (eps_0 + eta * (eps_pos - eps_neg)).float()
        with slider.at(1.0):
            loss = (predict(cond).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        on_step(i + 1)


def ours(model, slider, prompts, *, eta, size, seed, recipe):
    """What train_text.py does with its defaults, its own meter included, the probe of the useful
    range left out."""
    settings = dict(eta=eta, size=size, seed=seed, batch=4 * recipe["batch"])
    train, held_out = train_text.teach(model, prompts, **settings)
    settings = {name: recipe[name] for name in ("steps", "batch", "lr")}
    training.fit_targets(model.unet, slider, train, held_out, seed=seed, **settings)


OPPONENTS = {"published": published}


# ---------------------------------------------------------------------------------------- measuring


class Readings:
    """What the meter and the measuring stick say of a slider while it trains, each with the cost so
    far. Reading itself costs nothing."""

    def __init__(self, model, slider, held_out, attribute: str, pictures: int):
        self.model, self.slider, self.held_out = model, slider, held_out
        self.attribute, self.seeds = attribute, effect.SEEDS[:pictures]
        self.rows, self.seconds, self.started = [], 0.0, time.time()

    def read(self, step: int, n: dict, pictures: bool = False):
        """n: `counted`'s, left as it was. pictures: draw some too, which detaches the slider."""
        self.seconds += time.time() - self.started
        evaluations = dict(n)
        row = student.meter(self.model.unet, self.slider, self.held_out, 32)
        row |= {"step": step, "seconds": self.seconds} | evaluations
        if pictures:
            row |= self.measure()
        n.update(evaluations)
        self.rows.append(row)
        self.started = time.time()

    def measure(self) -> dict:
        self.slider.detach()
        columns = [[(self.slider, scale)] for scale in (-3, 0, 3)]
        table = effect.readings(self.model, columns, self.seeds)
        found = effect.summary(table, self.attribute, [-3, 0, 3])
        return {k: found[k] for k in ("means", "moved", "worst_other", "worst_other_moved")}


def train_and_read(model, who, prompts, held_out, attribute, seed, args) -> list[dict]:
    """Train once; the readings on the way (of ours, at the end)."""
    torch.manual_seed(seed)
    recipe, size = training.text_recipe(model.unet), training_size(model)
    slider = lora.Slider(lora.target_layers(model.unet)).to(model.device)
    slider.attach(model.unet)
    settings = dict(eta=recipe["eta"], size=size, seed=seed)
    readings = Readings(model, slider, held_out, attribute, args.pictures)
    progress = tqdm(total=args.steps, desc=f"{who}, {attribute}, seed {seed}")
    with counted(model.unet) as n, progress as bar:

        def on_step(step):
            bar.update()
            if step % args.every == 0:
                readings.read(step, n, pictures=step == args.steps)

        if who in OPPONENTS:
            settings |= dict(steps=args.steps, on_step=on_step)
            OPPONENTS[who](model, slider, prompts, **settings)
        else:
            ours(model, slider, prompts, recipe=recipe, **settings)
            readings.read(recipe["steps"], n, pictures=True)
    slider.detach()
    return readings.rows


def training_size(model) -> tuple[int, int]:
    return (min(model.size, 512),) * 2


# ------------------------------------------------------------------------------------------ results


def cost(reading: dict) -> int:
    return reading["frozen"] + 3 * reading["trained"]


def as_good_as(readings: list[dict], our_row: dict) -> dict | None:
    """The first reading that is as good as ours at +1 (share and cosine)."""
    for r in readings:
        if r["plus"] >= our_row["plus"] and r["cosine"] >= our_row["cosine"]:
            return r
    return None


def print_table(done: list[dict]):
    head = "attribute | seed | recipe | steps | frozen | trained | cost | s | share (+1, -1)"
    print(f"| {head} | cosine | moves | most moved other |\n" + "|---" * 12 + "|")
    ratios = {who: [] for who in OPPONENTS}  # (cost, time, whether it never was as good)
    for attribute, seed in dict.fromkeys((r["attribute"], r["seed"]) for r in done):
        of_this = [r for r in done if (r["attribute"], r["seed"]) == (attribute, seed)]
        runs = {r["recipe"]: r["readings"] for r in of_this}
        our_row = runs["ours"][-1] if "ours" in runs else None
        rows = [("ours", our_row)] if our_row else []
        for who in filter(runs.get, OPPONENTS):
            last = runs[who][-1]
            if our_row:
                same = as_good_as(runs[who], our_row)
                against = same or last
                time_ratio = our_row["seconds"] / against["seconds"]
                ratios[who].append((cost(our_row) / cost(against), time_ratio, same is None))
                if same and same is not last:
                    rows.append((f"{who}, when as good", same))
            rows.append((who, last))
        for who, r in rows:
            print(f"| {attribute} | {seed} | {who} | {cells(r)} |")
    for who, found in ratios.items():
        if found:
            print_ratios(who, found)


def cells(r: dict) -> str:
    """The columns of a reading."""
    counts = f"{r['step']} | {r['frozen']:,} | {r['trained']:,} | {cost(r):,} | {r['seconds']:.0f}"
    shares = f"{r['share']:.2f} ({r['plus']:.2f}, {r['minus']:.2f}) | {r['cosine']:.2f}"
    seen = " | "
    if "moved" in r:
        other = f"{r['worst_other'].replace('_', ' ')} {r['worst_other_moved']:.0%}"
        seen = f"{r['moved']:.0%} | {other}"
    return f"{counts} | {shares} | {seen}"


def print_ratios(who: str, found: list[tuple]):
    costs, times, never = zip(*found)
    runs = f"{sum(never)} of {len(found)} runs"
    print(
        f"\nOurs to {who}, both at that one's first reading that is as good as ours at +1 "
        f"(share and cosine; its last, where none is: {runs}), medians: "
        f"cost 1/{1 / statistics.median(costs):.1f}, time 1/{1 / statistics.median(times):.1f}"
    )


def parse_args():
    p = cli.model_parser(__doc__)
    attribute = "may be repeated (default: eye_size)"
    p.add_argument("--attribute", choices=CONCEPTS, help=attribute, action="append")
    seeds = dict(default=[0, 1, 2], help="training seeds (default: 0-2)")
    p.add_argument("--seeds", type=cli.seed_list, **seeds)
    steps = "of the published loop (default: %(default)s)"
    p.add_argument("--steps", type=int, default=500, help=steps)
    every = default_help("their steps between readings")
    p.add_argument("--every", type=int, default=50, help=every)
    pictures = default_help("that the measuring stick reads at each of scales -3, 0, 3")
    p.add_argument("--pictures", type=int, default=32, help=pictures)
    results = default_help("results; runs that are in it are not run again")
    p.add_argument("--json", default="bench/recipe.json", help=results)
    return p.parse_args()


def main():
    args = parse_args()
    args.dtype = args.dtype or cli.fast_dtype()
    model = cli.load_model(args)
    size, path = training_size(model), Path(args.json)
    eta = training.text_recipe(model.unet)["eta"]
    done = json.loads(path.read_text()) if path.exists() else []
    for attribute in args.attribute or ["eye_size"]:
        pos, neg, preserve = CONCEPTS[attribute]
        preserved = options.combinations(preserve)
        prompts = train_text.encode(model, [TARGET], pos, neg, preserved, size)
        settings = dict(trajectories=32, per_trajectory=2, denoising_steps=50, guidance=3.0)
        settings |= dict(eta=eta, size=size, seed=999, batch=32)
        held_out = train_text.collect(model, prompts, **settings)
        for seed in args.seeds:
            for who in ("ours", *OPPONENTS):
                run = {"recipe": who, "attribute": attribute, "seed": seed}
                if any(run.items() <= r.items() for r in done):
                    continue
                rows = train_and_read(model, who, prompts, held_out, attribute, seed, args)
                done.append(run | {"readings": rows})
                path.write_text(json.dumps(done, indent=1))
    print_table(done)


if __name__ == "__main__":
    cli.run(main)
