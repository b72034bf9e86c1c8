"""What the trainers share: their defaults, all that surrounds student.fit, and what is said and
written at the end."""

import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

import lora
import student
from formats import hashes
from sdxl import MINIATURE
from sdxl_unet import Checkpointed
from support import batches, cli, distributed, graphs, images, probe, sizes
from support.checkpoint import NO_CHECKPOINT, Checkpoint, deferred_interrupt

VERSION = "0.2"
METER_EVERY = 25  # optimizer steps

# Defaults, as measured: for a small UNet on the miniature, for one of SDXL's size by
# experiments/full_width.py. PUBLISHED are the paper's code's (--recipe published).
SMALL, LARGE = dict(lr=4e-3, batch=8, steps=60), dict(lr=1e-3, batch=8, steps=60)
ETA = 0.6  # of eq. (8): -3 ... 3 is then a useful range of scales
PUBLISHED = dict(lr=2e-4, batch=2, steps=500, eta=4.0)


def is_small(unet) -> bool:
    """Far below SDXL's size, like the miniature, for which other defaults were measured."""
    return max(unet.config["block_out_channels"]) < 640


def recipe(unet, small=SMALL, large=LARGE) -> dict:
    return dict(small if is_small(unet) else large)


def text_recipe(unet) -> dict:
    """train_text.py's, eta included."""
    return recipe(unet) | {"eta": ETA}


def split_trajectories(trajectories: int) -> tuple[int, int]:
    """How many of a text slider's trajectories are trained on, and how many are the meter's."""
    return trajectories, max(-(-trajectories // 4), distributed.world_size())


def prepare(args, model, recipe: dict, sample=batches.TRAINED) -> tuple[int, int]:
    """Fill in the defaults of `recipe`; returns the size in pixels (height, width). sample: what
    one takes in training (support/batches.py). ValueError for a size that the model cannot
    make."""
    args.size = args.size or str(min(model.size, 512))
    size = sizes.height_width(args.size)
    shape = model.latent_shape(size)
    if getattr(args, "recipe", "") == "published":
        recipe = {name: PUBLISHED[name] for name in recipe}
    recipe = recipe | {"batch": max(recipe["batch"], distributed.world_size())}
    for name, value in recipe.items():
        setattr(args, name, getattr(args, name) or value)
    if not args.checkpointing and not fits(args.batch, model.unet, shape, sample):
        print("--checkpointing is on: without it this batch does not fit into the GPU's memory")
        args.checkpointing = True
    set_checkpointing(model.unet, args.checkpointing)
    return size


def size_of_pairs(model, groups) -> str:
    """What all pictures of train_pairs.py are brought to, as --size has it; said. ValueError where
    those of a group differ in their proportions."""
    first = (images.read_alike(files)[0] for files in groups)  # one group at a time in memory
    ratios = [picture.width / picture.height for picture in first]
    size = sizes.for_pictures(model, ratios, min(model.size, 512), is_small(model.unet))
    h, w = sizes.height_width(size)
    cut = sum(abs(ratio * h / w - 1) > 0.01 for ratio in ratios)
    cropped = f", for which {cut} of {len(groups)} groups are cropped" if cut else ""
    print(f"pictures are brought to {w}x{h} (width x height){cropped}; --size names another size")
    return size


def fits(batch: int, unet, shape, sample=batches.TRAINED) -> bool:
    """Whether this process's share of `batch` can be trained on without gradient checkpointing."""
    device, share = next(unet.parameters()).device, -(-batch // distributed.world_size())
    needed = share * batches.sample_bytes(unet, shape, sample)
    return device.type != "cuda" or needed < 0.9 * batches.free_memory(device)


def layers_of_bank(args, model) -> dict:
    """The layers of train_space.py's sliders, which are trained together as one. ValueError where
    a layer has not as many ranks as they have together."""
    layers = lora.target_layers(model.unet, args.layers, not args.no_conv)
    try:
        lora.Slider(layers, args.sliders * args.rank)
    except ValueError as error:
        together = f"--sliders {args.sliders} of --rank {args.rank} are trained together"
        raise ValueError(f"{together}: {error}") from None
    return layers


def remove_beyond(folder: Path, n: int):
    """Delete what an earlier SliderSpace of more than n sliders left in the folder: the new one of
    n has replaced only as many."""
    while (folder / "space.json").exists() and (path := folder / f"{n + 1}.safetensors").exists():
        path.unlink()
        n += 1


def samples_at_once(args, model, size, checkpoint) -> int:
    """How many go through the frozen UNet together: on a CPU four times a step's batch, on a GPU
    what fits. After a stop as many as before it, whatever is free by then: the checkpoint's parts
    are named by it, and rounding depends on it."""
    shape = model.latent_shape(size)
    count = lambda: batches.samples_at_once(model.unet, shape, 4 * args.batch)
    return checkpoint.remember_number("samples_at_once", count)


def set_checkpointing(network, on: bool = True):
    """Switch gradient checkpointing of a network's resnets and transformer blocks on or off."""
    for module in network.modules():
        if isinstance(module, Checkpointed):
            module.checkpointing = on


def new_slider(args, model) -> lora.Slider:
    """On the model's device, with the layers, rank and alpha that the command line names."""
    torch.manual_seed(args.seed)
    layers = lora.target_layers(model.unet, args.layers, not args.no_conv)
    return lora.Slider(layers, args.rank, args.alpha).to(model.device)


def settings(args) -> dict:
    """What a slider file says it was trained with."""
    leave_out = {"out", "like", "dry_run", "resume", "overwrite", "no_cuda_graphs", "strict"}
    leave_out |= {"model"} if args.model == str(MINIATURE) else set()
    return {k: without_folders(v) for k, v in vars(args).items() if k not in leave_out}


def without_folders(value):
    """An option's value; of the path of an existing file or folder the last part alone, so that a
    slider file gives nothing away about the machine it was made on."""
    if isinstance(value, list | tuple):
        return [without_folders(v) for v in value]
    is_path = isinstance(value, str) and os.path.exists(value)
    return os.path.basename(os.path.abspath(value)) if is_path else value


def provenance(args, prediction: str = "epsilon") -> dict:
    """What every slider file says of its training: the settings and, in kohya's and Stability's
    keys, the model. A folder or a Hub id is no file, and has no hash."""
    name = "miniature" if args.model == str(MINIATURE) else without_folders(args.model)
    about = {"settings": settings(args), "ss_sd_model_name": name}
    about["modelspec.prediction_type"] = prediction
    if os.path.isfile(args.model):
        about["ss_sd_model_hash"] = hashes.model_hash(args.model)
    return about


# ----------------------------------------------------------------------- what surrounds student.fit


def train(
    slider,
    loss,
    n: int,
    read_meter,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int = 0,
    meter_every: int = METER_EVERY,
    on_meter=None,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> dict:
    """student.fit, resumable, stoppable and in several processes, with the meter and a progress
    bar.

    loss, n: student.fit's. read_meter() -> dict; on_meter(step) is called after it. Returns the
    final reading with "loss". FloatingPointError if training diverges. KeyboardInterrupt after
    Ctrl-C, at the end of a step."""
    if batch < distributed.world_size():
        raise ValueError(f"batch: {batch} is too few for {distributed.world_size()} processes")
    state, average, reading = student.TrainingState(slider, lr, seed), None, {}
    if saved := checkpoint.load():
        state.load_state_dict(saved)
        average, reading = saved["average"], saved["reading"]
    save = lambda: checkpoint.save(state.state_dict() | {"average": average, "reading": reading})
    share_gradients(state)
    shared_loss = lambda rows: loss(distributed.shard(rows))
    capture = lambda step: graphs.captured(step, state.parameters[0].device)
    steps_of_fit = student.fit(state, shared_loss, n, steps=steps, batch=batch, capture=capture)
    progress = tqdm(total=steps, initial=state.step, unit="step", desc="train")
    # The loss sets the slider's scale; `at` restores it afterwards.
    with slider.at(0.0), deferred_interrupt() as stop, progress as bar:
        for value in steps_of_fit:
            # Of all processes: so they stop at the same step.
            both = distributed.all_reduce([value, value.new_tensor(float(stop()))])
            value, stopping = (x.item() for x in both)
            average = value if average is None else 0.9 * average + 0.1 * value
            if not average < 10:  # NaN too; not `value`: a batch with an outlier may exceed it once
                raise FloatingPointError(diverged(state.step, value, lr, checkpoint))
            meter_is_due = state.step % meter_every == 0
            if meter_is_due or state.step == steps:
                reading = read_meter()
                if on_meter:
                    on_meter(state.step)
            # Not at the end: another process may be removing the folder.
            if (meter_is_due and state.step < steps) or stopping:
                save()
            if stopping:
                resume = "; the same command with --resume goes on from there"
                resume *= checkpoint.folder is not None
                raise KeyboardInterrupt(f"stopped after step {state.step}{resume}")
            learned = "learned ?"  # until the first reading
            if reading:
                learned = f"learned {reading['share']:.0%}  cosine {reading['cosine']:.2f}"
            bar.set_postfix_str(f"loss {average:.2f}  {learned}")
            bar.update()
    return reading | {"loss": average}


def share_gradients(state: student.TrainingState):
    """Before each step of the optimizer, add up the gradients of all processes: each has computed
    its share of the batch."""

    def add_up(*_):
        distributed.all_reduce([p.grad for p in state.parameters])

    state.optimizer.register_step_pre_hook(add_up)


def diverged(step: int, value: float, lr: float, checkpoint: Checkpoint) -> str:
    line = f"training diverged at step {step} (loss {value:.3g}): try a lower --lr than {lr:.2g}"
    if checkpoint.folder is None:
        return line
    good = (checkpoint.load() or {"step": 0})["step"]
    return f"{line}; --resume with it goes on from {f'step {good}' if good else 'the teacher'}"


def fit_targets(
    unet, slider, targets, held_out, *, batch: int, checkpoint=NO_CHECKPOINT, **settings
) -> dict:
    """Fit `slider` (attached to `unet`) to a teacher's student.Targets. held_out: targets for the
    meter. settings: as in `train`, whose result this returns. ValueError if there is nothing to
    learn."""
    batch = min(batch, len(targets))
    try:
        loss = student.make_loss(unet, slider, targets)
    except ValueError:
        checkpoint.remove()  # of no use to a corrected command
        raise
    # Not more than this on a GPU: training is still to take its memory.
    at_once = min(4 * batch, batches.samples_at_once(unet, held_out.x_t.shape[1:], batch))
    read_meter = lambda: student.meter(unet, slider, held_out, at_once)
    settings |= dict(batch=batch, checkpoint=checkpoint)
    return train(slider, loss, len(targets), read_meter, **settings)


# ---------------------------------------------------------------------------- text and pair sliders


def fit(args, model, slider, targets, held_out, cond, uncond, checkpoint: Checkpoint) -> dict:
    """Fit `slider`, which is attached, as the command line says, with a preview strip every
    --preview steps. cond, uncond: what the strip shows, by their first rows. Returns the final
    meter."""
    path, shape = Path(args.out), targets.x_t.shape[1:]
    cond, uncond = (tuple(c[:1] for c in rows) for rows in (cond, uncond))

    def draw(step):
        due = args.preview and (step % args.preview == 0 or step == args.steps)
        if due and distributed.is_main_process():
            sheet = probe.preview(model, slider, cond, uncond, shape)
            images.save_image(sheet, path.with_suffix(".png"))

    names = ("steps", "batch", "lr", "seed")
    settings = {name: getattr(args, name) for name in names} | {"on_meter": draw}
    settings |= {"meter_every": args.preview or METER_EVERY, "checkpoint": checkpoint}
    return fit_targets(model.unet, slider, targets, held_out, **settings)


def finish(
    args,
    model,
    slider,
    reading: dict,
    about: dict,
    cond,
    uncond,
    started: float,
    enough=(0.25, 0.5),
):
    """Write the slider file, find the useful range of scales, and say in plain words what came out.

    reading: from `fit`. about: what else the file's metadata says, "difference" among it: how much
    the teacher itself sees between the ends. enough: as in `verdict`. started: time.time() at the
    start."""
    if not distributed.is_main_process():
        return
    path = Path(args.out)
    about = about | provenance(args, model.prediction) | {"meter": reading, "version": VERSION}
    save = lambda: lora.save(path, slider, about | {"seconds": round(time.time() - started, 1)})
    save()  # the probe may take a while
    lines = verdict(reading, about["difference"], enough, model.unknown_words)
    print(*lines, sep="\n")
    if args.probe:
        one_row = (tuple(c[:1] for c in rows) for rows in (cond, uncond))
        shape = model.latent_shape(sizes.height_width(args.size))
        about["probe"] = probe.probe(model, slider, *one_row, shape, args.probe)
        save()
        limits = (probe.SCALES[0], probe.SCALES[-1])
        said = lambda end: f"{end:+.1f}" + (" (tried no further)" if end in limits else "")
        low, high = map(said, about["probe"]["range"])
        if not any(line.startswith("WARNING") for line in lines):
            beyond = "beyond it pictures break down or stop changing"
            print(f"Useful range of scales: {low} to {high}; {beyond}.")
    size, seconds = path.stat().st_size / 1e6, time.time() - started
    print(f"{path}: written, {size:.2f} MB, after {seconds:.0f} s")
    prompt = about.get("prompts", [args.prompt])[0] or "..."  # pairs may be of anything
    print(
        f'To look at it: python slider.py --prompt "{prompt}" --slider {path} '
        f"--scales -3,-2,-1,0,1,2,3 --out out/{path.stem}{cli.model_options(args)}"
    )
    if args.preview:
        print(f"{path.with_suffix('.png')}: rows are seeds, columns scales")


def verdict(reading: dict, difference: float, enough=(0.25, 0.5), unknown_words=()) -> list[str]:
    """Plain words about the final meter. difference: |delta| / |eps|, how much the teacher itself
    sees between the ends. enough: share and cosine below which a slider of this kind is no good.
    unknown_words: words of the prompts that the model never saw."""
    share, cosine, loss = reading["share"], reading["cosine"], reading.get("loss", 1.0)
    lines = [
        f"The slider makes {share:.0%} of the teacher's change on unseen x_t (cosine {cosine:.2f}; "
        f"positive end {reading['plus']:.0%}, negative end {reading['minus']:.0%})."
    ]
    if difference < 0.02:
        lines.append(
            f"WARNING: the model itself hardly tells the two ends apart ({difference:.1%} of its "
            "prediction): a clearer difference between them, or a higher --eta, may help."
        )
    if share < enough[0] and loss < 0.8:
        lines.append(
            f"WARNING: it learned by heart what it was trained on (loss {loss:.2f}) and little "
            "else: give it more to learn from, such as more pairs."
        )
    elif share < enough[0]:
        lines.append("WARNING: it learned next to nothing. Try more --steps, or a higher --lr.")
    elif cosine < enough[1]:
        lines.append(
            "WARNING: most of what it does is something else. "
            "Try a lower --lr, more x_t, or a higher --rank."
        )
    if unknown_words:
        lines.append(
            f"WARNING: the model never saw the words {', '.join(sorted(unknown_words))}: "
            "the slider does what it makes of them, whatever that is."
        )
    if len(lines) > 1:
        return lines
    if share < 2 * enough[0]:
        return lines + [
            "It works in part: turned further, beyond scale 1, it comes nearer to what the frozen "
            "model changes between the two ends. Look at pictures."
        ]
    return lines + [
        "It works: it changes what the frozen model itself changes between the two ends. "
        "Whether that is what you meant, pictures say."
    ]
