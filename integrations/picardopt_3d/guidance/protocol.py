"""The interfaces of guidance.

A `ScoreModel` predicts the noise in noisy views, in a space of its own. A `Guidance` turns a score model into a loss on
rendered views. Published diffusion models, the shipped ones and the closed-form score of known views are all score
models, so that they can be exchanged freely.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from picardopt_3d.cameras import Cameras
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.resizing import resize


class Conditions(NamedTuple):
    """The encoded texts of each view.

    Attributes:
        conditional: Encoding of the prompt, `[batch, tokens, channels]`.
        unconditional: Encoding of the negative prompt, `[batch, tokens, channels]`.
        negatives: Encodings of the texts that Perp-Neg pushes away from, `[negatives, batch, tokens, channels]`; empty
            without Perp-Neg.
        weights: Weights of the negatives (0 or less), `[negatives, batch]`.
    """

    conditional: Tensor
    unconditional: Tensor
    negatives: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class EncodedText:
    """A text prompt as a score model has encoded it.

    Attributes:
        prompt: The prompt.
        conditional: Encoding of `prompt.texts()`, one row per text (`[texts, tokens, channels]` for a diffusion
            model).
        unconditional: Encoding of `prompt.negative`, one row.
    """

    prompt: TextPrompt
    conditional: Tensor
    unconditional: Tensor

    def at(self, cameras: Cameras) -> Conditions:
        """Returns the encoded texts for the views of some cameras."""
        rows, device = self.conditional, self.conditional.device
        first, second, ratio, negatives, weights = (
            part.to(device) for part in self.prompt.mix(cameras)
        )
        ratio = ratio.to(rows).reshape(-1, *[1] * (rows.ndim - 1))
        conditional = ratio * rows[first] + (1 - ratio) * rows[second]
        unconditional = self.unconditional.expand_as(conditional)
        return Conditions(conditional, unconditional, rows[negatives], weights)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image prompt as a score model has encoded it.

    Attributes:
        prompt: The prompt.
        embedding: Embedding of the whole image, `[1, channels]`.
        latent: The image in the model's latent space, `[1, channels, height, width]`.
    """

    prompt: ImagePrompt
    embedding: Tensor
    latent: Tensor


Encoded = EncodedText | EncodedImage


class Prediction(NamedTuple):
    """Predicted noise in the model's space, each `[batch, channels, height, width]`.

    Attributes:
        conditional: Prediction with the prompt.
        unconditional: Prediction with the negative prompt, or without a prompt.
        negatives: Predictions with the texts that Perp-Neg pushes away from, `[negatives, batch, ...]`; None without
            Perp-Neg.
        weights: Weights of the negatives (0 or less), `[negatives, batch]`.
    """

    conditional: Tensor
    unconditional: Tensor
    negatives: Tensor | None = None
    weights: Tensor | None = None


@runtime_checkable
class ScoreModel(Protocol):
    """Predicts the noise in views, in a space of its own: pixels in [-1, 1], or a latent space.

    Attributes:
        size: Pixels along a side of the views that the model works on (others are resized).
        alphas_cumprod: The noise schedule's abar, `[timesteps]`.
    """

    size: int
    alphas_cumprod: Tensor

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> Encoded:
        """Encodes a prompt; each text is encoded only once.

        Args:
            prompt: The prompt; a plain text stands for `TextPrompt(text)`.

        Raises:
            TypeError: The model does not take this kind of prompt.
        """
        ...

    def to_model_space(self, views: Tensor) -> Tensor:
        """Converts views to the model's space; gradients flow back through the conversion.

        Random numbers (the noise of a latent) come from torch's global CPU generator.

        Args:
            views: RGB in [0, 1], `[batch, 3, height, width]`.

        Returns:
            The views in the model's space, float32 whatever the model's precision, `[batch, channels, ...]`.
        """
        ...

    def to_views(self, clean: Tensor) -> Tensor:
        """Converts the model's space back to views, the inverse of `to_model_space` but for size and noise.

        Args:
            clean: Views in the model's space, `[batch, channels, ...]`.

        Returns:
            RGB clamped to [0, 1], float32, without a gradient, `[batch, 3, size, size]`.
        """
        ...

    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        """Predicts the noise in `sqrt(abar) clean + sqrt(1 - abar) noise`, without a gradient.

        Args:
            noisy: Noisy views in the model's space, `[batch, channels, ...]`.
            timesteps: Integer noise levels, `[batch]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
        """
        ...


class Guidance(ABC):
    """A loss on rendered views whose gradient pulls them towards a prompt.

    Attributes:
        size: Pixels along a side of the views that the model works on (others are resized).
        repeatable: Whether the loss is a function of views, prompt, cameras, randomness and the parameters of the
            guidance's optimizers; otherwise no run with it is exact, and its steps cannot be checked by evaluating them
            again.
    """

    size: int
    repeatable: bool = True

    @abstractmethod
    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> Encoded:
        """Encodes a prompt; each text is encoded only once."""

    @abstractmethod
    def __call__(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        """Evaluates the loss.

        Random numbers come only from torch's global CPU generator: the loss is a function of the step's randomness.

        Args:
            views: Rendered RGB in [0, 1], with a gradient, `[batch, 3, height, width]`.
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level, as fractions of the schedule (`TimestepSchedule`).

        Returns:
            A scalar to call `backward` on. No gradient flows through the score model.
        """

    def optimizers(self) -> list[Optimizer]:
        """Returns the guidance's own optimizers; each step steps them after the scene's."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Returns what the guidance has learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            RuntimeError: The state belongs to another guidance.
        """
        if state:
            raise RuntimeError(
                f"a {type(self).__name__} learns nothing, but the state holds {', '.join(state)}: give the state of "
                f"the same guidance"
            )


def as_text_prompt(prompt: str | TextPrompt | ImagePrompt) -> TextPrompt:
    """Returns a prompt as a `TextPrompt`, for a model that takes texts.

    Raises:
        TypeError: The prompt is not a text.
    """
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if not isinstance(prompt, TextPrompt):
        raise TypeError(
            f"prompt of type {type(prompt).__name__}: this model takes a text (str or TextPrompt); images are for "
            f"Zero123"
        )
    return prompt


def as_encoded_text(prompt: Encoded) -> EncodedText:
    """Checks that a prompt was encoded by a model that takes texts, and returns it.

    Raises:
        TypeError: Another kind of model encoded it.
    """
    if not isinstance(prompt, EncodedText):
        raise TypeError(
            f"prompt of type {type(prompt).__name__}: give what this model's own `encode` returned"
        )
    return prompt


def pixels_to_model_space(views: Tensor, size: int) -> Tensor:
    """Returns views as pixels in [-1, 1], resized; gradients flow back.

    Args:
        views: RGB in [0, 1], `[batch, 3, height, width]`.
        size: Pixels along a side.

    Returns:
        The pixels, float32, `[batch, 3, size, size]`.
    """
    clean = 2 * views.float() - 1
    if views.shape[-2:] != (size, size):
        clean = resize(clean, size)
    return clean


@torch.no_grad()
def model_space_to_pixels(pixels: Tensor) -> Tensor:
    """Returns pixels in [-1, 1] as RGB clamped to [0, 1], float32, without a gradient; shapes stay."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
