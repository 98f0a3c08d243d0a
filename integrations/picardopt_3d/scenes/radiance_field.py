"""A radiance field on dense voxel grids of several resolutions, in plain torch.

The levels are summed on the finest grid *before* anything is sampled, so that a sample costs one trilinear look-up
however many levels there are. Normals (finite differences of the summed density) are further channels of the same
look-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from picardopt_3d.scenes.field import Field, FieldSample
from picardopt_3d.scenes.networks import Background
from picardopt_3d.scenes.scene import Scene
from picardopt_3d.scenes.volume import cut_out, inverse_softplus

_DENSITIES = (1e-3, 1e4)  # range of a converted field's densities: near 0 the gradient vanishes


@dataclass(frozen=True)
class FieldConfig:
    """Configuration of a `RadianceField`.

    Attributes:
        resolutions: Voxels along each edge of the cube, one number per level, coarse to fine.
        radius: Radius of the sphere that contains the object, world units; there is nothing outside it.
        samples: Samples along a ray's path through the sphere.
        blob_scale: Height of the density bias at the center (DreamFusion's blob).
        blob_radius: Radius at which the bias crosses zero, world units.
        background: Colour behind the object, RGB in [0, 1].
        surface_density: Density at which a mesh is extracted, per world unit.
    """

    resolutions: tuple[int, ...] = (8, 16, 32)
    radius: float = 0.55
    samples: int = 24
    blob_scale: float = 10.0
    blob_radius: float = 0.5
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    surface_density: float = 10.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        if not self.resolutions or min(self.resolutions) < 2:
            raise ValueError(
                f"resolutions={self.resolutions!r}: give at least one level of 2 or more voxels"
            )
        for name in ("radius", "samples", "blob_radius", "surface_density"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a positive number")


class RadianceField(Field):
    """Density and colour on voxel grids inside a sphere, rendered by alpha compositing.

    Args:
        config: The configuration.

    Attributes:
        levels: One grid per resolution, raw density and then raw RGB, each `[4, z, y, x]`.
    """

    blob: Tensor

    def __init__(self, config: FieldConfig | None = None) -> None:
        super().__init__(config or FieldConfig())
        self.levels = nn.ParameterList(
            torch.zeros(4, size, size, size) for size in self.config.resolutions
        )
        x, y, z = self.voxels().unbind(-1)
        distance = (x * x + y * y + z * z).sqrt()
        # The density bias of DreamFusion: scale * (1 - r / radius). # [z, y, x]
        blob = self.config.blob_scale * (1.0 - distance / self.config.blob_radius)
        self.register_buffer("blob", blob, persistent=False)
        self.background = Background("solid", self.config.background)

    @classmethod
    @torch.no_grad()
    def from_scene(cls, config: FieldConfig, other: Scene) -> Self:
        """Copies another field's values at the voxels of the finest grid; see `Field.from_scene`."""
        if not isinstance(other, Field) or config == other.config:
            return super().from_scene(config, other)
        field = cls(config).to(other.device)
        points = field.voxels().to(other.device)
        there = other.query(points.view(-1, 3), None, False)
        density = there.density.clamp(*_DENSITIES)
        raw = torch.cat([inverse_softplus(density)[None], there.colour.logit(1e-4)])
        finest = field.levels[-1]
        finest.copy_(raw.view_as(finest))
        finest[0] -= field.blob
        return field

    def voxels(self) -> Tensor:
        """Returns the positions of the finest grid's voxels, world units, `[z, y, x, 3]`."""
        config: FieldConfig = self.config
        axis = torch.linspace(-config.radius, config.radius, config.resolutions[-1])
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        return torch.stack([x, y, z], dim=-1)

    @property
    def voxel(self) -> float:
        """Edge of a voxel of the finest grid, world units."""
        config: FieldConfig = self.config
        return 2.0 * config.radius / (config.resolutions[-1] - 1)

    def raw_grid(self) -> Tensor:
        """Returns the sum of all levels on the finest grid, with the density bias.

        Returns:
            Raw density, then raw RGB, `[4, z, y, x]`.
        """
        size = self.config.resolutions[-1]
        *coarse, total = self.levels
        for level in coarse:
            total = total + F.interpolate(
                level[None], size=(size,) * 3, mode="trilinear", align_corners=True
            ).squeeze(0)
        return torch.cat([total[:1] + self.blob, total[1:]])

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by role; all of them are grids, in the group "encoding"."""
        return {"encoding": list(self.levels), "networks": [], "background": []}

    def query(self, points: Tensor, step: int | None, normals: bool) -> FieldSample:
        """Evaluates the field; see `Field.query`. The step makes no difference.

        Normals are interpolated between voxels, so that they are a little shorter than 1 where the surface bends.
        """
        grid = self.raw_grid()
        if normals:
            grid = torch.cat([grid, self._normals(grid[0])])
        values = self._look_up(grid, points)  # [4 or 7, count]
        normal = values[4:] if normals else None
        return FieldSample(F.softplus(values[0]), torch.sigmoid(values[1:4]), normal)

    def level_set(self, points: Tensor) -> Tensor:
        """Returns values that are positive inside the surface; see `Field.level_set`."""
        raw = self._look_up(self.raw_grid()[:1], points)[0]
        return cut_out(raw, self.config.surface_density, self.radius - points.norm(dim=1))

    def _look_up(self, grid: Tensor, points: Tensor) -> Tensor:
        """Interpolates a grid `[channels, z, y, x]` trilinearly at points `[count, 3]`, `[channels, count]`."""
        return F.grid_sample(
            grid[None],
            (points / self.radius).view(1, -1, 1, 1, 3),
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        ).view(len(grid), -1)

    def _normals(self, raw_density: Tensor) -> Tensor:
        """Returns unit normals at the voxels, `[3 (xyz), z, y, x]`.

        They point against the density's gradient, which is a central difference on the summed grid.
        """
        density = F.softplus(raw_density)
        padded = F.pad(density[None, None], (1,) * 6, mode="replicate")[0, 0]
        inner = slice(1, -1)
        along_z = padded[:-2, inner, inner] - padded[2:, inner, inner]
        along_y = padded[inner, :-2, inner] - padded[inner, 2:, inner]
        along_x = padded[inner, inner, :-2] - padded[inner, inner, 2:]
        slope = torch.stack([along_x, along_y, along_z]) / (2.0 * self.voxel)
        return F.normalize(slope, dim=0, eps=1e-4)
