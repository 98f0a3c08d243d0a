"""The common part of fields that consist of a hash encoding and small networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from picardopt_3d.scenes.field import Field
from picardopt_3d.scenes.hash_grid import HashConfig, HashGrid
from picardopt_3d.scenes.networks import Background, check_background
from picardopt_3d.scenes.occupancy import OccupancyConfig, OccupancyGrid

Normals = Literal["analytic", "finite_difference"]


@dataclass(frozen=True)
class HashFieldConfig:
    """The configuration that all fields with a hash encoding share.

    Attributes:
        encoding: The hash encoding.
        width: Width of the networks' hidden layers.
        depth: Number of hidden layers.
        radius: Radius of the sphere that contains the object, world units; there is nothing outside it.
        samples: Samples along a ray's path through the sphere.
        normals: "analytic", or "finite_difference" (central differences).
        normal_step: Half the distance between the two points of a finite difference, world units.
        background: "solid", or "neural" (a small network of the ray's direction).
        background_colour: Colour of a "solid" background, RGB in [0, 1].
        occupancy: The grid that skips empty space; None: all of space is sampled.
    """

    encoding: HashConfig = field(default_factory=HashConfig)
    width: int = 64
    depth: int = 1
    radius: float = 2.0
    samples: int = 512
    normals: Normals = "analytic"
    normal_step: float = 0.01
    background: Literal["solid", "neural"] = "neural"
    background_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    occupancy: OccupancyConfig | None = field(default_factory=OccupancyConfig)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        self._check_positive("width", "radius", "samples", "normal_step")
        if self.depth < 1:
            raise ValueError(f"depth={self.depth!r}: give 1 or more hidden layers")
        if self.normals not in get_args(Normals):
            raise ValueError(f"normals={self.normals!r}: give {' or '.join(get_args(Normals))}")
        check_background(self.background, self.background_colour)

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a positive number")


class HashField(Field):
    """A field with a hash encoding, a background and an occupancy grid; subclasses add the networks.

    Args:
        config: The configuration.
    """

    config: HashFieldConfig

    def __init__(self, config: HashFieldConfig) -> None:
        super().__init__(config)
        self.encoding = HashGrid(config.encoding, config.radius)

    def _build_rest(self) -> None:
        """Builds the background and the occupancy grid, after the networks: initial weights are drawn in this order."""
        config = self.config
        self.background = Background(config.background, config.background_colour)
        if config.occupancy is not None:
            self.occupancy = OccupancyGrid(config.occupancy, config.radius)


def central_differences(
    function: Callable[[Tensor], Tensor], points: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """Evaluates a function on both sides of some points along each axis.

    Args:
        function: Maps points `[count, 3]` to values `[count]`.
        points: Points, world units, `[count, 3]`.
        size: Half the distance between the two sides, world units.

    Returns:
        The values ahead of the points and behind them, each `[3, count]`.
    """
    offsets = size * torch.eye(3, dtype=points.dtype, device=points.device)
    both = torch.stack([offsets, -offsets])[:, :, None] + points  # [2, 3, count, 3]
    ahead, back = function(both.view(-1, 3)).view(2, 3, -1)
    return ahead, back
