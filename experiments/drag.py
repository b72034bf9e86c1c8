"""What drags glasses along with age? The same pictures at scales -3 to 3, one thing changed at a
time:

    python -m experiments.drag

* eq. (8) itself while sampling, with its P, with none, with a longer one: what the model's own
  difference between the ends does, without any training;
* sliders: the defaults, four times the x_t, other ranks, other layers;
* the default slider, on earlier and later.

Each row: how far age moves and how far each other attribute that belongs to age in this world."""

from experiments.common import Lab
from miniature import effect
from support import cli
from train_text import ends_difference

MORE = ["smiling, frowning", "man, woman"]
WATCHED = ("glasses", "hat", "sex", "smile", "hair_length")


def main():
    lab = Lab(__doc__, "drag", count=64)
    scales, P = effect.SCALES, lab.all_concepts["age"].preserve

    def read(columns, **settings):
        table = effect.table(lab.draw(columns, **settings))
        others = {name: effect.moved(table[name], name) for name in WATCHED}
        signed = {name: effect.summary(table, name)["moved"] for name in WATCHED}
        return effect.summary(table, "age") | {"others": others, "signed": signed}

    def by_eq_8(preserve):
        _, ends, _ = lab.encode("age", preserve)
        delta = lambda x_t, t: ends_difference(lab.model.unet, x_t, t, ends)
        etas = [lab.recipe["eta"] * scale for scale in scales]
        return read([[]] * len(scales), delta=delta, etas=etas)

    def by_slider(start=0.3, **kind):
        slider = lab.text_slider("age", **kind)
        return read([[(slider, scale)] for scale in scales], start=start)

    for name, preserve in (("P", P), ("no P", []), ("a longer P", P + MORE)):
        lab.once(f"eq. (8), {name}", lambda: by_eq_8(preserve))
    kinds = {"slider": {}, "slider, no P": dict(preserve=[]), "longer P": dict(preserve=P + MORE)}
    kinds |= {"4 times the x_t": dict(trajectories=64), "2 times the steps": dict(steps=120)}
    kinds |= {f"rank {rank}": dict(rank=rank) for rank in (1, 16)}
    kinds |= {f"start {start}": dict(start=start) for start in (0.1, 0.4, 0.5)}
    for name, kind in kinds.items():
        lab.once(name, lambda: by_slider(**kind))


if __name__ == "__main__":
    cli.run(main)
