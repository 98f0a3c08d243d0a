"""A diffusion model in pixel space as a score model, the one that ships with the package among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picardopt_3d.cameras import CONDITION_SIZE, Cameras
from picardopt_3d.guidance.diffusion import TextDiffusion
from picardopt_3d.guidance.embeddings import TextEmbeddings
from picardopt_3d.guidance.loading import ModelOptions, explained, locate
from picardopt_3d.guidance.text_context import TextContext
from picardopt_3d.guidance.text_to_view import TextToViewPipeline

SHIPPED = Path(__file__).parent.parent / "weights" / "text-to-view"
"""Folder of the model that ships with the package."""


class PixelDiffusion(TextDiffusion):
    """The score of a pixel-space text-to-view diffusion pipeline; a `ScoreModel`.

    The camera is given to the model with and without the prompt, so that classifier-free guidance strengthens the
    prompt and not the camera. The text encoder is small and stays in memory.

    Args:
        pipeline: The loaded pipeline; its weights are frozen.
        options: How it is run.
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
        """Load a pipeline folder or a model of the Hugging Face hub.

        Args:
            source: A folder in diffusers' layout, or a hub id "owner/name"; by default the shipped model.
            device: Where the model computes.
            options: How it is loaded and run.

        Raises:
            FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
            PermissionError: The model is gated.
            ValueError: It is another kind of pipeline.
        """
        options = options or ModelOptions()
        folder = locate(source, (TextToViewPipeline.__name__,), options)
        with explained(source):
            pipeline = TextToViewPipeline.from_pretrained(
                folder,
                dtype=options.torch_dtype,
                variant=options.variant,
                low_cpu_mem_usage=False,
            )
        pipeline.text_encoder.to(device)
        return cls(pipeline, options)

    def class_labels(self, cameras: Cameras) -> Tensor | None:
        """What a model that takes cameras is told of them. [batch, CONDITION_SIZE]."""
        return cameras.condition() if self._takes_camera else None


def _check_unet(unet: Any) -> bool:
    """Whether the UNet takes a camera."""
    config = unet.config
    if config.in_channels != 3 or config.out_channels != 3:
        raise ValueError(
            f"the unet has {config.in_channels} input and {config.out_channels} output channels: give a model that "
            f"works on RGB pixels (3 and 3); latent models need another score model"
        )
    if config.class_embed_type is None:
        return False
    inputs = config.projection_class_embeddings_input_dim
    if config.class_embed_type != "projection" or inputs != CONDITION_SIZE:
        raise ValueError(
            f"the unet's class embedding is {config.class_embed_type!r} of {inputs} numbers: give a model without "
            f"one, or with 'projection' of the {CONDITION_SIZE} numbers of `Cameras.condition`"
        )
    return True
