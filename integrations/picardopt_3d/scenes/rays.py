"""Rays through the pixels of a batch of views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rays:
    """Rays through the pixels of a batch of views, flattened.

    Attributes:
        origins: Origins of the rays, world units, `[rays, 3]`.
        directions: Unit vectors, `[rays, 3]`.
        shape: Batch, height and width of the views.
    """

    origins: Tensor
    directions: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, origins: Tensor, directions: Tensor) -> Rays:
        """Flattens the rays of a batch of views, each `[batch, height, width, 3]`."""
        batch, height, width = origins.shape[:3]
        return cls(origins.reshape(-1, 3), directions.reshape(-1, 3), (batch, height, width))

    def view_of(self, rays: Tensor) -> Tensor:
        """Returns the index of the view of each ray, from the rays' indices, both `[count]`."""
        return rays // (self.shape[1] * self.shape[2])

    def image(self, values: Tensor, hit: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Arranges values of some rays as views and fills in the others.

        Args:
            values: Values of some rays, `[hits, channels]`.
            hit: Indices of those rays, `[hits]`.
            fill: Value of the other rays: a number, `[channels]` or `[rays, channels]`.

        Returns:
            The views, `[batch, channels, height, width]`.
        """
        full = values.new_zeros(len(self.origins), values.shape[1]) + fill
        full = full.index_copy(0, hit, values)
        return full.view(*self.shape, -1).permute(0, 3, 1, 2)

    def repeated(self, colours: Tensor) -> Tensor:
        """Repeats the colour of each view, `[batch, 3]`, for each of its rays, `[rays, 3]`."""
        _, height, width = self.shape
        return colours.repeat_interleave(height * width, 0)


def ray_sphere(rays: Rays, radius: float) -> tuple[Tensor, Tensor]:
    """Returns the distances at which rays enter and leave a sphere about the origin, each `[rays]`.

    A ray with equal distances misses the sphere.

    Args:
        rays: The rays.
        radius: Radius of the sphere, world units.
    """
    origins, directions = rays.origins, rays.directions
    middle = -(origins * directions).sum(1)
    squared = radius**2 - (origins.square().sum(1) - middle.square())
    half = squared.clamp_min(0.0).sqrt()
    near = (middle - half).clamp_min(0.0)
    return near, torch.maximum(middle + half, near)
