"""What a model says of its noise schedule, and of what its UNet predicts."""

import warnings

PREDICTIONS = {"epsilon": "epsilon", "v": "v", "v_prediction": "v"}  # config's word: ours
SPACINGS = ("leading", "trailing", "linspace")


def check(config: dict, prediction: str | None = None) -> dict:
    """A scheduler_config.json, or what a single file's marks stand for, as the sampler takes it,
    with "prediction_type" (epsilon or v) and "timestep_spacing" (one of SPACINGS) filled in.

    prediction: epsilon or v, in the place of what the config says; a warning where a v-model is to
    be read as one of noise. ValueError, one line, for a schedule or a prediction that is not
    known."""
    if (kind := config.get("beta_schedule")) != "scaled_linear":
        raise ValueError(f"scheduler: beta_schedule {kind!r} is not SDXL's 'scaled_linear'")
    numbers = {name: config.get(name) for name in ("num_train_timesteps", "beta_start", "beta_end")}
    whole = isinstance(numbers["num_train_timesteps"], int)
    if not whole or not all(isinstance(n, int | float) and n > 0 for n in numbers.values()):
        raise ValueError(f"scheduler: missing or odd numbers ({numbers})")
    said = config.get("prediction_type", "epsilon")
    ours = PREDICTIONS.get(str(said))
    if prediction is None and ours is None:
        remedy = "--prediction v or --prediction epsilon says what the UNet predicts, if you know"
        raise ValueError(f"scheduler: prediction_type {said!r} is not supported; {remedy}")
    if prediction not in (None, "epsilon", "v"):
        raise ValueError(f"prediction: {prediction!r} is neither 'epsilon' nor 'v'")
    if prediction == "epsilon" and ours == "v":
        warnings.warn(
            "--prediction epsilon: this model says that it predicts v, and would draw noise: "
            "leave the option out, unless you know better",
            stacklevel=3,
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        kinds = ", ".join(SPACINGS)
        raise ValueError(f"scheduler: timestep_spacing {spacing!r} is none of {kinds}")
    return config | {"prediction_type": prediction or ours, "timestep_spacing": spacing}


def of_single_file(names, metadata: dict[str, str]) -> dict:
    """What a single file says of its schedule, in a scheduler config's words; {} if nothing.

    names: of its tensors. `v_pred` and `ztsnr` are marks, without content. A model with zero
    terminal SNR is to be sampled from pure noise on, which trailing spacing does and leading does
    not (Lin et al. 2023, section 3.3)."""
    config: dict = {}
    if said := metadata.get("modelspec.prediction_type"):
        config["prediction_type"] = said.lower()
    if "v_pred" in names:
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config
