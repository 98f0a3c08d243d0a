"""Random lights and backgrounds (DreamFusion, arXiv 2209.14988, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes import Light

Placement = Literal["dreamfusion", "magic3d"]
"""Where lights are: normally distributed about each camera's direction, or uniformly in a cone of 60 degrees around."""


@dataclass(frozen=True)
class ShadingConfig:
    """When and how a step is lit.

    Attributes:
        ambient_steps: Number of initial steps that show the albedo alone.
        diffuse_probability: Probability that a later step is lit.
        textureless_probability: Probability that a lit step shows the shading alone.
        ambient: Weight of the albedo that does not depend on the light.
        diffuse: Weight that is multiplied by the cosine between normal and light.
        soft: Whether `diffuse` is drawn at each step instead, uniformly from 0 to 1, and `ambient` is the rest.
        distance: Smallest and largest distance of the light from the origin, world units.
        placement: Where the lights are: "dreamfusion" draws them from a normal distribution about each camera's
            direction, "magic3d" with a uniform angle of up to 60 degrees from it.
    """

    ambient_steps: int = 2001
    diffuse_probability: float = 0.75
    textureless_probability: float = 0.5
    ambient: float = 0.1
    diffuse: float = 0.9
    soft: bool = False
    distance: tuple[float, float] = (0.8, 1.5)
    placement: Placement = "dreamfusion"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A probability is outside [0, 1], or the placement is unknown.
        """
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement={self.placement!r}: give one of {', '.join(get_args(Placement))}"
            )
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
    diffuse = float(torch.rand(1)) if config.soft else config.diffuse
    position = cameras.position.cpu()
    if config.placement == "magic3d":
        towards = _in_cone(F.normalize(position, dim=-1), near, torch.rand(len(cameras), 1))
    else:
        towards = F.normalize(position + near, dim=-1)
    if coins[0] >= config.diffuse_probability:
        return None
    low, high = config.distance
    position = (towards * (low + (high - low) * far)).to(cameras.position)
    textureless = bool(coins[1] < config.textureless_probability)
    return Light(position, 1 - diffuse if config.soft else config.ambient, diffuse, textureless)


def _in_cone(axes: Tensor, around: Tensor, share: Tensor) -> Tensor:
    """Returns directions in a cone of 60 degrees around axes, with a uniform angle from them, `[batch, 3]`.

    Args:
        axes: Unit vectors, `[batch, 3]`.
        around: Vectors of any length, which say to which side, `[batch, 3]`.
        share: The angle as a share of 60 degrees, `[batch, 1]`.
    """
    side = F.normalize(around - (around * axes).sum(-1, keepdim=True) * axes, dim=-1)
    angle = share * math.pi / 3
    return angle.cos() * axes + angle.sin() * side


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
