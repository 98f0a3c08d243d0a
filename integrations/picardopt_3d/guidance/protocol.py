"""What a guidance is: the interfaces that pipelines are written against.

A `ScoreModel` predicts the noise in noisy views, in a space of its own. A `Guidance` turns one into a loss on rendered
views. Published diffusion models, the shipped ones and the closed-form score of known views are all score models, so a
pipeline swaps them freely.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from picardopt_3d.cameras import Cameras
from picardopt_3d.prompts import ImagePrompt, TextPrompt


class Conditions(NamedTuple):
    """What a text model is told of each view, as it has encoded it.

    Attributes:
        conditional: Of the prompt. [batch, tokens, channels]
        unconditional: Of the negative prompt. [batch, tokens, channels]
        negatives: Of what Perp-Neg pushes away from; none without it. [negatives, batch, tokens, channels]
        weights: How hard (0 or less). [negatives, batch]
    """

    conditional: Tensor
    unconditional: Tensor
    negatives: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class EncodedText:
    """A text prompt as a score model has encoded it.

    Attributes:
        prompt: What was encoded.
        conditional: Whatever the model made of `prompt.texts()`, a row each (for a diffusion model
            [texts, tokens, channels]).
        unconditional: The same of `prompt.negative`, one row.
    """

    prompt: TextPrompt
    conditional: Tensor
    unconditional: Tensor

    def at(self, cameras: Cameras) -> Conditions:
        """What the model is told of the views of some cameras."""
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
        prompt: What was encoded.
        embedding: Of the whole image. [1, channels]
        latent: The image in the model's latent space. [1, channels, height, width]
    """

    prompt: ImagePrompt
    embedding: Tensor
    latent: Tensor


Encoded = EncodedText | EncodedImage


class Prediction(NamedTuple):
    """Predicted noise, each [batch, channels, height, width] in the model's space.

    Attributes:
        conditional: With the prompt.
        unconditional: With the negative prompt, or without any.
        negatives: With each text that Perp-Neg pushes away from; None without it. [negatives, batch, ...]
        weights: How hard (0 or less). [negatives, batch]
    """

    conditional: Tensor
    unconditional: Tensor
    negatives: Tensor | None = None
    weights: Tensor | None = None


@runtime_checkable
class ScoreModel(Protocol):
    """Predicts the noise in views, in a space of its own: pixels in [-1, 1], or a latent space.

    Attributes:
        size: Pixels along a side that views are best rendered at (others are resized).
        alphas_cumprod: The noise schedule's abar. [timesteps]
    """

    size: int
    alphas_cumprod: Tensor

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> Encoded:
        """Encode a prompt; the same texts are encoded once only.

        Args:
            prompt: What is asked for; a plain text is `TextPrompt(text)`.

        Raises:
            TypeError: The model does not take this kind of prompt.
        """
        ...

    def to_model_space(self, views: Tensor) -> Tensor:
        """Bring views into the model's space; gradients flow back through it.

        What it draws (a latent's noise) comes from torch's global CPU generator.

        Args:
            views: RGB in [0, 1]. [batch, 3, height, width]

        Returns:
            [batch, channels, ...], float32 whatever the model computes in.
        """
        ...

    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Encoded, cameras: Cameras
    ) -> Prediction:
        """Predict the noise in `sqrt(abar) clean + sqrt(1 - abar) noise`, without a gradient.

        Args:
            noisy: In the model's space. [batch, channels, ...]
            timesteps: Integers. [batch]
            prompt: From `encode`.
            cameras: Where each view was taken from.
        """
        ...


class Guidance(ABC):
    """A loss on rendered views whose gradient pulls them towards a prompt.

    Attributes:
        size: Pixels along a side that views are best rendered at (others are resized).
    """

    size: int

    @abstractmethod
    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> Encoded:
        """Encodes a prompt; the same texts are encoded once only."""

    @abstractmethod
    def __call__(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        """Evaluates the loss.

        It draws only from torch's global CPU generator, so that it is a function of the step's randomness.

        Args:
            views: Rendered RGB in [0, 1], with a gradient. [batch, 3, height, width]
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level, as fractions of the schedule (`TimestepSchedule`).

        Returns:
            A scalar to call `backward` on; its value is worth logging. No gradient goes through the score model.
        """

    def optimizers(self) -> list[Optimizer]:
        """Returns the optimizers of what the guidance itself trains; a step steps them after the scene's."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Returns what the guidance has learnt."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            RuntimeError: It is of another guidance.
        """
        if state:
            raise RuntimeError(
                f"a {type(self).__name__} learns nothing, but the state holds {', '.join(state)}"
            )


def as_text_prompt(prompt: str | TextPrompt | ImagePrompt) -> TextPrompt:
    """The prompt of a model that takes texts.

    Raises:
        TypeError: It is not a text.
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
    """The encoding that a model of texts made.

    Raises:
        TypeError: Another kind of model made it.
    """
    if not isinstance(prompt, EncodedText):
        raise TypeError(
            f"prompt of type {type(prompt).__name__}: give what this model's own `encode` returned"
        )
    return prompt


def pixels_to_model_space(views: Tensor, size: int) -> Tensor:
    """Views in [-1, 1], resized to what a model works on; gradients flow back.

    Args:
        views: RGB in [0, 1]. [batch, 3, height, width]
        size: Pixels along a side.

    Returns:
        [batch, 3, size, size], float32.
    """
    clean = 2 * views.float() - 1
    if views.shape[-2:] != (size, size):
        clean = functional.interpolate(
            clean, (size, size), mode="bilinear", align_corners=False, antialias=True
        )
    return clean
