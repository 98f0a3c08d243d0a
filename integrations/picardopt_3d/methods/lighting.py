"""Random lights and backgrounds (DreamFusion, arXiv 2209.14988, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes import Light


@dataclass(frozen=True)
class ShadingConfig:
    """When and how a step is lit.

    Attributes:
        ambient_steps: Number of initial steps that show the albedo alone.
        diffuse_probability: Probability that a later step is lit.
        textureless_probability: Probability that a lit step shows the shading alone.
        ambient: Weight of the albedo that does not depend on the light.
        diffuse: Weight that is multiplied by the cosine between normal and light.
        distance: Smallest and largest distance of the light from the origin, world units.
    """

    ambient_steps: int = 2001
    diffuse_probability: float = 0.75
    textureless_probability: float = 0.5
    ambient: float = 0.1
    diffuse: float = 0.9
    distance: tuple[float, float] = (0.8, 1.5)

    def __post_init__(self) -> None:
        """Checks the probabilities.

        Raises:
            ValueError: A probability is outside [0, 1].
        """
        for name in ("diffuse_probability", "textureless_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to 1")

    def lit(self, step: int) -> bool:
        """Returns whether a step can be lit."""
        return step >= self.ambient_steps and self.diffuse_probability > 0


def random_light(cameras: Cameras, config: ShadingConfig, step: int) -> Light | None:
    """Draws the light of one step, near each camera's direction; None shows the albedo.

    Random numbers come from torch's global CPU generator; a step that cannot be lit draws none.

    Args:
        cameras: Cameras of the step's views.
        config: When and how a step is lit.
        step: The step.
    """
    if not config.lit(step):
        return None
    coins, near, far = torch.rand(2), torch.randn(len(cameras), 3), torch.rand(len(cameras), 1)
    if coins[0] >= config.diffuse_probability:
        return None
    towards = torch.nn.functional.normalize(cameras.position.cpu() + near, dim=-1)
    low, high = config.distance
    position = (towards * (low + (high - low) * far)).to(cameras.position)
    textureless = bool(coins[1] < config.textureless_probability)
    return Light(position, config.ambient, config.diffuse, textureless)


def random_background(batch: int, probability: float, device: torch.device) -> Tensor | None:
    """Draws a plain background for each view, RGB in [0, 1], `[batch, 3]`, or None to keep the scene's background.

    Args:
        batch: Number of views.
        probability: Probability that a step has such a background.
        device: Device of the colours.
    """
    if probability <= 0:
        return None
    coin, colours = torch.rand(1), torch.rand(batch, 3)
    return colours.to(device) if coin < probability else None
