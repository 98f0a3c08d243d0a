"""The nearest triangle at each pixel's centre, in plain torch.

Edge functions are evaluated in homogeneous coordinates (Olano and Greer, "Triangle scan conversion using 2D homogeneous
coordinates", 1997), so that a triangle that reaches behind the camera needs no clipping: what is nearer than `NEAR` is
cut off pixel by pixel. Both sides of a triangle are drawn.

A mesh without holes has none in its picture: an edge function is antisymmetric in the edge's two ends to the last
bit, its sign is right or zero (rounding is monotonic), and a pixel on an edge belongs to the faces on both sides; the
nearest of them is taken, and of several at one depth the one with the lowest index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from picardopt_3d.scenes.mesh.screen import NEAR, Screen, take

_PAIRS = 1 << 18
"""Most pairs of a face and a pixel that are looked at in one piece."""
_CORNERS = 1 << 20
"""Most faces of all views whose boxes are found in one piece, unless one view has more."""
_SLACK = 0.01
"""By how much a box is larger than its face, pixels, against rounding."""


class _Boxes(NamedTuple):
    """Faces that may cover a pixel's centre, one a row.

    Attributes:
        corners: x, y and depth of the three corners on the screen. [3 (coordinate), 3 (corner), rows]
        face: Index of the face. [rows]
        view: Index of the view. [rows]
        left: First column of its box. [rows]
        top: First row of its box. [rows]
        wide: Columns of its box. [rows]
        pixels: Pixels of its box, at least one. [rows]
    """

    corners: Tensor
    face: Tensor
    view: Tensor
    left: Tensor
    top: Tensor
    wide: Tensor
    pixels: Tensor


@torch.no_grad()
def nearest_faces(screen: Screen, faces: Tensor, height: int, width: int) -> Tensor:
    """Returns the nearest face at each pixel's centre, -1 where there is none: int64, `[views, height, width]`.

    Args:
        screen: The vertices on the screens.
        faces: Indices of three vertices each, `[faces, 3]`.
        height: Rows of pixels.
        width: Columns of pixels.
    """
    views, none = len(screen.depth), len(faces)
    nearest = faces.new_full((views * height * width,), none)
    depth = screen.depth.new_full(nearest.shape, torch.inf)
    step = max(1, _CORNERS // max(1, len(faces)))
    for first in range(0, views, step):
        some = Screen(*(axis[first : first + step] for axis in screen))
        boxes = _boxes(some, faces, first, height, width)
        for pixel, face, far in _hits(boxes, height, width):
            _draw(nearest, depth, pixel, face, far, none)
    nearest[nearest == none] = -1
    return nearest.view(views, height, width)


def _draw(
    nearest: Tensor, depth: Tensor, pixel: Tensor, face: Tensor, far: Tensor, none: int
) -> None:
    """Draws hits into the buffers of depths and faces; their order does not matter."""
    before = depth[pixel]
    depth.scatter_reduce_(0, pixel, far, "amin")
    now = depth[pixel]
    nearest.index_fill_(0, pixel[now < before], none)
    first = far == now
    nearest.scatter_reduce_(0, pixel[first], face[first], "amin")


def _boxes(screen: Screen, faces: Tensor, first: int, height: int, width: int) -> _Boxes:
    """Returns the boxes of the faces that may be seen; views are counted from `first`."""
    order = faces.T.reshape(-1)
    x, y, depth = (axis.index_select(1, order).view(len(axis), 3, -1) for axis in screen)
    least, most = _extremes(*depth.unbind(1))  # [views, faces]
    sides = [*_extremes(*(x / depth).unbind(1)), *_extremes(*(y / depth).unbind(1))]
    crossing = (least < NEAR) & (most >= NEAR)
    if bool(crossing.any()):
        cut = _cut(*(axis.transpose(1, 2)[crossing].T for axis in (x, y, depth)))
        sides = [side.masked_scatter(crossing, new) for side, new in zip(sides, cut, strict=True)]
    left, wide = _span(sides[0], sides[1], width)
    top, high = _span(sides[2], sides[3], height)
    pixels = torch.where(most >= NEAR, wide * high, 0).view(-1)
    place = pixels.nonzero().squeeze(-1)
    view, face = place // max(1, len(faces)), place % max(1, len(faces))
    corners = torch.stack([x, y, depth])[:, view, :, face].permute(1, 2, 0).contiguous()
    boxes = (side.view(-1).index_select(0, place) for side in (left, top, wide, pixels))
    return _Boxes(corners, face, view + first, *boxes)


def _span(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the first pixel whose centre lies in an interval, and how many there are."""
    first = (low + (0.5 * size - 0.5 - _SLACK)).ceil().clamp(0, size)
    last = (high + (0.5 * size - 0.5 + _SLACK)).floor().clamp(-1, size - 1)
    return first.long(), (last - first + 1).clamp_min(0).long()


def _cut(x: Tensor, y: Tensor, depth: Tensor) -> list[Tensor]:
    """Returns the boxes around what lies beyond the near plane of faces that cross it.

    Args:
        x: Columns times depths of the corners, `[3, faces]`.
        y: Rows times depths.
        depth: Depths.

    Returns:
        Least and greatest column, then row, `[faces]` each.
    """
    after = depth.roll(-1, dims=0)
    part = (NEAR - depth) / (after - depth)  # where an edge meets the plane
    seen = torch.cat([depth >= NEAR, (depth < NEAR) != (after < NEAR)])  # [6, faces]
    sides = []
    for axis in (x, y):
        points = torch.cat([axis / depth, (axis + part * (axis.roll(-1, dims=0) - axis)) / NEAR])
        # One pixel more: divided by a depth so small, rounding is larger.
        sides.append(torch.where(seen, points, torch.inf).amin(0) - 1)
        sides.append(torch.where(seen, points, -torch.inf).amax(0) + 1)
    return sides


def _hits(boxes: _Boxes, height: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (pixel, face, depth) of the pixels whose centres faces cover, a bounded number at a time."""
    ends = boxes.pixels.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    for begin in range(0, total, _PAIRS):
        end = min(begin + _PAIRS, total)
        bounds = torch.searchsorted(ends, ends.new_tensor([begin, end - 1]), right=True).tolist()
        rows = slice(bounds[0], bounds[1] + 1)
        some, until = _Boxes(boxes.corners[..., rows], *(x[rows] for x in boxes[1:])), ends[rows]
        since = until - some.pixels
        owner = torch.arange(len(until), device=ends.device).repeat_interleave(
            until.clamp_max(end) - since.clamp_min(begin), output_size=end - begin
        )
        place = torch.arange(begin, end, device=ends.device) - since.index_select(0, owner)
        wide = some.wide.index_select(0, owner)
        down = place // wide
        row = some.top.index_select(0, owner) + down
        column = some.left.index_select(0, owner) + (place - down * wide)
        corners = some.corners.flatten(0, 1).index_select(1, owner).unflatten(0, (3, 3))
        edges = edge_functions(corners, row, column, height, width)
        least, most = _extremes(*edges)
        area = edges[0] + edges[1] + edges[2]
        hit = (((least >= 0) | (most <= 0)) & drawn(area)).nonzero().squeeze(-1)
        area, owner, row, column = (x.index_select(0, hit) for x in (area, owner, row, column))
        e, w = ([x.index_select(0, hit) for x in each] for each in (edges, corners[2]))
        far = (e[0] * w[0] + e[1] * w[1] + e[2] * w[2]) / area
        pixel = (some.view.index_select(0, owner) * height + row) * width + column
        seen = far >= NEAR
        yield pixel[seen], some.face.index_select(0, owner)[seen], far[seen]


def _extremes(one: Tensor, two: Tensor, three: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the least and the greatest of three values."""
    return (
        torch.minimum(torch.minimum(one, two), three),
        torch.maximum(torch.maximum(one, two), three),
    )


def edge_functions(
    corners: Tensor, row: Tensor, column: Tensor, height: int, width: int
) -> tuple[Tensor, ...]:
    """Returns what is proportional to the perspective-correct weights of a face's corners at a pixel's centre.

    Args:
        corners: x, y and depth of the three corners on the screen, `[3 (coordinate), 3 (corner), pairs]`.
        row: Rows of the pixels, `[pairs]`.
        column: Their columns, `[pairs]`.
        height: Rows of the picture.
        width: Columns of the picture.

    Returns:
        One value a corner, all of one sign where the pixel lies in the face: three times `[pairs]`.
    """
    x = corners[0] - corners[2] * (column + (0.5 - 0.5 * width))
    y = corners[1] - corners[2] * (row + (0.5 - 0.5 * height))
    return tuple(x[i - 2] * y[i - 1] - x[i - 1] * y[i - 2] for i in range(3))


def drawn(area: Tensor) -> Tensor:
    """Returns whether a face's area, as seen, is large enough to divide by."""
    return area.abs() > torch.finfo(area.dtype).tiny * 1e8


def weights(screen: Screen, faces: Tensor, nearest: Tensor) -> Tensor:
    """Returns the perspective-correct weights of the corners of the nearest faces, differentiable in the vertices.

    Args:
        screen: The vertices on the screens.
        faces: Indices of three vertices each, `[faces, 3]`.
        nearest: The nearest face at each pixel's centre, -1: none, `[views, height, width]`.

    Returns:
        0 where there is no face: `[views, height, width, 3]`.
    """
    height, width = nearest.shape[1:]
    view, row, column = (nearest >= 0).nonzero(as_tuple=True)
    index = faces[nearest[view, row, column]].T  # [3, pixels]
    index = (index + view * screen.depth.shape[1]).reshape(-1)
    corners = torch.stack([take(axis.reshape(-1), index).view(3, -1) for axis in screen])
    edges = edge_functions(corners, row, column, height, width)
    shares = torch.stack(edges) / (edges[0] + edges[1] + edges[2])
    place = (view * height + row) * width + column
    empty = shares.new_zeros(nearest.numel(), 3)
    return empty.index_copy(0, place, shares.T).view(*nearest.shape, 3)
