"""Scenes that are known in closed form, for the tests of what is made of scenes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes import FieldConfig, RadianceField, Render, Scene, Surface
from torch import Tensor, nn


class Balls(Scene):
    """Balls whose colour at a point is 0.5 + the point's coordinates (so that axes can be told apart); not a field.

    Args:
        balls: Centre (3 numbers) and radius of each; they must not overlap.
    """

    def __init__(self, balls: list[tuple[float, float, float, float]] | None = None) -> None:
        super().__init__()
        self.balls = nn.Parameter(torch.tensor(balls or [(0.0, 0.0, 0.0, 0.4)]))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"balls": [self.balls]}

    def level_set(self, points: Tensor) -> Tensor:
        centres, radii = self.balls[:, :3], self.balls[:, 3]
        return (radii - (points[:, None] - centres).norm(dim=-1)).amax(1)

    def surface(self) -> Surface:
        return Surface(0.5, self.level_set, lambda points: points + 0.5, self.device)

    def render(
        self,
        cameras: Cameras,
        size: int | tuple[int, int],
        *,
        background: Tensor | None = None,
        **_: object,
    ) -> Render:
        """Of the first ball alone: where rays meet it."""
        height, width = (size, size) if isinstance(size, int) else size
        origins, directions = cameras.rays(height, width)
        away = origins - self.balls[0, :3]
        middle = -(away * directions).sum(-1)
        squared = self.balls[0, 3] ** 2 - (away.square().sum(-1) - middle.square())
        hit = squared > 0
        depth = torch.where(hit, middle - squared.clamp_min(0).sqrt(), 0.0)
        seen = origins + depth[..., None] * directions + 0.5
        plain = torch.zeros(len(origins), 3) if background is None else background
        rgb = torch.where(hit[..., None], seen, plain[:, None, None])
        return Render(rgb.movedim(-1, 1), hit[:, None].float(), depth[:, None])


def voxels(
    shape: Callable[[Tensor], Tensor], colour: tuple[float, float, float], size: int = 24
) -> RadianceField:
    """A dense field of a shape of the built-in world, all in one colour.

    Args:
        shape: its signed distance. # [..., 3] -> [...]
        colour: RGB in [0, 1].
        size: voxels along each edge.
    """
    field = RadianceField(FieldConfig(resolutions=(size,), samples=48))
    axis = torch.linspace(-field.radius, field.radius, size)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = shape(torch.stack([x, y, z], dim=-1))
    with torch.no_grad():
        field.levels[0][0] = field.config.surface_density - 600.0 * distance - field.blob
        field.levels[0][1:] = torch.tensor(colour).logit(1e-3)[:, None, None, None]
    return field
