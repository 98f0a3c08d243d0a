"""A radiance field of a hash encoding and one small network (Instant-NGP in DreamFusion's setting)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picardopt_3d.scenes.field import FieldSample
from picardopt_3d.scenes.hash_field import HashField, HashFieldConfig, central_differences
from picardopt_3d.scenes.networks import Mlp
from picardopt_3d.scenes.volume import cut_out


@dataclass(frozen=True)
class NerfConfig(HashFieldConfig):
    """Configuration of a `NerfField`; the defaults are those of DreamPropeller's release of DreamFusion.

    Attributes:
        blob_scale: Height of the density bias at the center.
        blob_radius: Radius at which the bias crosses zero, world units.
        surface_density: Density at which a mesh is extracted, per world unit.
    """

    blob_scale: float = 10.0
    blob_radius: float = 0.5
    surface_density: float = 10.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        super().__post_init__()
        self._check_positive("blob_radius", "surface_density")


class NerfField(HashField):
    """Density and colour by a network over a hash encoding, inside a sphere, rendered by alpha compositing.

    Args:
        config: The configuration.
    """

    config: NerfConfig

    def __init__(self, config: NerfConfig | None = None) -> None:
        config = config or NerfConfig()
        super().__init__(config)
        self.network = Mlp(self.encoding.width, config.width, config.depth, 4)
        self._build_rest()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by role; "background" is empty if the background is solid."""
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
        """Returns values that are positive inside the surface; see `Field.level_set`."""
        raw = self._evaluate(points, None, False)[0][0]
        return cut_out(raw, self.config.surface_density, self.radius - points.norm(dim=1))

    def _evaluate(
        self, points: Tensor, step: int | None, normals: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns raw density (with its bias) and raw colour, `[4, count]`, and unit normals, `[3, count]`, or None."""
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
        """Adds the density bias scale (1 - r / radius) (Magic3D, section 4.1)."""
        config = self.config
        blob = config.blob_scale * (1.0 - points.norm(dim=1) / config.blob_radius)
        return torch.cat([raw[:1] + blob, raw[1:]])

    def _difference(self, points: Tensor, step: int | None) -> Tensor:
        """Returns unit normals from central differences of the raw density, `[3, count]`."""

        def density(points: Tensor) -> Tensor:
            return self._with_blob(points, self.network(self.encoding(points, step)[0]))[0]

        size = self.config.normal_step
        ahead, back = central_differences(density, points, size)
        return F.normalize(back - ahead, dim=0, eps=2e-6 * size)
