"""Antialiased silhouettes, differentiable in the vertices (Laine et al. 2020, arXiv 2011.03277, section 3.4).

Where two neighbouring pixels show different faces, the surface is followed from the nearer pixel's face towards the
other pixel. If it ends between the two centres in a silhouette, an edge without a second face or one whose two faces
lie on the same side of it as seen, the pixel that the edge cuts takes as much of its neighbour's colour as the edge
uncovers. Steep edges are seen by pixels side by side, flat ones by pixels above each other, so that none is
counted twice. The paper looks at the nearer pixel's own face only; to follow the surface finds the silhouettes of
faces smaller than a pixel too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from picardopt_3d.scenes.mesh.screen import NEAR, Screen, take

_MOST_FACES = 16
"""Most faces that are followed from one pixel to the next."""


class _Cuts(NamedTuple):
    """Silhouettes between neighbouring pixels, one a row.

    Attributes:
        pair: Index of the pair; that of its first pixel (left, upper).
        view: Index of the view.
        ends: Indices of the two vertices of the edge. [2, rows]
        centre: Centre of the nearer pixel, along the pair and across it, pixels from the picture's middle. [2, rows]
        way: 1 where the nearer pixel is the first of the pair, else -1.
    """

    pair: Tensor
    view: Tensor
    ends: Tensor
    centre: Tensor
    way: Tensor


def blend(image: Tensor, face: Tensor, depth: Tensor, screen: Screen, faces: Tensor) -> Tensor:
    """Blends neighbouring pixels across silhouettes.

    Args:
        image: The picture, `[views, height, width, channels]`.
        face: The nearest face at each pixel's centre, -1: none, `[views, height, width]`.
        depth: Its depth there, world units, `[views, height, width]`.
        screen: The vertices on the screens.
        faces: Indices of three vertices each, `[faces, 3]`.
    """
    neighbours = adjacent(faces)
    blended = image
    for vertical in (False, True):
        # Along a pair of pixels is the last dimension.
        face_, depth_, image_ = (x.transpose(1, 2) if vertical else x for x in (face, depth, image))
        screen_ = Screen(screen.y, screen.x, screen.depth) if vertical else screen
        cuts = _cuts(face_, depth_, screen_, faces, neighbours)
        share = _shares(cuts, screen_, face_)[..., None]
        step = share * (image_[:, :, 1:] - image_[:, :, :-1])
        first = functional.pad(torch.where(share > 0, step, 0.0), (0, 0, 0, 1))
        second = functional.pad(torch.where(share < 0, step, 0.0), (0, 0, 1, 0))
        change = first + second
        blended = blended + (change.transpose(1, 2) if vertical else change)
    return blended


def _shares(cuts: _Cuts, screen: Screen, face: Tensor) -> Tensor:
    """Returns which share of the step between its pixels a pair takes; its first pixel if positive, else its second."""
    views, rows, columns = face.shape
    index = (cuts.ends + cuts.view * screen.depth.shape[1]).reshape(-1)
    x, y, depth = (take(axis.reshape(-1), index).view(2, -1) for axis in screen)
    along, across = x / depth - cuts.centre[0], y / depth - cuts.centre[1]
    crossing = along[0] - across[0] * ((along[1] - along[0]) / (across[1] - across[0]))
    share = cuts.way * 0.5 - crossing.clamp(-1, 1)
    empty = share.new_zeros(views * rows * (columns - 1))
    return empty.index_copy(0, cuts.pair, share).view(views, rows, columns - 1)


@torch.no_grad()
def _cuts(face: Tensor, depth: Tensor, screen: Screen, faces: Tensor, neighbours: Tensor) -> _Cuts:
    """Finds the silhouettes between pixels that neighbour along the last dimension."""
    _, rows, columns = face.shape
    one, two = face[:, :, :-1], face[:, :, 1:]
    first = (two < 0) | ((one >= 0) & (depth[:, :, :-1] <= depth[:, :, 1:]))
    view, row, column = (one != two).nonzero(as_tuple=True)
    first = first[view, row, column]
    at = torch.where(first, one[view, row, column], two[view, row, column])
    pair = (view * rows + row) * (columns - 1) + column
    way = torch.where(first, 1.0, -1.0).to(screen.depth.dtype)
    centre = torch.stack([column + ~first + 0.5 - 0.5 * columns, row + 0.5 - 0.5 * rows])
    walk = _Walk(pair, view, centre.to(way), way, at, torch.full_like(at, -1))
    found = []
    for _ in range(_MOST_FACES):
        if not len(walk.pair):
            break
        cuts, walk = _next_edges(walk, screen, faces, neighbours)
        found.append(cuts)
    if not found:
        none = pair[:0]
        return _Cuts(none, none, none.new_zeros(2, 0), centre[:, :0].to(way), way[:0])
    return _Cuts(*(torch.cat([getattr(x, name) for x in found], -1) for name in _Cuts._fields))


class _Walk(NamedTuple):
    """Where the surface has been followed to, one pair of pixels a row.

    Attributes:
        pair: As in `_Cuts`.
        view: As in `_Cuts`.
        centre: As in `_Cuts`.
        way: As in `_Cuts`.
        face: The face that the walk is on.
        entered: The edge (by its opposite corner, 0 to 2) by which it came there; -1: it began there.
    """

    pair: Tensor
    view: Tensor
    centre: Tensor
    way: Tensor
    face: Tensor
    entered: Tensor


def _next_edges(
    walk: _Walk, screen: Screen, faces: Tensor, neighbours: Tensor
) -> tuple[_Cuts, _Walk]:
    """Returns the silhouettes by which walks leave their faces, and the walks that go on to another face."""
    count = screen.depth.shape[1]
    index = faces[walk.face].T  # [3, pairs]
    flat = (index + walk.view * count).reshape(-1)
    corners = torch.stack([axis.reshape(-1)[flat].view(3, -1) for axis in screen])  # [3, 3, pairs]
    along = walk.way * (corners[0] / corners[2] - walk.centre[0])
    across = corners[1] / corners[2] - walk.centre[1]
    above = across >= 0
    far = []
    for k in range(3):  # the corner opposite to the edge
        i, j = k - 2, k - 1
        where = along[i] - across[i] * ((along[j] - along[i]) / (across[j] - across[i]))
        leaves = (above[i] != above[j]) & (walk.entered != k)
        far.append(torch.where(leaves, where, -torch.inf))
    distance, corner = torch.stack(far).max(0)
    # The pixel's centre lies on the first face, so that its far edge is ahead, but for rounding.
    going = (distance > -0.0625) & (distance <= 1) & (corners[2] >= NEAR).all(0)
    rows = going.nonzero().squeeze(-1)
    distance, corner = distance[rows], corner[rows]
    walk = _Walk(*(x[..., rows] for x in walk))
    index, corners = index[:, rows], corners[..., rows]
    along, across = along[:, rows], across[:, rows]
    order = (corner + torch.arange(3, device=corner.device)[:, None]) % 3  # opposite corner first
    index = index.gather(0, order)
    corners = corners.gather(1, order.expand(3, -1, -1))
    link = neighbours[walk.face, corner]  # 3 * face + corner there, -1: none
    other = faces.reshape(-1)[link.clamp_min(0)] + walk.view * count
    outer = torch.stack([axis.reshape(-1)[other] for axis in screen])  # [3, pairs]
    folds = _side(corners, corners[:, 0]) * _side(corners, outer) >= 0
    silhouette = (link < 0) | folds
    steep = (
        along.gather(0, order[1:]).diff(dim=0).abs()
        <= across.gather(0, order[1:]).diff(dim=0).abs()
    )[0]
    cut = (silhouette & steep).nonzero().squeeze(-1)
    on = (~silhouette).nonzero().squeeze(-1)
    cuts = _Cuts(walk.pair[cut], walk.view[cut], index[1:, cut], walk.centre[:, cut], walk.way[cut])
    target = link[on]
    on_walk = _Walk(*(x[..., on] for x in walk))
    return cuts, on_walk._replace(face=target // 3, entered=target % 3)


def _side(corners: Tensor, point: Tensor) -> Tensor:
    """Returns on which side of an edge a point is seen, as a sign: 1, 0 or -1.

    Args:
        corners: x, y and depth of a face's corners, the edge's ends second and third, `[3, 3, pairs]`.
        point: x, y and depth of the point, `[3, pairs]`.
    """
    start, edge, away = corners[:, 1], corners[:, 2] - corners[:, 1], point - corners[:, 1]
    normal = torch.linalg.cross(edge, away, dim=0)
    volume: Tensor = start[0] * normal[0] + start[1] * normal[1] + start[2] * normal[2]
    return volume.sign()


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
    ends = torch.stack([faces.roll(-1, 1), faces.roll(-2, 1)], dim=-1).view(-1, 2)
    low, high = ends.amin(-1), ends.amax(-1)
    key, order = (low * (high.max() + 1) + high).sort(stable=True)
    same = functional.pad(key[1:] == key[:-1], (1, 1))  # [edges + 1]: as the one before
    first = same[1:] & ~same[:-1] & ~functional.pad(same[2:], (0, 1))
    first = first.nonzero().squeeze(-1)
    links = torch.full_like(key, -1)
    links[order[first]], links[order[first + 1]] = order[first + 1], order[first]
    return links.view(-1, 3)
