"""SDXL put together: load a model, prompts to conditioning, pictures to latents and back.

    model = SDXL.load("miniature/model")
    cond = model.condition(["a photo of an old man"], size=(128, 128))  # for unet(x_t, t, *cond)
    picture = model.decode(latents)[0]                                  # a PIL image

A model folder is SDXL's released form: model_index.json, unet/, vae/, text_encoder/,
text_encoder_2/, tokenizer/, tokenizer_2/, scheduler/, each with its config. Every size comes from
those configs, so the bundled miniature and the real SDXL run through the same lines."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sampler
from formats import schedule, weights
from sdxl_unet import UNet
from sdxl_vae import VAE

MINIATURE = Path(__file__).parent / "miniature" / "model"


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class SDXL:
    """The UNet, the VAE, two text encoders with their tokenizers, and the noise schedule."""

    unet: UNet
    vae: VAE  # None once released, and with vae=False
    text_encoders: list  # of transformers' CLIP text models; None once released
    tokenizers: list
    alpha_bar: torch.Tensor  # (T,)
    spacing: str  # of noise levels, as in sampler.timesteps
    prediction: str  # of the network itself: "epsilon", or "v", which becomes eps on its way out
    device: torch.device
    dtype: torch.dtype  # of UNet and text encoders
    size: int  # pixels, the side of the pictures it was trained on
    factor: int  # pixels to a latent, in height and in width
    zeros_for_empty: bool  # an empty prompt's conditioning is all zeros
    folder: Path | None  # of the model; None for a single file
    known_words: set[str] | None  # that the model was trained on, where its folder lists them
    unknown_words: set[str]  # others that prompts have held so far
    _too_long: set[str]  # prompts that a warning was given for

    @classmethod
    def load(
        cls,
        path_or_id=MINIATURE,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        base=None,
        vae: bool = True,
        text_on_cpu: bool = False,
        prediction: str | None = None,
    ) -> "SDXL":
        """Load a model folder, one .safetensors file, or a Hub id ("owner/name", downloaded once).

        device: "cpu", "cuda", "mps"; None: the best there is. dtype: of UNet and text encoders;
        None: float32 on a CPU, bfloat16 elsewhere. The VAE stays in float32 where its config says
        `force_upcast`, as SDXL's does: it overflows in half precision. base: a folder or Hub id for
        what a single file lacks, such as tokenizers. vae=False leaves the VAE out. text_on_cpu
        keeps the text encoders off the device: SDXL's take 1.5 GiB there. prediction: "epsilon" or
        "v", where the model says it wrong. ValueError for what is missing, damaged or no SDXL."""
        # Imported here, as it takes seconds, and a wrong option should not have to wait for it.
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
        from transformers.utils import logging

        logging.disable_progress_bar()
        self = cls()
        self.device = torch.device(device or best_device())
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(self.device.type, True):
            raise ValueError(f"device: there is no {device} here, or this PyTorch cannot use it")
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        files = weights.find_weights(path_or_id, base, half=self.dtype != torch.float32)
        configs = files.configs
        self.zeros_for_empty = configs["model_index"].get("force_zeros_for_empty_prompt", True)
        scheduler = schedule.check(configs["scheduler"], prediction)
        self.prediction, self.spacing = scheduler["prediction_type"], scheduler["timestep_spacing"]
        self.alpha_bar = sampler.make_alpha_bar(scheduler)
        self.tokenizers = weights.load_tokenizers(path_or_id, files)

        def load(load_part, kind, part, device=self.device, dtype=self.dtype):
            return load_part(kind, configs[part], files.tensors(part), device, dtype, part)

        text_device = torch.device("cpu" if text_on_cpu else self.device)
        load_text = lambda kind, part: load(weights.load_text_encoder, kind, part, text_device)
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        self.text_encoders = [load_text(kind, part) for part, kind in kinds.items()]
        vae_dtype = torch.float32 if configs["vae"].get("force_upcast", True) else self.dtype
        self.vae = None  # type: ignore[assignment]
        if vae:
            self.vae = load(weights.load_module, VAE, "vae", dtype=vae_dtype)
        self.unet = load(weights.load_module, UNet, "unet")
        if self.prediction == "v":
            sampler.convert_v_to_eps(self.unet, self.alpha_bar.to(self.device))
        self.factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        self.folder = files.folder
        self.size = self.unet.config["sample_size"] * self.factor
        self.known_words, self.unknown_words, self._too_long = files.known_words(), set(), set()
        return self

    # ------------------------------------------------------------------------ words to conditioning

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """prompts -> context (B, 77, d1 + d2), pooled (B, p). Podell et al. 2023, section 2.1: the
        penultimate hidden states of both text encoders side by side, and the second one's pooled
        text embedding. An empty prompt is all zeros where model_index.json says so."""
        self._warn_of_unknown_words(prompts)
        self._warn_of_long_prompts(prompts)
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders):
            padding = dict(padding="max_length", max_length=tokenizer.model_max_length)
            ids = tokenizer(prompts, truncation=True, return_tensors="pt", **padding).input_ids
            out = encoder(ids.to(encoder.device), output_hidden_states=True)  # ids: (B, 77)
            hidden.append(out.hidden_states[-2])  # (B, 77, d): no last layer, no final layer norm
        context = torch.cat(hidden, -1).to(self.device)  # (B, 77, d1 + d2)
        pooled = out.text_embeds.to(self.device)  # (B, p)
        if self.zeros_for_empty:
            keep = torch.tensor([bool(p) for p in prompts], device=self.device)
            context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        return context, pooled

    def condition(self, prompts: list[str], size: tuple[int, int] | None = None):
        """prompts -> (context (B, 77, d), pooled (B, p), time_ids (B, 6)), for unet(x_t, t, *cond).

        size: (height, width) in pixels; None is the model's own. SDXL is also told the picture's
        original size, crop and target size (Podell et al. 2023, section 2.2): here an uncropped
        picture of just this size."""
        h, w = size or (self.size, self.size)
        time_ids = torch.tensor([[h, w, 0, 0, h, w]], dtype=self.dtype, device=self.device)
        return *self.encode_prompt(prompts), time_ids.expand(len(prompts), 6)

    def _warn_of_unknown_words(self, prompts):
        """Once for each word that the model never saw, where its folder lists those it did."""
        if self.known_words is None:
            return
        words = {word for prompt in prompts for word in split_words(prompt)}
        if new := sorted(words - self.known_words - self.unknown_words):
            self.unknown_words |= set(new)
            words = f"the word{'s' * (len(new) > 1)} {', '.join(map(repr, new))}"
            warnings.warn(f"this model never saw {words}: it can only guess", stacklevel=2)

    def _warn_of_long_prompts(self, prompts):
        """Once for each prompt of over 77 tokens. What is beyond, as --preserve's, is not seen."""
        tokenizer = self.tokenizers[0]
        most = tokenizer.model_max_length
        for prompt in set(prompts) - self._too_long:
            ids = tokenizer(prompt, verbose=False).input_ids  # with a start and an end
            if len(ids) > most:
                self._too_long.add(prompt)
                lost = f"the model does not see its end, {tokenizer.decode(ids[most - 1 : -1])!r}"
                too_long = f"a prompt is too long by {len(ids) - most} tokens"
                warnings.warn(f"{too_long}: {lost}", stacklevel=2)

    # ------------------------------------------------------------------------- latents and pictures

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(4, h, w) for `size` (height, width). ValueError for one that the model cannot make."""
        (h, w), multiple = size or (self.size, self.size), self.factor * self.unet.factor
        if h < multiple or w < multiple or h % multiple or w % multiple:
            near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (w, h))
            raise ValueError(f"size: {w}x{h} is not made of multiples of {multiple}: {near} is")
        return self.unet.config["in_channels"], h // self.factor, w // self.factor

    @torch.no_grad()
    def decode(self, latents) -> list[Image.Image]:
        """latents (B, 4, h, w) -> B RGB pictures."""
        x = self.vae.decode(latents.to(next(self.vae.parameters()).dtype))  # (B, 3, H, W)
        x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
        return [Image.fromarray(array) for array in x.numpy()]

    @torch.no_grad()
    def encode(self, pictures: list[Image.Image]) -> torch.Tensor:
        """RGB pictures of one size -> latents (B, 4, h, w)."""
        x = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures]))
        weight = next(self.vae.parameters())
        x = x.permute(0, 3, 1, 2).to(weight.device).float() / 127.5 - 1  # (B, 3, H, W) in [-1, 1]
        return self.vae.encode(x.to(weight.dtype)).to(self.dtype)

    def release(self, vae: bool = True):
        """Free the text encoders' memory, and the VAE's: training on latents needs neither."""
        self.text_encoders = None  # type: ignore[assignment]
        if vae:
            self.vae = None  # type: ignore[assignment]


def split_words(text: str) -> list[str]:
    """'An old man, smiling' -> ['an', 'old', 'man', 'smiling']"""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
