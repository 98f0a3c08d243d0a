"""A signed distance field of a hash encoding and small networks (TextMesh, arXiv 2304.12439, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picardopt_3d.scenes.field import Field, FieldSample
from picardopt_3d.scenes.hash_grid import HashConfig, HashGrid
from picardopt_3d.scenes.nerf import NORMALS
from picardopt_3d.scenes.networks import Background, Mlp, check_background
from picardopt_3d.scenes.occupancy import OccupancyConfig, OccupancyGrid

_PACE = 10.0  # NeuS learns log(1 / deviation) / 10, so that a network's learning rate suits it


@dataclass(frozen=True)
class SdfConfig:
    """Shape of an `SdfField`; the defaults are TextMesh's as released for DreamPropeller.

    Args:
        encoding: the hash encoding.
        width: of the networks' hidden layers.
        depth: hidden layers.
        radius: of the occupied sphere, world units; nothing exists outside it.
        samples: samples along a ray's chord through the sphere.
        surface_radius: of the sphere that it starts as, world units.
        inverse_deviation: 1 / deviation of the density's fall across the surface that it starts with, per world
            unit: the density inside, and the inverse of the thickness of the surface.
        learn_deviation: whether the deviation is trained.
        sharpest: the largest 1 / deviation, per world unit (threestudio's 80): a thinner surface falls between samples.
        normals: "finite_difference" (central), or "analytic".
        normal_step: half the distance of finite differences, world units.
        background: "solid", or "neural" (a small network of the direction).
        background_colour: of "solid", RGB in [0, 1].
        occupancy: the grid that keeps empty space from being sampled; None: everything is sampled.
    """

    encoding: HashConfig = field(default_factory=lambda: HashConfig(start_level=8))
    width: int = 64
    depth: int = 1
    radius: float = 2.0
    samples: int = 512
    surface_radius: float = 0.5
    inverse_deviation: float = 30.0
    learn_deviation: bool = True
    sharpest: float = 80.0
    normals: Literal["analytic", "finite_difference"] = "finite_difference"
    normal_step: float = 0.001
    background: Literal["solid", "neural"] = "neural"
    background_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    occupancy: OccupancyConfig | None = field(default_factory=OccupancyConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be rendered, by name, with the remedy."""
        for name in ("width", "radius", "samples", "inverse_deviation", "sharpest", "normal_step"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a positive number")
        if self.inverse_deviation > self.sharpest:
            raise ValueError(
                f"inverse_deviation={self.inverse_deviation!r}: give at most sharpest={self.sharpest}"
            )
        if self.depth < 1:
            raise ValueError(f"depth={self.depth!r}: give 1 or more hidden layers")
        if not 0 < self.surface_radius < self.radius:
            raise ValueError(
                f"surface_radius={self.surface_radius!r}: give a radius within radius={self.radius}"
            )
        if self.normals not in NORMALS:
            raise ValueError(f"normals={self.normals!r}: give {' or '.join(NORMALS)}")
        check_background(self.background, self.background_colour)


class SdfField(Field):
    """A signed distance, a sphere's plus a network's, rendered with the density of VolSDF.

    The network's last layer starts at zero, so that the field is exactly a sphere at first.

    Args:
        config: sizes and constants.

    Attributes:
        sharpness: log(1 / deviation) / 10.
    """

    def __init__(self, config: SdfConfig | None = None) -> None:
        config = config or SdfConfig()
        super().__init__(config)
        self.encoding = HashGrid(config.encoding, config.radius)
        self.network = Mlp(self.encoding.width, config.width, config.depth, 1, fresh=0.0)
        self.colours = Mlp(self.encoding.width, config.width, config.depth, 3)
        self.sharpness = nn.Parameter(
            torch.tensor(math.log(config.inverse_deviation) / _PACE),
            requires_grad=config.learn_deviation,
        )
        self.background = Background(config.background, config.background_colour)
        if config.occupancy is not None:
            self.occupancy = OccupancyGrid(config.occupancy, config.radius)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by role; "background" is empty where it is solid."""
        networks = [*self.network.parameters(), *self.colours.parameters()]
        return {
            "encoding": list(self.encoding.parameters()),
            "networks": networks + ([self.sharpness] if self.config.learn_deviation else []),
            "background": list(self.background.parameters()),
        }

    def query(self, points: Tensor, step: int | None, normals: bool) -> FieldSample:
        """Evaluates the field; see `Field.query`."""
        distance, features, slope = self._evaluate(points, step, normals)
        density, colour = self._density(distance), torch.sigmoid(self.colours(features))
        if slope is None:
            return FieldSample(density, colour)
        length = (slope.square().sum(0) + 1e-12).sqrt()
        normal = F.normalize(slope, dim=0, eps=1e-6)
        return FieldSample(density, colour, normal, (length - 1.0).square())

    def signed_distance(self, points: Tensor, step: int | None = None) -> Tensor:
        """Distance to the surface, negative inside. [count, 3] -> [count]."""
        return self._evaluate(points, step, False)[0]

    def level_set(self, points: Tensor) -> Tensor:
        """Returns values that are positive inside of the surface; see `Field.level_set`."""
        return torch.minimum(-self.signed_distance(points), self.radius - points.norm(dim=1))

    def _density(self, distance: Tensor) -> Tensor:
        """Laplace's distribution function of -distance, over its deviation (VolSDF, equations 2 and 3)."""
        inverse = torch.exp(_PACE * self.sharpness).clamp_max(self.config.sharpest)
        share = 0.5 + 0.5 * distance.sign() * torch.expm1(-distance.abs() * inverse)
        return inverse * share

    def _evaluate(
        self, points: Tensor, step: int | None, slopes: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Signed distance [count], features [width, count], and the distance's slope [3, count] or None."""
        analytic = slopes and self.config.normals == "analytic"
        features, by_place = self.encoding(points, step, slopes=analytic)
        sphere = points.norm(dim=1) - self.config.surface_radius
        if by_place is not None:
            change, by_feature = self.network.with_slope(features)
            slope = (by_place * by_feature).sum(1) + F.normalize(points, dim=1, eps=1e-6).T
            return sphere + change[0], features, slope
        distance = sphere + self.network(features)[0]
        return distance, features, (self._difference(points, step) if slopes else None)

    def _difference(self, points: Tensor, step: int | None) -> Tensor:
        """The slope of the signed distance by central differences. [3, count]."""
        size = self.config.normal_step
        offsets = size * torch.eye(3, dtype=points.dtype, device=points.device)
        both = torch.stack([offsets, -offsets])[:, :, None] + points  # [2, 3, count, 3]
        ahead, back = self.signed_distance(both.view(-1, 3), step).view(2, 3, -1)
        slope: Tensor = (ahead - back) / (2.0 * size)
        return slope
