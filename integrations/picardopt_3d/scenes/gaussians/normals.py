"""Normals of the surface that a picture of depths describes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.cameras import Cameras

_LEAST = 1e-3
"""Opacity below which a pixel has no surface."""


def normals_of_depth(depth: Tensor, opacity: Tensor, cameras: Cameras) -> Tensor:
    """Returns outward normals, weighted by the opacity, `[batch, 3, height, width]`.

    Args:
        depth: Distances from the camera, weighted by the opacity, world units, `[batch, 1, height, width]`.
        opacity: Accumulated alpha, in [0, 1], `[batch, 1, height, width]`.
        cameras: Where the views are taken from.
    """
    height, width = depth.shape[-2:]
    origins, directions = cameras.rays(height, width)
    distance = depth / opacity.clamp_min(_LEAST)
    points = origins.movedim(-1, 1) + distance * directions.movedim(-1, 1)
    points = F.pad(points, (1, 1, 1, 1), mode="replicate")
    across = points[:, :, 1:-1, 2:] - points[:, :, 1:-1, :-2]
    down = points[:, :, 2:, 1:-1] - points[:, :, :-2, 1:-1]
    normal = F.normalize(down.cross(across, dim=1), dim=1, eps=1e-12)
    return normal * opacity * (opacity > _LEAST)
