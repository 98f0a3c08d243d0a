"""3D Gaussians for the tests of what is made of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes import Render, Scene, Surface
from picardopt_3d.scenes.gaussians.density import THRESHOLD, surface_of
from picardopt_3d.scenes.gaussians.splats import SH_C0, Splats
from torch import nn


def some_splats(count: int, *, degree: int = 0, scale: float = 0.05, seed: int = 0) -> Splats:
    """Gaussians of all shapes, rotations, opacities and colours in a ball of radius 0.5.

    Args:
        count: Their number.
        degree: Of the spherical harmonics.
        scale: Their mean standard deviation, world units.
        seed: Of what is drawn.
    """
    draws = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(count, *size, generator=draws)

    radius = 0.5 * torch.rand(count, 1, generator=draws) ** (1 / 3)
    return Splats(
        radius * F.normalize(normal(3), dim=1),
        math.log(scale) + 0.5 * normal(3),
        2 * normal(4),
        2 * normal(),
        normal(3),
        0.3 * normal((degree + 1) ** 2 - 1, 3),
    )


def shell(count: int, radius: float, scale: float) -> Splats:
    """Opaque round Gaussians evenly on a sphere, whose colour at a point is 0.5 + the point's coordinates."""
    turn = math.pi * (3 - math.sqrt(5)) * torch.arange(count)
    z = 1 - (2 * torch.arange(count) + 1) / count
    flat = (1 - z * z).sqrt()
    means = radius * torch.stack([flat * turn.cos(), flat * turn.sin(), z], dim=1)
    return Splats(
        means,
        torch.full((count, 3), math.log(scale)),
        F.pad(torch.ones(count, 1), (0, 3)),
        torch.full((count,), 8.0),
        means / SH_C0,
        torch.zeros(count, 0, 3),
    )


class OfSplats(Scene):
    """A scene of given Gaussians, for what is made of a scene's surface.

    Args:
        splats: The Gaussians.
        threshold: Density at the surface.
    """

    def __init__(self, splats: Splats, threshold: float = THRESHOLD) -> None:
        super().__init__()
        self.given, self.threshold = splats, threshold
        self.means = nn.Parameter(splats.means)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"means": [self.means]}

    def splats(self) -> Splats:
        return self.given

    def surface(self) -> Surface:
        return surface_of(self.given, 0.55, self.threshold)

    def render(self, cameras: Cameras, size: int | tuple[int, int], **_: object) -> Render:
        raise NotImplementedError
