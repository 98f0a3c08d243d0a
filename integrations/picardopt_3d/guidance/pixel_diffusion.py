"""A diffusion model in pixel space as a score model, the one that ships with the package among them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picardopt_3d.cameras import CONDITION_SIZE, Cameras
from picardopt_3d.guidance.diffusion import TextDiffusion
from picardopt_3d.guidance.protocol import EncodedText, as_text_prompt, pixels_to_model_space
from picardopt_3d.guidance.text_to_view import TextToViewPipeline
from picardopt_3d.prompts import ImagePrompt, TextPrompt

SHIPPED = Path(__file__).parent.parent / "weights" / "text-to-view"
"""Folder of the model that ships with the package."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class PixelDiffusion(TextDiffusion):
    """The score of a pixel-space text-to-view diffusion pipeline; a `ScoreModel`.

    The camera is given to the model with and without the prompt, so that classifier-free guidance strengthens the
    prompt and not the camera.

    Args:
        pipeline: The loaded pipeline; its weights are frozen.
    """

    def __init__(self, pipeline: TextToViewPipeline) -> None:
        self._takes_camera = _check_unet(pipeline.unet)
        super().__init__(pipeline.unet, pipeline.scheduler, pipeline.unet.config.sample_size)
        self.unet.to(memory_format=torch.channels_last)
        self.pipeline = pipeline
        pipeline.text_encoder.requires_grad_(False).eval()
        self._embeddings: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls, source: str | Path = SHIPPED, device: torch.device | str = "cpu"
    ) -> PixelDiffusion:
        """Load a pipeline folder or a model of the Hugging Face hub.

        Args:
            source: A folder in diffusers' layout, or a hub id "owner/name"; by default the shipped model.
            device: Where the model runs.

        Raises:
            FileNotFoundError: There is no such folder, or the hub has no such model or cannot be reached.
            ValueError: The folder holds another kind of pipeline.
        """
        folder = Path(source)
        if folder.is_dir():
            _check_index(folder)
        elif not _HUB_ID.fullmatch(str(source)):
            raise FileNotFoundError(
                f"source={str(source)!r}: there is no such folder; give a folder that holds a model_index.json (the "
                f"shipped model's is {SHIPPED}) or a hub id such as 'owner/name'"
            )
        try:
            pipeline = TextToViewPipeline.from_pretrained(
                source, dtype=torch.float32, low_cpu_mem_usage=False
            )
        except OSError as error:
            raise FileNotFoundError(
                f"source={str(source)!r} could not be loaded: {error}. Give a complete pipeline folder "
                f"(model_index.json, unet/, text_encoder/, tokenizer/, scheduler/), or reach the hub first"
            ) from error
        return cls(pipeline.to(device))

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedText:
        """Encode a prompt; each text is encoded once."""
        asked = as_text_prompt(prompt)
        conditional = torch.cat([self._embed(text) for text in asked.texts()])
        return EncodedText(asked, conditional, self._embed(asked.negative))

    def _embed(self, text: str) -> Tensor:
        if text not in self._embeddings:
            with torch.no_grad():
                self._embeddings[text] = self.pipeline.encode([text])
        return self._embeddings[text]

    def to_model_space(self, views: Tensor) -> Tensor:
        """Pixels in [-1, 1], resized. [batch, 3, size, size]."""
        return pixels_to_model_space(views, self.size)

    def class_labels(self, cameras: Cameras) -> Tensor | None:
        """What a model that takes cameras is told of them. [batch, CONDITION_SIZE]."""
        return cameras.condition() if self._takes_camera else None


def _check_index(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(
            f"source={str(folder)!r} has no model_index.json: give the pipeline's own folder, not one of its parts"
        )
    name = json.loads(index.read_text()).get("_class_name")
    if name != TextToViewPipeline.__name__:
        raise ValueError(
            f"source={str(folder)!r} holds a {name}: give a {TextToViewPipeline.__name__} folder, as "
            f"`python -m picardopt_3d.training.text_to_view` writes it"
        )


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
