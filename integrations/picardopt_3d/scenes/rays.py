"""Rays through the pixels of a batch of views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rays:
    """Rays through the pixels of a batch of views, flattened.

    Attributes:
        origins: World units. [rays, 3]
        directions: Unit vectors. [rays, 3]
        shape: Batch, height and width of the views.
    """

    origins: Tensor
    directions: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, origins: Tensor, directions: Tensor) -> Rays:
        """Flattens rays of [batch, height, width, 3]."""
        batch, height, width = origins.shape[:3]
        return cls(origins.reshape(-1, 3), directions.reshape(-1, 3), (batch, height, width))

    def view_of(self, rays: Tensor) -> Tensor:
        """Returns the view that each of some rays belongs to. [count] -> [count]."""
        return rays // (self.shape[1] * self.shape[2])

    def image(self, values: Tensor, hit: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Returns views of values that only some rays have.

        Args:
            values: [hits, channels]
            hit: Those rays. [hits]
            fill: Of the other rays, a number, [channels] or [rays, channels].

        Returns:
            [batch, channels, height, width]
        """
        full = values.new_zeros(len(self.origins), values.shape[1]) + fill
        full = full.index_copy(0, hit, values)
        return full.view(*self.shape, -1).permute(0, 3, 1, 2)

    def repeated(self, colours: Tensor) -> Tensor:
        """Returns each view's colour for each of its rays. [batch, 3] -> [rays, 3]."""
        _, height, width = self.shape
        return colours.repeat_interleave(height * width, 0)


def ray_sphere(rays: Rays, radius: float) -> tuple[Tensor, Tensor]:
    """Returns where rays enter and leave a sphere about the origin, each [rays]; near = far is a miss."""
    origins, directions = rays.origins, rays.directions
    middle = -(origins * directions).sum(1)
    squared = radius**2 - (origins.square().sum(1) - middle.square())
    half = squared.clamp_min(0.0).sqrt()
    near = (middle - half).clamp_min(0.0)
    return near, torch.maximum(middle + half, near)
