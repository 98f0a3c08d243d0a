"""What a guidance is: the interfaces that pipelines are written against.

A `ScoreModel` predicts the noise in noisy views. A `Guidance` turns one into a loss on rendered views. The shipped
diffusion model and the closed-form score of known views are both score models, so a pipeline swaps them freely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from picardopt_3d.cameras import Cameras


@dataclass(frozen=True)
class Prompt:
    """A prompt as a score model has encoded it.

    Attributes:
        text: What was asked for.
        negative: What is pushed away from; the empty text is the unconditional one.
        conditional: Whatever the score model made of `text` (for a diffusion model [1, tokens, channels]).
        unconditional: The same of `negative`.
    """

    text: str
    negative: str
    conditional: Tensor
    unconditional: Tensor


class NoisePair(NamedTuple):
    """Predicted noise with and without the prompt, each [batch, 3, height, width]."""

    conditional: Tensor
    unconditional: Tensor


@runtime_checkable
class ScoreModel(Protocol):
    """Predicts the noise in views; views here are in [-1, 1].

    Attributes:
        size: Pixels along a side of the views it works on.
        alphas_cumprod: The noise schedule's abar. [timesteps]
    """

    size: int
    alphas_cumprod: Tensor

    def encode(self, prompt: str, negative: str = "") -> Prompt:
        """Encode a prompt; the same texts are encoded once only."""
        ...

    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, prompt: Prompt, cameras: Cameras
    ) -> NoisePair:
        """Predict the noise in `sqrt(abar) view + sqrt(1 - abar) noise`, without a gradient.

        Args:
            noisy: [batch, 3, size, size]
            timesteps: Integers. [batch]
            prompt: From `encode`.
            cameras: Where each view was taken from.
        """
        ...


@runtime_checkable
class Guidance(Protocol):
    """A loss on rendered views whose gradient pulls them towards a prompt.

    Attributes:
        size: Pixels along a side that views are best rendered at (others are resized).
    """

    size: int

    def encode(self, prompt: str, negative: str = "") -> Prompt:
        """Encode a prompt; the same texts are encoded once only."""
        ...

    def __call__(
        self,
        views: Tensor,
        prompt: Prompt,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        """The loss; draws only from torch's global CPU generator, so that it is a function of the step's randomness.

        Args:
            views: Rendered RGB in [0, 1], with a gradient. [batch, 3, height, width]
            prompt: From `encode`.
            cameras: The cameras of the views.
            timestep_range: Smallest and largest noise level, as fractions of the schedule.

        Returns:
            A scalar to call `backward` on; its value is worth logging. No gradient goes through the score model.
        """
        ...
