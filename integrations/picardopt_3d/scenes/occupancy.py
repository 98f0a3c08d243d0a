"""Where there is something: a grid of densities that a run keeps as carry, so that empty space is not sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OccupancyConfig:
    """Shape of an `OccupancyGrid`.

    Args:
        resolution: cells along each edge.
        threshold: density from which a cell counts as occupied; the grid's mean where that is less.
        decay: what is left of a cell's old number at each update.
        every: steps between updates; the first is at step 0.
    """

    resolution: int = 32
    threshold: float = 0.01
    decay: float = 0.95
    every: int = 16

    def __post_init__(self) -> None:
        """Refuse what keeps no grid, by name, with the remedy."""
        for name in ("resolution", "every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: give a whole number of at least 1"
                )
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r}: give a density, 0 or more")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay!r}: give the share that is left, 0 to 1")


class OccupancyGrid(nn.Module):
    """The largest density seen lately in every cell of a cube (Instant-NGP, arXiv 2201.05989, appendix E.2).

    A step that is due measures the density once a cell and hands the numbers to `update`, which is what the
    optimizer applies in the steps' order (`picardopt.Carry`): the grid is a function of the step, whichever worker
    evaluated it.

    Args:
        config: cells, and when one counts as occupied.
        radius: half an edge of the cube, world units.

    Attributes:
        values: densities; -1 until first measured. # [resolution, resolution, resolution] (z, y, x)
    """

    values: Tensor

    def __init__(self, config: OccupancyConfig | None = None, radius: float = 1.0) -> None:
        super().__init__()
        self.config, self.radius = config or OccupancyConfig(), radius
        self.register_buffer("values", torch.full((self.config.resolution,) * 3, -1.0))

    def due(self, step: int) -> bool:
        """Whether a step measures."""
        return step % self.config.every == 0

    @torch.no_grad()
    def measure(self, density: Callable[[Tensor], Tensor]) -> Tensor:
        """The density at one random point in each cell, drawn from torch's global CPU generator.

        Args:
            density: of points [count, 3] -> [count].

        Returns:
            [resolution, resolution, resolution]
        """
        size = self.config.resolution
        axis = torch.arange(size)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        corners = torch.stack([x, y, z], dim=-1).view(-1, 3)
        points = (corners + torch.rand(len(corners), 3)) * (2 * self.radius / size) - self.radius
        return density(points.to(self.values.device)).view_as(self.values)

    @torch.no_grad()
    def update(self, measured: Tensor) -> None:
        """Take over a measurement: the larger of it and the decayed old number."""
        old = self.config.decay * self.values.clamp_min(0.0)
        self.values.copy_(torch.maximum(old, measured.to(self.values)))

    def occupied(self) -> Tensor:
        """Which cells are to be sampled. [resolution, resolution, resolution], bool."""
        least = self.values.mean().clamp(0.0, self.config.threshold)
        return (self.values > least) | (self.values < 0)

    def at(self, points: Tensor) -> Tensor:
        """Whether points lie in occupied cells. [..., 3] -> [...]."""
        size = self.config.resolution
        cells = ((points / self.radius + 1) * (size / 2)).long().clamp_(0, size - 1)
        x, y, z = cells.unbind(-1)
        return self.occupied().view(-1)[(z * size + y) * size + x]
