"""A signed distance field of a hash encoding and small networks (TextMesh, arXiv 2304.12439, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picardopt_3d.scenes.field import FieldSample
from picardopt_3d.scenes.hash_field import (
    HashField,
    HashFieldConfig,
    Normals,
    central_differences,
)
from picardopt_3d.scenes.hash_grid import HashConfig
from picardopt_3d.scenes.networks import Mlp

_PACE = 10.0  # as in NeuS, log(1 / deviation) / 10 is learned: a network's learning rate suits it


@dataclass(frozen=True)
class SdfConfig(HashFieldConfig):
    """Configuration of an `SdfField`; the defaults are those of DreamPropeller's release of TextMesh.

    Attributes:
        surface_radius: Radius of the initial sphere, world units.
        inverse_deviation: Initial inverse of the deviation, the distance over which the density falls across the
            surface, per world unit. It is also the density inside.
        learn_deviation: Whether the deviation is trained.
        sharpest: Largest inverse of the deviation, per world unit (threestudio's 80): samples would miss a thinner
            surface.
    """

    encoding: HashConfig = field(default_factory=lambda: HashConfig(start_level=8))
    normals: Normals = "finite_difference"
    normal_step: float = 0.001
    surface_radius: float = 0.5
    inverse_deviation: float = 30.0
    learn_deviation: bool = True
    sharpest: float = 80.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        super().__post_init__()
        self._check_positive("inverse_deviation", "sharpest")
        if self.inverse_deviation > self.sharpest:
            raise ValueError(
                f"inverse_deviation={self.inverse_deviation!r}: give at most sharpest={self.sharpest}"
            )
        if not 0 < self.surface_radius < self.radius:
            raise ValueError(
                f"surface_radius={self.surface_radius!r}: give a radius within radius={self.radius}"
            )


class SdfField(HashField):
    """A signed distance, the sum of a sphere's and a network's output, rendered with the density of VolSDF.

    The network's last layer starts at zero, so that the field starts as an exact sphere.

    Args:
        config: The configuration.

    Attributes:
        sharpness: The parameter log(1 / deviation) / 10, a scalar.
    """

    config: SdfConfig

    def __init__(self, config: SdfConfig | None = None) -> None:
        config = config or SdfConfig()
        super().__init__(config)
        self.network = Mlp(self.encoding.width, config.width, config.depth, 1, fresh=0.0)
        self.colours = Mlp(self.encoding.width, config.width, config.depth, 3)
        self.sharpness = nn.Parameter(
            torch.tensor(math.log(config.inverse_deviation) / _PACE),
            requires_grad=config.learn_deviation,
        )
        self._build_rest()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by role; "background" is empty if the background is solid."""
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
        """Returns the distance of points `[count, 3]` to the surface, world units, negative inside, `[count]`."""
        return self._evaluate(points, step, False)[0]

    def level_set(self, points: Tensor) -> Tensor:
        """Returns values that are positive inside the surface; see `Field.level_set`."""
        return torch.minimum(-self.signed_distance(points), self.radius - points.norm(dim=1))

    def _density(self, distance: Tensor) -> Tensor:
        """Returns Laplace's distribution function of -distance over its deviation (VolSDF, equations 2 and 3)."""
        inverse = torch.exp(_PACE * self.sharpness).clamp_max(self.config.sharpest)
        share = 0.5 + 0.5 * distance.sign() * torch.expm1(-distance.abs() * inverse)
        return inverse * share

    def _evaluate(
        self, points: Tensor, step: int | None, slopes: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns signed distance, `[count]`, features, `[width, count]`, and gradient, `[3, count]`, or None."""
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
        """Returns the gradient of the signed distance by central differences, `[3, count]`."""
        size = self.config.normal_step
        ahead, back = central_differences(
            lambda places: self.signed_distance(places, step), points, size
        )
        slope: Tensor = (ahead - back) / (2.0 * size)
        return slope
