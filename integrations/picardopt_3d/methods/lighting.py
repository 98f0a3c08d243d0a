"""Random lights and backgrounds of the steps of a run (DreamFusion, arXiv 2209.14988, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes import Light


@dataclass(frozen=True)
class ShadingConfig:
    """When a step is lit, and how.

    Args:
        ambient_steps: steps at the start that show the albedo alone.
        diffuse_probability: share of the later steps that are lit.
        textureless_probability: share of those that show the shading alone.
        ambient: share of the colour that is there without the light.
        diffuse: share that falls off with the cosine between normal and light.
        distance: smallest and largest distance of the light from the origin, world units.
    """

    ambient_steps: int = 2001
    diffuse_probability: float = 0.75
    textureless_probability: float = 0.5
    ambient: float = 0.1
    diffuse: float = 0.9
    distance: tuple[float, float] = (0.8, 1.5)

    def __post_init__(self) -> None:
        """Refuse probabilities that are none."""
        for name in ("diffuse_probability", "textureless_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to 1")

    def lit(self, step: int) -> bool:
        """Whether a step can be lit at all."""
        return step >= self.ambient_steps and self.diffuse_probability > 0


def random_light(cameras: Cameras, config: ShadingConfig, step: int) -> Light | None:
    """The light of one step, near each camera's direction; None shows the albedo.

    Drawn from torch's global CPU generator, and nothing in steps that cannot be lit.
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
    """A plain random colour a view in place of the scene's background, in some of the steps. [batch, 3] or None."""
    if probability <= 0:
        return None
    coin, colours = torch.rand(1), torch.rand(batch, 3)
    return colours.to(device) if coin < probability else None
