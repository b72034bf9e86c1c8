"""The whole model against diffusers' SDXL pipeline opened on the same folder."""

import pytest
import torch
from test_networks import relative_error

import sampler

PROMPTS = ["a photo of an old man with glasses, smiling", "a hand", "Ünïcode 日本 🙂"]


@pytest.mark.filterwarnings("ignore:this model never saw")
def test_prompt_encoding(model, pipeline):
    context, pooled = model.encode_prompt(PROMPTS + [""])
    options = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    theirs, zeros, theirs_pooled, zeros_pooled = pipeline.encode_prompt(PROMPTS, **options)
    assert relative_error(context[:3], theirs) < 1e-4
    assert relative_error(pooled[:3], theirs_pooled) < 1e-4
    assert torch.equal(context[3], zeros[0]) and torch.equal(pooled[3], zeros_pooled[0])
    assert not context[3].any()


def test_unet_and_vae(model, pipeline, inputs):
    x, t, context, pooled, time_ids = inputs
    added, factor = dict(text_embeds=pooled, time_ids=time_ids), pipeline.vae.config.scaling_factor
    with torch.no_grad():
        theirs = pipeline.unet(x, t, context, added_cond_kwargs=added).sample
        assert relative_error(model.unet(*inputs), theirs) < 1e-4
        picture = model.vae.decode(x)
        assert relative_error(picture, pipeline.vae.decode(x / factor).sample) < 1e-4
        latents = pipeline.vae.encode(picture).latent_dist.mean * factor
        assert relative_error(model.vae.encode(picture), latents) < 1e-4


@pytest.mark.slow
def test_a_whole_30_step_picture(model, pipeline):
    x_T = sampler.noise([7, 8], (4, 16, 16))
    prompts = model.condition(PROMPTS[:2]), model.condition(["", ""])
    settings = dict(alpha_bar=model.alpha_bar, steps=30, guidance=5.0)
    ours = sampler.sample(model.unet, x_T, *prompts, **settings)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    settings = dict(num_inference_steps=30, guidance_scale=5.0, height=128, width=128)
    theirs = pipeline(prompt=PROMPTS[:2], latents=x_T, output_type="latent", **settings).images
    assert relative_error(ours, theirs) < 1e-3
