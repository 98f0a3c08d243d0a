"""Diffusion models in pixel space, such as the one that ships with the package, as score models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from picardopt_3d.cameras import CONDITION_SIZE, Cameras
from picardopt_3d.compat import CLIPTokenizer, precision
from picardopt_3d.guidance.diffusion import TextDiffusion
from picardopt_3d.guidance.embeddings import TextEmbeddings
from picardopt_3d.guidance.loading import ModelOptions, explained, load_part, locate
from picardopt_3d.guidance.text_context import TextContext
from picardopt_3d.guidance.text_to_view import TextToViewPipeline

SHIPPED = Path(__file__).parent.parent / "weights" / "text-to-view"
"""Folder of the model that ships with the package."""


class PixelDiffusion(TextDiffusion):
    """The score of a pixel-space text-to-view diffusion pipeline; a `ScoreModel`.

    The model gets the camera both with and without the prompt, so that classifier-free guidance strengthens the prompt
    and not the camera. The text encoder is small and stays in memory.

    Args:
        pipeline: The loaded pipeline; its weights are frozen.
        options: How the model is run.
    """

    def __init__(self, pipeline: TextToViewPipeline, options: ModelOptions | None = None) -> None:
        self._takes_camera = _check_unet(pipeline.unet)
        pipeline.text_encoder.requires_grad_(False).eval()
        device = pipeline.text_encoder.device
        tokenizer = pipeline.tokenizer
        context = TextContext(tokenizer, tokenizer.model_max_length)
        texts = TextEmbeddings(lambda: pipeline.encode, "", None, device, context)
        size = pipeline.unet.config.sample_size
        super().__init__(pipeline.unet, pipeline.scheduler, texts, size, device, options)
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = SHIPPED,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
    ) -> PixelDiffusion:
        """Loads a pipeline folder or a model of the Hugging Face hub.

        Args:
            source: A folder in diffusers' layout, or a hub id "owner/name"; by default the shipped model.
            device: Device of the model.
            options: How the model is loaded and run.

        Raises:
            FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
            PermissionError: The model is gated.
            ValueError: The pipeline is of another kind.
        """
        options = options or ModelOptions()
        folder = locate(source, (TextToViewPipeline.__name__,), options)
        with explained(source):
            pipeline = TextToViewPipeline.from_pretrained(
                folder,
                tokenizer=None,  # as older versions of transformers can read both
                text_encoder=None,
                **precision(DiffusionPipeline, options.torch_dtype),
                variant=options.variant,
                low_cpu_mem_usage=False,
            )
        pipeline.register_modules(
            tokenizer=load_part(CLIPTokenizer, folder, "tokenizer", options),
            text_encoder=load_part(CLIPTextModel, folder, "text_encoder", options),
        )
        pipeline.text_encoder.to(device)
        return cls(pipeline, options)

    def class_labels(self, cameras: Cameras) -> Tensor | None:
        """Returns `Cameras.condition`, `[batch, CONDITION_SIZE]`, or None if the model does not take cameras."""
        return cameras.condition() if self._takes_camera else None


def _check_unet(unet: Any) -> bool:
    """Returns whether the UNet takes a camera.

    Raises:
        ValueError: The UNet does not work on pixels, or takes other class labels.
    """
    config = unet.config
    if config.in_channels != 3 or config.out_channels != 3:
        raise ValueError(
            f"unet has {config.in_channels} input and {config.out_channels} output channels: give a model that "
            f"works on RGB pixels (3 and 3); for a latent model use StableDiffusion"
        )
    if config.class_embed_type is None:
        return False
    inputs = config.projection_class_embeddings_input_dim
    if config.class_embed_type != "projection" or inputs != CONDITION_SIZE:
        raise ValueError(
            f"unet has the class embedding {config.class_embed_type!r} of {inputs} numbers: give a model without "
            f"one, or with 'projection' of the {CONDITION_SIZE} numbers of `Cameras.condition`"
        )
    return True
