"""The occupancy grid: densities that a run keeps as carry, so that it need not sample empty space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OccupancyConfig:
    """Configuration of an `OccupancyGrid`.

    Attributes:
        resolution: Cells along each edge.
        threshold: Density above which a cell counts as occupied, per world unit; if the grid's mean is less, the mean.
        decay: Factor on a cell's old density at each update.
        every: Steps between updates; the first update is at step 0.
    """

    resolution: int = 32
    threshold: float = 0.01
    decay: float = 0.95
    every: int = 16

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        for name in ("resolution", "every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: give a whole number of at least 1"
                )
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r}: give a density, 0 or more")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay!r}: give a factor from 0 to 1")


class OccupancyGrid(nn.Module):
    """The largest recent density in each cell of a cube (Instant-NGP, arXiv 2201.05989, appendix E.2).

    At every `config.every`-th step the density is measured once per cell. The optimizer passes the measurements to
    `update` in the order of the steps (`picardopt.Carry`), so that the grid is a function of the step, whichever worker
    evaluated it.

    Args:
        config: The configuration.
        radius: Half an edge of the cube, world units.

    Attributes:
        values: Densities per world unit, indexed z, y, x, `[resolution, resolution, resolution]`; -1 until the first
            measurement.
    """

    values: Tensor

    def __init__(self, config: OccupancyConfig | None = None, radius: float = 1.0) -> None:
        super().__init__()
        self.config, self.radius = config or OccupancyConfig(), radius
        self.register_buffer("values", torch.full((self.config.resolution,) * 3, -1.0))

    def due(self, step: int) -> bool:
        """Returns whether the density is measured at a step."""
        return step % self.config.every == 0

    @torch.no_grad()
    def measure(self, density: Callable[[Tensor], Tensor]) -> Tensor:
        """Measures the density at one random point in each cell, drawn from torch's global CPU generator.

        Args:
            density: Maps points `[count, 3]` (world units) to densities `[count]`.

        Returns:
            Densities indexed z, y, x, `[resolution, resolution, resolution]`.
        """
        size = self.config.resolution
        axis = torch.arange(size)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        corners = torch.stack([x, y, z], dim=-1).view(-1, 3)
        points = (corners + torch.rand(len(corners), 3)) * (2 * self.radius / size) - self.radius
        return density(points.to(self.values.device)).view_as(self.values)

    @torch.no_grad()
    def update(self, measured: Tensor) -> None:
        """Updates each cell to the larger of its measurement and its decayed old density."""
        old = self.config.decay * self.values.clamp_min(0.0)
        self.values.copy_(torch.maximum(old, measured.to(self.values)))

    def occupied(self) -> Tensor:
        """Returns a mask of the cells to sample, `[resolution, resolution, resolution]`."""
        least = self.values.mean().clamp(0.0, self.config.threshold)
        return (self.values > least) | (self.values < 0)

    def at(self, points: Tensor) -> Tensor:
        """Returns whether points `[..., 3]` lie in occupied cells, `[...]`."""
        size = self.config.resolution
        cells = ((points / self.radius + 1) * (size / 2)).long().clamp_(0, size - 1)
        x, y, z = cells.unbind(-1)
        return self.occupied().view(-1)[(z * size + y) * size + x]
