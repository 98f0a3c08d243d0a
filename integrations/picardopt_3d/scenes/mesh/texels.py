"""Which point of a mesh each texel of its texture shows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped

_PAIRS = 1 << 20  # of a triangle and a texel that are tested at once, to limit memory
_EDGE = (
    1e-6  # by so much a texel's centre may lie outside of both triangles at an edge, for rounding
)


class Texels(NamedTuple):
    """The texels whose centre lies on a triangle, and what is there.

    Attributes:
        place: Row times the texture's size, plus column, ascending, int64, `[count]`.
        face: The triangle, int64, `[count]`.
        barycentric: Weights of its three corners, `[count, 3]`.
    """

    place: Tensor
    face: Tensor
    barycentric: Tensor

    def points(self, triangles: Triangles) -> Tensor:
        """Returns the points of a mesh that the texels show, `[count, 3]`."""
        corners = triangles.vertices[triangles.faces[self.face]]  # [count, 3, 3]
        return (self.barycentric[:, :, None] * corners).sum(1)


def texels_of(unwrapped: Unwrapped, size: int) -> Texels:
    """Finds the texels that show a mesh, on the device of the coordinates.

    Args:
        unwrapped: Where its triangles lie.
        size: Pixels along each edge of the texture.
    """
    corners = unwrapped.coordinates.double()[unwrapped.faces] * size - 0.5  # centres are integers
    low = corners.amin(1).sub(_EDGE).ceil().clamp(0, size - 1).long()  # [faces, 2]
    high = corners.amax(1).add(_EDGE).floor().clamp(0, size - 1).long()
    wide, tall = (high - low + 1).clamp_min(0).unbind(1)
    ends = (wide * tall).cumsum(0)
    face = torch.full((size * size,), -1, device=corners.device)
    weights = corners.new_zeros(size * size, 3)
    start, total = 0, len(corners)
    while start < total:
        before = int(ends[start - 1]) if start else 0
        stop = int(torch.searchsorted(ends, before + _PAIRS, right=True))
        part = torch.arange(start, max(stop, start + 1), device=corners.device)
        _fill(face, weights, corners, part, low, wide, tall, size)
        start = int(part[-1]) + 1
    index = torch.nonzero(face >= 0).squeeze(1)
    return Texels(index, face[index], weights[index].float())


def _fill(
    face: Tensor,
    weights: Tensor,
    corners: Tensor,
    part: Tensor,
    low: Tensor,
    wide: Tensor,
    tall: Tensor,
    size: int,
) -> None:
    """Enters some triangles into the texels that they cover; where two meet, the last one stays."""
    of = torch.repeat_interleave(part, (wide * tall)[part])
    counts = (wide * tall)[part]
    place = torch.arange(len(of), device=of.device)
    place = place - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    column, row = low[of, 0] + place % wide[of], low[of, 1] + place // wide[of]
    a, b, c = corners[of].unbind(1)
    point = torch.stack([column, row], dim=1).to(corners)
    area = _cross(b - a, c - a)
    shares = torch.stack([_cross(b - point, c - point), _cross(c - point, a - point)], dim=1)
    shares = shares / area[:, None]
    shares = torch.cat([shares, 1 - shares.sum(1, keepdim=True)], dim=1)
    inside = (shares >= -_EDGE).all(1) & (area.abs() > 0)
    index = (row * size + column)[inside]
    # `index` may name a texel twice, where writing would leave either: the last triangle wins on every device.
    order = torch.argsort(index, stable=True)
    last = torch.ones_like(order, dtype=torch.bool)
    last[:-1] = index[order][1:] != index[order][:-1]
    chosen = order[last]
    face[index[chosen]] = of[inside][chosen]
    weights[index[chosen]] = shares[inside][chosen]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cross products of vectors in the plane, `[count]`."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def spread(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Returns a whole texture from the values of some texels; each other texel has those of the nearest of them.

    Args:
        values: `[count, channels]`
        index: Row times size, plus column, int64, `[count]`.
        size: Pixels along each edge of the texture.

    Returns:
        `[size, size, channels]`
    """
    from scipy.ndimage import distance_transform_edt

    missing = torch.ones(size * size, dtype=torch.bool)
    missing[index.cpu()] = False
    rows, columns = distance_transform_edt(
        missing.view(size, size).numpy(), return_distances=False, return_indices=True
    )
    nearest = torch.from_numpy(rows).long() * size + torch.from_numpy(columns).long()
    whole = values.new_zeros(size * size, values.shape[1])
    whole[index] = values
    return whole[nearest.to(values.device)]
