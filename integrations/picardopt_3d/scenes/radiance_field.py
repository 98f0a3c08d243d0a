"""A radiance field on dense voxel grids of several resolutions, in plain torch.

The levels are summed on the finest grid *before* anything is sampled, so that the field costs one
trilinear look-up a sample however many levels it has, and normals (finite differences of the summed
density) ride along as further channels of the same look-up.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class FieldConfig:
    """Shape of a `RadianceField`.

    Args:
        resolutions: voxels along each edge of the cube, one number a level, coarse to fine.
        radius: radius of the occupied sphere, in world units; nothing exists outside it.
        samples: samples along a ray's chord through the sphere.
        blob_scale: height of the density bias at the centre (DreamFusion's blob).
        blob_radius: radius at which the bias crosses zero, in world units.
        background: colour behind the object, in [0, 1].
    """

    resolutions: tuple[int, ...] = (8, 16, 32)
    radius: float = 0.55
    samples: int = 24
    blob_scale: float = 10.0
    blob_radius: float = 0.5
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be rendered."""
        if not self.resolutions or min(self.resolutions) < 2:
            raise ValueError(
                f"resolutions={self.resolutions!r}: give at least one level of 2 or more voxels"
            )
        for name in ("radius", "samples", "blob_radius"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a positive number")


@dataclass(frozen=True)
class Render:
    """What a batch of rays sees.

    Args:
        rgb: colour over the background. # [batch, 3, height, width], in [0, 1]
        opacity: accumulated alpha. # [batch, 1, height, width], in [0, 1]
        depth: expected distance from the camera, world units. # [batch, 1, height, width]
        normal: expected outward normal, not normalised; None if not asked for.
            # [batch, 3, height, width]
        back_facing: mean over rays of the weight on normals that face away from the camera,
            sum_i w_i max(0, n_i . d)^2 (Ref-NeRF's orientation penalty); None without normals.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None = None
    back_facing: Tensor | None = None


class RadianceField(nn.Module):
    """Density and colour on voxel grids inside a sphere, rendered by alpha compositing.

    Args:
        config: sizes and constants.

    Attributes:
        levels: one grid a resolution, raw density then raw rgb. # each [4, z, y, x]
    """

    blob: Tensor

    def __init__(self, config: FieldConfig | None = None) -> None:
        super().__init__()
        self.config = config or FieldConfig()
        self.levels = nn.ParameterList(
            torch.zeros(4, size, size, size) for size in self.config.resolutions
        )
        finest = self.config.resolutions[-1]
        axis = torch.linspace(-self.config.radius, self.config.radius, finest)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        distance = (x * x + y * y + z * z).sqrt()
        # The density bias of DreamFusion: scale * (1 - r / radius). # [z, y, x]
        blob = self.config.blob_scale * (1.0 - distance / self.config.blob_radius)
        self.register_buffer("blob", blob, persistent=False)

    @property
    def voxel(self) -> float:
        """Edge of a voxel of the finest grid, in world units."""
        return 2.0 * self.config.radius / (self.config.resolutions[-1] - 1)

    def raw_grid(self) -> Tensor:
        """All levels summed on the finest grid, with the density bias.

        Returns:
            raw density, then raw rgb. # [4, z, y, x]
        """
        size = self.config.resolutions[-1]
        *coarse, total = self.levels
        for level in coarse:
            total = total + F.interpolate(
                level[None], size=(size,) * 3, mode="trilinear", align_corners=True
            ).squeeze(0)
        return torch.cat([total[:1] + self.blob, total[1:]])

    def render(
        self, origins: Tensor, directions: Tensor, *, jitter: bool = False, normals: bool = False
    ) -> Render:
        """Composite the field along rays.

        Args:
            origins: where rays start, world units. # [batch, height, width, 3]
            directions: unit vectors. # [batch, height, width, 3]
            jitter: displace each ray's samples by one random fraction of their spacing
                (stratified sampling, for training); else samples sit at the middle of it.
            normals: also composite normals and the orientation penalty.
        """
        batch, height, width = origins.shape[:3]
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
        near, far = self._chord(origins, directions)
        # Drawn for all rays before any is left out, so that a ray's draw does not depend on others.
        offset = torch.rand_like(near) if jitter else torch.full_like(near, 0.5)
        hit = (far > near).nonzero().squeeze(1)
        near, far, offset = near[hit], far[hit], offset[hit]
        directions_hit = directions[hit]

        count = self.config.samples
        delta = (far - near) / count  # [hits]
        index = torch.arange(count, device=near.device, dtype=near.dtype)
        distance = near[:, None] + (index + offset[:, None]) * delta[:, None]  # [hits, samples]
        points = origins[hit, None] + distance[..., None] * directions_hit[:, None]

        raw = self.raw_grid()
        channels = torch.cat([raw, self._normals(raw[0])]) if normals else raw
        values = F.grid_sample(
            channels[None],
            (points / self.config.radius).reshape(1, -1, 1, 1, 3),
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        ).view(channels.shape[0], -1, count)  # [4 or 7, hits, samples]

        optical = F.softplus(values[0]) * delta[:, None]  # [hits, samples]
        before = torch.cumsum(optical, 1) - optical
        weights = torch.exp(-before) * -torch.expm1(-optical)
        opacity = weights.sum(1)  # [hits]
        background = directions.new_tensor(self.config.background)  # [3]
        rgb = (weights * torch.sigmoid(values[1:4])).sum(2).T  # [hits, 3]
        rgb = rgb + (1.0 - opacity)[:, None] * background
        depth = (weights * distance).sum(1)

        def image(hits: Tensor, fill: Tensor | float = 0.0) -> Tensor:
            full = hits.new_zeros(origins.shape[0], hits.shape[1]) + fill
            full = full.index_copy(0, hit, hits)
            return full.view(batch, height, width, -1).permute(0, 3, 1, 2)

        normal = back_facing = None
        if normals:
            direction = values[4:7]  # [3, hits, samples]
            normal = image((weights * direction).sum(2).T)
            away = (direction * directions_hit.T[:, :, None]).sum(0).clamp_min(0.0)
            back_facing = (weights * away.square()).sum() / origins.shape[0]
        return Render(
            rgb=image(rgb, background),
            opacity=image(opacity[:, None]),
            depth=image(depth[:, None]),
            normal=normal,
            back_facing=back_facing,
        )

    def _chord(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Where rays enter and leave the sphere, each [rays]; near = far is a miss."""
        middle = -(origins * directions).sum(1)
        squared = self.config.radius**2 - (origins.square().sum(1) - middle.square())
        half = squared.clamp_min(0.0).sqrt()
        near = (middle - half).clamp_min(0.0)
        return near, torch.maximum(middle + half, near)

    def _normals(self, raw_density: Tensor) -> Tensor:
        """Unit normals at the voxels, down the density's slope: [3 (xyz), z, y, x].

        Central differences of the summed grid; interpolated normals are a little shorter than 1
        where the surface bends.
        """
        density = F.softplus(raw_density)
        padded = F.pad(density[None, None], (1,) * 6, mode="replicate")[0, 0]
        inner = slice(1, -1)
        along_z = padded[:-2, inner, inner] - padded[2:, inner, inner]
        along_y = padded[inner, :-2, inner] - padded[inner, 2:, inner]
        along_x = padded[inner, inner, :-2] - padded[inner, inner, 2:]
        slope = torch.stack([along_x, along_y, along_z]) / (2.0 * self.voxel)
        return F.normalize(slope, dim=0, eps=1e-4)


def save_field(field: RadianceField, path: Path) -> None:
    """Write the field as safetensors, its `FieldConfig` as JSON in the header."""
    tensors = {name: value.detach().cpu() for name, value in field.state_dict().items()}
    save_file(tensors, path, metadata={"field_config": json.dumps(asdict(field.config))})


def load_field(path: Path) -> RadianceField:
    """Read a field that `save_field` wrote.

    Raises:
        ValueError: The file is safetensors, but not a field.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("field_config")
        if text is None:
            raise ValueError(
                f"path={path}: no field_config in its header; give a scene of this package"
            )
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        field = RadianceField(FieldConfig(**values))
        field.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return field
