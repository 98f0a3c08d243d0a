"""A text-conditioned UNet of diffusers as a score model: the common part of pixel and latent models."""

from __future__ import annotations

from collections.abc import Callable
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
    model_space_to_pixels,
    pixels_to_model_space,
)
from picardopt_3d.prompts import ImagePrompt, TextPrompt


class TextDiffusion:
    """A `JoinableScore` in pixel space; a latent one has another `space`, `draw`, `to_model_space` and `to_views`.

    Args:
        unet: A `UNet2DConditionModel`; its weights are frozen.
        scheduler: Its noise schedule and kind of prediction.
        texts: Embeds texts.
        size: Pixels along a side of the views that the model works on.
        device: Device of the model.
        options: How the model is run.
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
        self.space: tuple[int, int, int] = (3, size, size)
        self.joined_views = self.options.joined_views
        self.unet = unet.requires_grad_(False).eval()
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.float()
        self.prediction_type: str = scheduler.config.prediction_type
        self._texts = texts
        self._release = place(self.unet, self.device, self.options)

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> EncodedText:
        """Encodes a prompt; the text encoder is loaded only for texts without a stored embedding.

        Returns:
            The embeddings and the prompt, which is shortened, with a warning, if it exceeds the encoder's length.
        """
        asked = self._texts.context.shorten(as_text_prompt(prompt))
        with memory_explained(self.options):
            embeddings = self._texts([*asked.texts(), asked.negative])
        return EncodedText(asked, embeddings[:-1], embeddings[-1:])

    def draw(self, batch: int) -> Tensor | None:
        """Returns None: pixels need no random numbers."""
        return None

    def to_model_space(self, views: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Returns the views as pixels in [-1, 1], resized, `[batch, 3, size, size]`."""
        return pixels_to_model_space(views, self.size)

    def to_views(self, clean: Tensor) -> Tensor:
        """Returns pixels in [-1, 1] as RGB clamped to [0, 1], `[batch, 3, size, size]`."""
        return model_space_to_pixels(clean)

    @torch.no_grad()
    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        """Predicts the noise for all texts in one pass of twice the batch (with Perp-Neg, four times).

        Args:
            noisy: Noisy views in the model's space, `[batch, channels, height, width]`.
            timesteps: Integer noise levels, `[batch]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
        """
        conditions = as_encoded_text(prompt).at(cameras)
        texts = torch.cat([conditions.conditional, conditions.unconditional, *conditions.negatives])
        copies = 2 + len(conditions.negatives)
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
        return Prediction(noise[0], noise[1], noise[2:], conditions.weights)

    def noise(
        self, noisy: Tensor, timesteps: Tensor, texts: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Predicts the noise in one pass of the UNet, in its own precision.

        Gradients flow unless they are disabled or the UNet is offloaded.

        Args:
            noisy: Noisy views in the model's space, `[batch, channels, height, width]`.
            timesteps: Integer noise levels, `[batch]`.
            texts: Embedded text of each view, `[batch, tokens, channels]`.
            labels: Class labels, for a UNet that takes them, `[batch, numbers]`.

        Returns:
            The predicted noise, float32, `[batch, channels, height, width]`.
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
        # A learned variance (DeepFloyd) follows the prediction.
        predicted = predicted[:, : noisy.shape[1]].float()
        abar = self.alphas_cumprod.to(noisy)[timesteps][:, None, None, None]
        return as_noise(predicted, noisy, abar, self.prediction_type)

    def class_labels(self, cameras: Cameras) -> Tensor | None:
        """Returns the UNet's class labels, `[batch, numbers]`; None by default, for subclasses to override."""
        return None


def as_noise(predicted: Tensor, noisy: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """Converts a prediction to the noise that it implies.

    Args:
        predicted: Output of the model, `[batch, ...]`.
        noisy: Input of the model, `[batch, ...]`.
        abar: The schedule's abar of each view, `[batch, 1, 1, 1]`.
        prediction_type: `prediction_type` of the scheduler's configuration.

    Raises:
        ValueError: The type is unknown.
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


ERROR_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": torch.ones_like,
    "v_prediction": lambda abar: 1 / abar,
    "sample": lambda abar: (1 - abar) / abar,
}
"""Factor from the squared error of the noise to that of the predicted quantity, as a function of abar."""
