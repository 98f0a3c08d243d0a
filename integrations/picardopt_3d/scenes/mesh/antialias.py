"""Antialiased silhouettes, differentiable in the vertices (Laine et al. 2020, arXiv 2011.03277, section 3.4).

Where two neighbouring pixels show different faces, the surface is followed from the nearer pixel's face towards the
other pixel. If it ends between the two centres in a silhouette, an edge without a second face or one whose two faces
lie on the same side of it as seen, the pixel that the edge cuts takes as much of its neighbour's colour as the edge
uncovers. Steep edges are seen by pixels side by side, flat ones by pixels above each other, so that none is
counted twice. The paper looks at the nearer pixel's own face only; to follow the surface finds the silhouettes of
faces smaller than a pixel too. Faces that have no area as seen are passed over. A face that reaches behind the camera
ends unblended.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from picardopt_3d.scenes.mesh.screen import NEAR, Screen, add_rows, take, take_rows

_MOST_FACES = 64
"""Most faces that are followed from one pixel to the next."""
_ROUNDING = 1 / 16
"""How far behind a pixel's centre its face may seem to end, pixels."""


class _Walk(NamedTuple):
    """Where surfaces have been followed to, one pair of neighbouring pixels a row.

    Attributes:
        first: The first pixel of the pair, left or upper, of all pixels of all views.
        second: The second.
        forward: Whether the nearer pixel is the first.
        points: Index of the first vertex on the screen of the pair's view; see `_sideways`.
        along: Centre of the nearer pixel along the pair, pixels from the picture's middle.
        across: Its centre across the pair.
        face: The face that the walk is on.
        entered: The edge, named by its opposite corner, by which it came there; -1: it began there.
        inner: Index of a vertex on the side of that edge from which it came, if the face has no area; else -1.
    """

    first: Tensor
    second: Tensor
    forward: Tensor
    points: Tensor
    along: Tensor
    across: Tensor
    face: Tensor
    entered: Tensor
    inner: Tensor

    def only(self, rows: Tensor) -> _Walk:
        """Returns some of the rows."""
        return _Walk(*(part.index_select(0, rows) for part in self))


def blend(image: Tensor, face: Tensor, depth: Tensor, screen: Screen, faces: Tensor) -> Tensor:
    """Blends neighbouring pixels across silhouettes.

    Args:
        image: The picture, `[views, height, width, channels]`.
        face: The nearest face at each pixel's centre, -1: none, `[views, height, width]`.
        depth: Its depth there, world units, `[views, height, width]`.
        screen: The vertices on the screens.
        faces: Indices of three vertices each, `[faces, 3]`.
    """
    x, y, depths = _sideways(screen)
    with torch.no_grad():
        seen = depths >= NEAR
        along, across = (torch.where(seen, axis / depths, torch.nan) for axis in (x, y))
        walk = _pairs(face, depth, depths.shape[1])
        cuts, ends = _silhouettes(walk, along.view(-1), across.view(-1), faces)
    points = (ends + cuts.points).reshape(-1)
    x, y, depths = (take(axis.view(-1), points).view(2, -1) for axis in (x, y, depths))
    along, across = x / depths - cuts.along, y / depths - cuts.across
    crossing = along[0] - across[0] * ((along[1] - along[0]) / (across[1] - across[0]))
    share = torch.where(cuts.forward, 0.5, -0.5) - crossing.clamp(-1, 1)
    pixels = image.reshape(-1, image.shape[-1])
    both = take_rows(pixels, torch.cat([cuts.first, cuts.second]))
    step = share[:, None] * (both[len(share) :] - both[: len(share)])
    target = torch.where(share > 0, cuts.first, cuts.second)
    return add_rows(pixels, target, step.to(pixels.dtype)).view(image.shape)


def _sideways(screen: Screen) -> Screen:
    """Returns the points as pairs side by side see them, then as pairs above each other do: `[2 * views, points]`."""
    x, y, depth = screen
    return Screen(torch.cat([x, y]), torch.cat([y, x]), torch.cat([depth, depth]))


def _pairs(face: Tensor, depth: Tensor, points: int) -> _Walk:
    """Returns the pairs of neighbouring pixels with different faces, at the nearer one of each."""
    views, height, width = face.shape
    pixels = torch.arange(face.numel(), device=face.device).view(face.shape)
    walks = []
    for vertical in (0, 1):
        before = [x[:, :-1] if vertical else x[:, :, :-1] for x in (face, depth, pixels)]
        after = [x[:, 1:] if vertical else x[:, :, 1:] for x in (face, depth, pixels)]
        differ = before[0] != after[0]
        one, near, first = (x[differ] for x in before)
        two, far, second = (x[differ] for x in after)
        forward = (two < 0) | ((one >= 0) & (near <= far))
        pixel = torch.where(forward, first, second)
        column = (pixel % width).to(depth.dtype) + (0.5 - 0.5 * width)
        row = (pixel // width % height).to(depth.dtype) + (0.5 - 0.5 * height)
        along, across = (row, column) if vertical else (column, row)
        start = (pixel // (height * width) + vertical * views) * points
        own = torch.where(forward, one, two)
        none = torch.full_like(own, -1)
        walks.append(_Walk(first, second, forward, start, along, across, own, none, none))
    return _Walk(*(torch.cat(parts) for parts in zip(*walks, strict=True)))


def _silhouettes(walk: _Walk, along: Tensor, across: Tensor, faces: Tensor) -> tuple[_Walk, Tensor]:
    """Returns the pairs between whose centres a surface ends, and the two vertices of the edge where it does.

    Args:
        walk: All pairs that may have one.
        along: Places of all vertices on the screen along the pairs, pixels; NaN: not seen, `[2 * views * vertices]`.
        across: Their places across the pairs.
        faces: Indices of three vertices each, `[faces, 3]`.

    Returns:
        The pairs, and indices of vertices, `[2, pairs]`.
    """
    neighbours, corners = adjacent(faces), faces.T.contiguous()
    found = [(walk.only(walk.face[:0]), corners.new_zeros(2, 0))]
    for _ in range(_MOST_FACES):
        if not len(walk.face):
            break
        index = corners.index_select(1, walk.face)  # [3, pairs]
        points = (index + walk.points).view(-1)
        places = [
            axis.index_select(0, points).view(3, -1) - centre
            for axis, centre in ((along, walk.along), (across, walk.across))
        ]
        corner, going = _exits(walk, *places)
        walk, index, corner = walk.only(going), index.index_select(1, going), corner[going]
        edge = torch.stack([(corner + 1) % 3, (corner + 2) % 3])
        x, y = (axis.index_select(1, going) for axis in places)
        link = neighbours.view(-1).index_select(0, 3 * walk.face + corner)
        outer = faces.reshape(-1).index_select(0, link.clamp_min(0))
        (x0, x1), (y0, y1) = x.gather(0, edge), y.gather(0, edge)
        own = index.gather(0, corner[None])[0]
        inner = torch.where(walk.inner < 0, own, walk.inner)
        (x2, y2), (x3, y3) = (
            (along[vertex + walk.points] - walk.along, across[vertex + walk.points] - walk.across)
            for vertex in (inner, outer)
        )
        inner_side = (x1 - x0) * (y2 - y0) - (y1 - y0) * (x2 - x0)
        outer_side = (x1 - x0) * (y3 - y0) - (y1 - y0) * (x3 - x0)
        flat = (outer_side == 0) & (inner_side != 0)  # the next face has no area
        ends = (link < 0) | ((inner_side * outer_side >= 0) & ~flat)
        cut = (ends & ((x1 - x0).abs() <= (y1 - y0).abs())).nonzero().squeeze(-1)
        found.append((walk.only(cut), index.gather(0, edge).index_select(1, cut)))
        on = (~ends).nonzero().squeeze(-1)
        link = link.index_select(0, on)
        inner = torch.where(flat, inner, -1).index_select(0, on)
        walk = walk.only(on)._replace(face=link // 3, entered=link % 3, inner=inner)
    cuts = _Walk(*(torch.cat(parts) for parts in zip(*(x for x, _ in found), strict=True)))
    return cuts, torch.cat([x for _, x in found], dim=1)


def _exits(walk: _Walk, along: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the edge by which each walk leaves its face, and the rows that do so before the other pixel's centre.

    Args:
        walk: The walks.
        along: Where the corners of their faces are along the pairs, pixels from the nearer pixel, `[3, walks]`.
        across: Where they are across the pairs.
    """
    along = torch.where(walk.forward, along, -along)
    above = across >= 0
    distance, corner = torch.full_like(along[0], -torch.inf), torch.zeros_like(walk.face)
    for k in range(3):
        i, j = k - 2, k - 1
        where = along[i] - across[i] * ((along[j] - along[i]) / (across[j] - across[i]))
        further = (above[i] != above[j]) & (walk.entered != k) & (where > distance)
        distance = torch.where(further, where, distance)
        corner = torch.where(further, k, corner)
    whole = along[0] + along[1] + along[2]  # NaN: a corner is not seen
    going = (distance > -_ROUNDING) & (distance <= 1) & ~whole.isnan()
    return corner, going.nonzero().squeeze(-1)


def adjacent(faces: Tensor) -> Tensor:
    """Returns what lies behind each edge of each face.

    Args:
        faces: Indices of three vertices each, `[faces, 3]`.

    Returns:
        For the edge opposite to each corner: 3 times the other face plus the corner of it that is opposite to the edge;
        -1 where the edge has no second face, or more than two. `[faces, 3]`
    """
    if not len(faces):
        return faces.clone()
    one, two = faces.roll(-1, 1).view(-1), faces.roll(-2, 1).view(-1)
    key = torch.minimum(one, two) * (faces.max() + 1) + torch.maximum(one, two)
    key, order = key.sort(stable=True)
    same = functional.pad(key[1:] == key[:-1], (1, 2))  # whether an edge is that before it
    first = (same[1:-1] & ~same[:-2] & ~same[2:]).nonzero().squeeze(-1)
    links = torch.full_like(key, -1)
    links[order[first]], links[order[first + 1]] = order[first + 1], order[first]
    return links.view(-1, 3)
