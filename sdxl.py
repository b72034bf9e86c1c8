"""SDXL put together: load a model, prompts to conditioning, pictures to latents and back.

    model = SDXL.load("miniature/model")
    cond = model.condition(["a photo of an old man"], size=(128, 128))       # what the UNet wants besides x_t and t
    picture = model.pictures(latents)[0]                                      # a PIL image

A model folder is SDXL's released form: model_index.json, unet/, vae/, text_encoder/, text_encoder_2/, tokenizer/,
tokenizer_2/, scheduler/, each with its own config. Every size comes from those configs, so the bundled miniature and
the real SDXL run through the same lines.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sampler
from formats import weights
from sdxl_unet import UNet
from sdxl_vae import VAE

MINIATURE = Path(__file__).parent / "miniature" / "model"


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class SDXL:
    """unet, vae, two text encoders with their tokenizers, and the noise schedule alpha_bar (T,)."""

    unet: UNet
    vae: VAE  # None once released, and with vae=False
    text_encoders: list  # of transformers' CLIP text models; None once released
    tokenizers: list
    alpha_bar: torch.Tensor  # (T,)
    device: torch.device
    dtype: torch.dtype  # of UNet and text encoders
    size: int  # pixels, the side of the pictures it was trained on
    factor: int  # pixels to a latent
    channels: int  # of a latent
    zeros_for_empty: bool  # whether an empty prompt is all zeros
    known_words: set[str] | None  # words the model was trained on, where its folder lists them
    guessed: set[str]  # others that prompts held so far
    cut: set[str]  # prompts so far that were too long

    @classmethod
    def load(
        cls, path_or_id=MINIATURE, device: str | None = None, dtype: torch.dtype | None = None, base=None, vae: bool = True, text_on_cpu: bool = False
    ) -> "SDXL":
        """Load a model folder, one .safetensors file, or a Hub id ("owner/name", downloaded on first use).

        device: "cpu", "cuda", "mps"; None chooses the best there is. dtype: of UNet and text encoders; None is
        float32 on a CPU, bfloat16 elsewhere. The VAE stays in float32 where its config says `force_upcast`, as
        SDXL's does: it overflows in half precision. base: the folder that lends a single file its tokenizers (formats/weights.py).
        vae=False leaves the VAE out, for training on prompts alone. text_on_cpu keeps the text encoders off the device:
        they are needed for a moment, and SDXL's take 1.5 GiB.
        Raises ValueError with one line that names what is wrong.
        """
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # only here: it takes seconds, and a
        from transformers.utils import logging  # wrong option should not wait for it

        logging.disable_progress_bar()  # loading is a matter of seconds, and the bars are many

        self = cls()
        files = weights.find(path_or_id, base)
        configs = files.configs
        self.device = torch.device(device or best_device())
        if not {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(self.device.type, True):
            raise ValueError(f"device: there is no {device} on this machine, or this PyTorch cannot use it")
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.zeros_for_empty = configs["model_index"].get("force_zeros_for_empty_prompt", True)
        self.alpha_bar = sampler.make_alpha_bar(configs["scheduler"])

        if not files.tokenizers:
            raise ValueError(f"{path_or_id}: one file holds no tokenizers: name an SDXL folder, or {weights.SDXL_ID}, with --base")
        load = lambda pour, kind, part, dtype=self.dtype, device=self.device: pour(kind, configs[part], files.where[part], device, dtype, part)
        try:
            self.tokenizers = [CLIPTokenizer.from_pretrained(folder, local_files_only=True) for folder in files.tokenizers]
        except Exception as error:  # of a damaged one the tokenizers library raises Exception itself
            raise ValueError(f"{files.tokenizers[0].parent}: the tokenizers cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
        text_device = torch.device("cpu") if text_on_cpu else self.device
        self.text_encoders = [
            load(weights.pour_text_encoder, kind, part, device=text_device)
            for kind, part in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        ]
        vae_dtype = torch.float32 if configs["vae"].get("force_upcast", True) else self.dtype
        self.vae = load(weights.pour, VAE, "vae", vae_dtype) if vae else None  # type: ignore[assignment]
        self.unet = load(weights.pour, UNet, "unet")
        self.factor, self.channels = 2 ** (len(configs["vae"]["block_out_channels"]) - 1), self.unet.config["in_channels"]
        self.size = self.unet.config["sample_size"] * self.factor
        words = files.tokenizers[0] / "known_words.txt"  # the miniature's; released SDXL folders have none
        self.known_words = set(words.read_text().split()) if words.exists() else None
        self.guessed, self.cut = set(), set()
        return self

    # -------------------------------------------------------------------------------- words to conditioning

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """prompts -> context (B, 77, d1 + d2), pooled (B, p).

        Podell et al. 2023, section 2.1: the penultimate hidden states of both text encoders side by side, and the
        second one's pooled text embedding. An empty prompt is all zeros where model_index.json says so.
        """
        self.warn_about_words(prompts)
        self.warn_about_length(prompts)
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders):
            ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids  # (B, 77)
            out = encoder(ids.to(encoder.device), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])  # (B, 77, d): before the last layer, no final layer norm
        context, pooled = torch.cat(hidden, -1).to(self.device), out.text_embeds.to(self.device)  # (B, 77, d1 + d2), (B, p)
        if self.zeros_for_empty:
            keep = torch.tensor([bool(p) for p in prompts], device=self.device)
            context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        return context, pooled

    def condition(self, prompts: list[str], size: tuple[int, int] | None = None):
        """prompts -> (context (B, 77, d), pooled (B, p), time_ids (B, 6)): unet(x_t, t, *condition).

        size: (height, width) in pixels; None is the model's own. SDXL is also told the picture's original size, crop
        and target size (Podell et al. 2023, section 2.2): here an uncropped picture of just this size.
        """
        h, w = size or (self.size, self.size)
        time_ids = torch.tensor([[h, w, 0, 0, h, w]], dtype=self.dtype, device=self.device).expand(len(prompts), 6)
        return *self.encode_prompt(prompts), time_ids

    def warn_about_words(self, prompts):
        """Warn of words that the model never saw, where the folder lists those it did."""
        if self.known_words is None:
            return
        words = {w for p in prompts for w in split_words(p)}
        unknown = sorted(words - self.known_words - self.guessed)
        if unknown:
            self.guessed |= set(unknown)  # said once for each word
            warnings.warn(
                f"this model never saw {'the word' if len(unknown) == 1 else 'the words'} {', '.join(map(repr, unknown))}: it can only guess", stacklevel=2
            )

    def warn_about_length(self, prompts):
        """Warn of prompts that do not fit into the encoders' 77 tokens: what is beyond, such as preserved concepts, is not seen."""
        tokenizer = self.tokenizers[0]
        for prompt in set(prompts) - self.cut:
            ids = tokenizer(prompt, verbose=False).input_ids  # with a start and an end
            if len(ids) > tokenizer.model_max_length:
                self.cut.add(prompt)
                lost = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])
                warnings.warn(f"a prompt is too long by {len(ids) - tokenizer.model_max_length} tokens: the model does not see its end, {lost!r}", stacklevel=2)

    # -------------------------------------------------------------------------------- latents and pictures

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(4, h, w) of a picture of `size` (height, width). Raises ValueError for a size the model cannot make."""
        h, w = size or (self.size, self.size)
        multiple = self.factor * self.unet.factor
        if h < multiple or w < multiple or h % multiple or w % multiple:
            raise ValueError(f"size: {h}x{w} is not made of multiples of {multiple}")
        return self.channels, h // self.factor, w // self.factor

    def release(self, vae: bool = True):
        """Free the memory of the text encoders, and of the VAE, which training no longer needs once all is encoded."""
        self.text_encoders = None  # type: ignore[assignment]
        if vae:
            self.vae = None  # type: ignore[assignment]

    @torch.no_grad()
    def pictures(self, latents) -> list[Image.Image]:
        """latents (B, 4, h, w) -> B RGB pictures; decoded a few at a time, large ones one by one."""
        dtype, few = next(self.vae.parameters()).dtype, max(1, 8 * 32**2 // latents[0, 0].numel())
        x = torch.cat([self.vae.decode(z.to(dtype)) for z in latents.split(few)])  # (B, 3, H, W) in [-1, 1]
        x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
        return [Image.fromarray(p) for p in x.numpy()]

    @torch.no_grad()
    def latents(self, pictures: list[Image.Image]) -> torch.Tensor:
        """RGB pictures of one size -> latents (B, 4, h, w)."""
        x = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures])).permute(0, 3, 1, 2)
        parameter = next(self.vae.parameters())
        return self.vae.encode((x.to(parameter.device).float() / 127.5 - 1).to(parameter.dtype)).to(self.dtype)


def split_words(text: str) -> list[str]:
    """'An old man, smiling' -> ['an', 'old', 'man', 'smiling']"""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
