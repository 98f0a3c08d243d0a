"""A UNet of diffusers that hears a text, as a score model: what the pixel and latent ones have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.embeddings import TextEmbeddings
from picardopt_3d.guidance.loading import ModelOptions, memory_explained, place
from picardopt_3d.guidance.protocol import (
    Encoded,
    EncodedText,
    Prediction,
    as_encoded_text,
    as_text_prompt,
    pixels_to_model_space,
)
from picardopt_3d.prompts import ImagePrompt, TextPrompt


class TextDiffusion:
    """A `ScoreModel` in pixel space; a latent one overrides `to_model_space`.

    Args:
        unet: A `UNet2DConditionModel`; its weights are frozen.
        scheduler: Its noise schedule, and what it predicts.
        texts: Embeds texts.
        size: Pixels along a side that views are best rendered at.
        device: Where the model computes.
        options: How it is run.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        texts: TextEmbeddings,
        size: int,
        device: torch.device | str = "cpu",
        options: ModelOptions | None = None,
    ) -> None:
        self.device, self.options, self.size = torch.device(device), options or ModelOptions(), size
        self.unet = unet.requires_grad_(False).eval()
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.float()
        self.prediction_type: str = scheduler.config.prediction_type
        self._texts = texts
        self._release = place(self.unet, self.device, self.options)

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedText:
        """Encodes a prompt; only texts that were never encoded need the text encoder.

        Returns:
            Its embeddings, and the prompt itself: shortened, with a warning, if it is longer than the encoder reads.
        """
        asked = self._texts.context.shorten(as_text_prompt(prompt))
        with memory_explained(self.options):
            embeddings = self._texts([*asked.texts(), asked.negative])
        return EncodedText(asked, embeddings[:-1], embeddings[-1:])

    def to_model_space(self, views: Tensor) -> Tensor:
        """Pixels in [-1, 1], resized. [batch, 3, size, size]."""
        return pixels_to_model_space(views, self.size)

    @torch.no_grad()
    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        """All predictions in one pass of two times the batch (with Perp-Neg four times).

        Args:
            noisy: In the model's space. [batch, channels, height, width]
            timesteps: Integers. [batch]
            prompt: From `encode`.
            cameras: Where each view was taken from.
        """
        told = as_encoded_text(prompt).at(cameras)
        texts = torch.cat([told.conditional, told.unconditional, *told.negatives])
        copies = 2 + len(told.negatives)
        labels = self.class_labels(cameras)
        noise = self.noise(
            noisy.repeat(copies, 1, 1, 1),
            timesteps.repeat(copies),
            texts,
            None if labels is None else labels.repeat(copies, 1),
        )
        noise = noise.contiguous().unflatten(0, (copies, len(noisy)))
        if copies == 2:
            return Prediction(noise[0], noise[1])
        return Prediction(noise[0], noise[1], noise[2:], told.weights)

    def noise(
        self, noisy: Tensor, timesteps: Tensor, texts: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """One pass of the UNet, in its own precision; gradients flow if they are asked for (not with `offload`).

        Args:
            noisy: In the model's space. [batch, channels, height, width]
            timesteps: Integers. [batch]
            texts: What each is told. [batch, tokens, channels]
            labels: Class labels, for a UNet that takes them. [batch, numbers]

        Returns:
            The predicted noise, float32. [batch, channels, height, width]
        """
        dtype = self.unet.dtype
        given = noisy.to(dtype)
        if self.options.channels_last:
            given = given.contiguous(memory_format=torch.channels_last)
        with memory_explained(self.options):
            predicted = self.unet(
                given,
                timesteps,
                encoder_hidden_states=texts.to(given),
                class_labels=None if labels is None else labels.to(given),
            ).sample
        self._release()
        # A learned variance (DeepFloyd) comes behind the prediction.
        predicted = predicted[:, : noisy.shape[1]].float()
        abar = self.alphas_cumprod.to(noisy)[timesteps][:, None, None, None]
        return as_noise(predicted, noisy, abar, self.prediction_type)

    def class_labels(self, cameras: Cameras) -> Tensor | None:
        """Returns what the UNet takes besides the text. None by default; subclasses override it. [batch, numbers]."""
        return None


def as_noise(predicted: Tensor, noisy: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """The noise that a prediction implies, whichever quantity the model predicts.

    Args:
        predicted: What the model gave. [batch, ...]
        noisy: What it was given. [batch, ...]
        abar: The schedule's, to be multiplied with them. [batch, 1, 1, 1]
        prediction_type: Of the scheduler's configuration.

    Raises:
        ValueError: The quantity is unknown.
    """
    if prediction_type == "epsilon":
        return predicted
    if prediction_type == "v_prediction":
        return abar.sqrt() * predicted + (1 - abar).sqrt() * noisy
    if prediction_type == "sample":
        return (noisy - abar.sqrt() * predicted) / (1 - abar).sqrt()
    raise ValueError(
        f"prediction_type={prediction_type!r}: give a model that predicts epsilon, v_prediction or sample"
    )
