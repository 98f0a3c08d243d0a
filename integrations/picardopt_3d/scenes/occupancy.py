"""Where there is something: a grid of densities that a run keeps as carry, so that empty space is not sampled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OccupancyGrid(nn.Module):
    """The largest density seen lately in every cell of a cube (Instant-NGP, arXiv 2201.05989, appendix E.2).

    A step that is due measures the density once a cell and hands the numbers to `update`, which is what the
    optimizer applies in the steps' order (`picardopt.Carry`): the grid is a function of the step, whichever worker
    evaluated it.

    Args:
        resolution: cells along each edge.
        radius: half an edge of the cube, world units.
        threshold: density from which a cell counts as occupied; the grid's mean where that is less.
        decay: what is left of a cell's old number at each update.
        every: steps between updates; the first is at step 0.

    Attributes:
        values: densities; -1 until first measured. # [resolution, resolution, resolution] (z, y, x)
    """

    values: Tensor

    def __init__(
        self,
        resolution: int = 32,
        radius: float = 1.0,
        threshold: float = 0.01,
        decay: float = 0.95,
        every: int = 16,
    ) -> None:
        super().__init__()
        self.resolution, self.radius = resolution, radius
        self.threshold, self.decay, self.every = threshold, decay, every
        self.register_buffer("values", torch.full((resolution,) * 3, -1.0))

    def due(self, step: int) -> bool:
        """Whether a step measures."""
        return step % self.every == 0

    @torch.no_grad()
    def measure(self, density: Callable[[Tensor], Tensor]) -> Tensor:
        """The density at one random point in each cell, drawn from torch's global CPU generator.

        Args:
            density: of points [count, 3] -> [count].

        Returns:
            [resolution, resolution, resolution]
        """
        size = self.resolution
        axis = torch.arange(size)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        corners = torch.stack([x, y, z], dim=-1).view(-1, 3)
        points = (corners + torch.rand(len(corners), 3)) * (2 * self.radius / size) - self.radius
        return density(points.to(self.values.device)).view_as(self.values)

    @torch.no_grad()
    def update(self, measured: Tensor) -> None:
        """Take over a measurement: the larger of it and the decayed old number."""
        old = self.decay * self.values.clamp_min(0.0)
        self.values.copy_(torch.maximum(old, measured.to(self.values)))

    def occupied(self) -> Tensor:
        """Which cells are to be sampled. [resolution, resolution, resolution], bool."""
        least = self.values.mean().clamp(0.0, self.threshold)
        return (self.values > least) | (self.values < 0)

    def at(self, points: Tensor) -> Tensor:
        """Whether points lie in occupied cells. [..., 3] -> [...]."""
        cell = ((points / self.radius + 1) * (self.resolution / 2)).long()
        x, y, z = cell.clamp(0, self.resolution - 1).unbind(-1)
        return self.occupied()[z, y, x]
