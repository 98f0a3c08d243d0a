"""A radiance field of a hash encoding and one small network (Instant-NGP in DreamFusion's setting)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picardopt_3d.scenes.field import Field, FieldSample
from picardopt_3d.scenes.hash_grid import HashConfig, HashGrid
from picardopt_3d.scenes.networks import Background, Mlp, check_background
from picardopt_3d.scenes.occupancy import OccupancyConfig, OccupancyGrid
from picardopt_3d.scenes.volume import cut_out

NORMALS = ("analytic", "finite_difference")


@dataclass(frozen=True)
class NerfConfig:
    """Shape of a `NerfField`; the defaults are DreamFusion's as released for DreamPropeller.

    Args:
        encoding: the hash encoding.
        width: of the network's hidden layers.
        depth: hidden layers.
        radius: of the occupied sphere, world units; nothing exists outside it.
        samples: samples along a ray's chord through the sphere.
        blob_scale: height of the density bias at the centre.
        blob_radius: radius at which the bias crosses zero, world units.
        normals: "analytic", or "finite_difference" (central).
        normal_step: half the distance of finite differences, world units.
        background: "solid", or "neural" (a small network of the direction).
        background_colour: of "solid", RGB in [0, 1].
        occupancy: the grid that keeps empty space from being sampled; None: everything is sampled.
        surface_density: density of the surface that a mesh is taken from, per world unit.
    """

    encoding: HashConfig = field(default_factory=HashConfig)
    width: int = 64
    depth: int = 1
    radius: float = 2.0
    samples: int = 512
    blob_scale: float = 10.0
    blob_radius: float = 0.5
    normals: Literal["analytic", "finite_difference"] = "analytic"
    normal_step: float = 0.01
    background: Literal["solid", "neural"] = "neural"
    background_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    occupancy: OccupancyConfig | None = field(default_factory=OccupancyConfig)
    surface_density: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what cannot be rendered, by name, with the remedy."""
        positive = ("width", "radius", "samples", "blob_radius", "normal_step", "surface_density")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a positive number")
        if self.depth < 1:
            raise ValueError(f"depth={self.depth!r}: give 1 or more hidden layers")
        if self.normals not in NORMALS:
            raise ValueError(f"normals={self.normals!r}: give {' or '.join(NORMALS)}")
        check_background(self.background, self.background_colour)


class NerfField(Field):
    """Density and colour by a network over a hash encoding, inside a sphere, rendered by alpha compositing.

    Args:
        config: sizes and constants.
    """

    def __init__(self, config: NerfConfig | None = None) -> None:
        config = config or NerfConfig()
        super().__init__(config)
        self.encoding = HashGrid(config.encoding, config.radius)
        self.network = Mlp(self.encoding.width, config.width, config.depth, 4)
        self.background = Background(config.background, config.background_colour)
        if config.occupancy is not None:
            self.occupancy = OccupancyGrid(config.occupancy, config.radius)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by role; "background" is empty where it is solid."""
        return {
            "encoding": list(self.encoding.parameters()),
            "networks": list(self.network.parameters()),
            "background": list(self.background.parameters()),
        }

    def query(self, points: Tensor, step: int | None, normals: bool) -> FieldSample:
        """Evaluates the field; see `Field.query`."""
        raw, normal = self._evaluate(points, step, normals)
        return FieldSample(F.softplus(raw[0]), torch.sigmoid(raw[1:]), normal)

    def level_set(self, points: Tensor) -> Tensor:
        """Returns values that are positive inside of the surface; see `Field.level_set`."""
        raw = self._evaluate(points, None, False)[0][0]
        return cut_out(raw, self.config.surface_density, self.radius - points.norm(dim=1))

    def _evaluate(
        self, points: Tensor, step: int | None, normals: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Raw density (with its bias) and raw colour [4, count]; unit normals [3, count] or None."""
        if not normals or self.config.normals == "finite_difference":
            raw = self._with_blob(points, self.network(self.encoding(points, step)[0]))
            return raw, (self._difference(points, step) if normals else None)
        features, slopes = self.encoding(points, step, slopes=True)
        raw, by_feature = self.network.with_slope(features)
        slope = (slopes * by_feature).sum(1)  # [3, count]
        config = self.config
        outward = F.normalize(points, dim=1, eps=1e-6).T
        slope = slope - (config.blob_scale / config.blob_radius) * outward
        return self._with_blob(points, raw), -F.normalize(slope, dim=0, eps=1e-6)

    def _with_blob(self, points: Tensor, raw: Tensor) -> Tensor:
        """Add the density bias scale (1 - r / radius) (Magic3D, section 4.1)."""
        config = self.config
        blob = config.blob_scale * (1.0 - points.norm(dim=1) / config.blob_radius)
        return torch.cat([raw[:1] + blob, raw[1:]])

    def _difference(self, points: Tensor, step: int | None) -> Tensor:
        """Unit normals by central differences of the raw density. [3, count]."""
        size = self.config.normal_step
        offsets = size * torch.eye(3, dtype=points.dtype, device=points.device)
        both = torch.stack([offsets, -offsets])[:, :, None] + points  # [2, 3, count, 3]
        both = both.view(-1, 3)
        raw = self._with_blob(both, self.network(self.encoding(both, step)[0]))[0]
        ahead, back = raw.view(2, 3, -1)
        return F.normalize(back - ahead, dim=0, eps=2e-6 * size)
