"""A regular grid of tetrahedra that fills a cube: the body-centred cubic lattice.

Its vertices are the corners and the centres of cubic cells. Two neighbouring centres and an edge of the face between
them are a tetrahedron. All of these are congruent, as close to regular as tetrahedra that fill space get (edges of 1
and 0.87 cells), and mirror images of each other along all axes. Cubes cut into six tetrahedra along a diagonal need as
many tetrahedra per vertex, but their edges, up to 1.73 cells, prefer that diagonal, and so would the surface. No table
of tetrahedra is kept: those that a surface crosses follow from the signs at the vertices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def vertex_count(resolution: int) -> int:
    """Returns the number of vertices of a grid with so many cells along each edge."""
    return int((resolution + 1) ** 3 + resolution**3)


def lattice(resolution: int) -> Tensor:
    """Returns the positions of the grid's vertices, in cells from the centre of the cube.

    Args:
        resolution: Cells along each edge of the cube.

    Returns:
        The corners of the cells, indexed x, y, z, then their centres, `[vertices, 3]`.
    """
    corners = torch.arange(resolution + 1) - resolution / 2
    centres = corners[:-1] + 0.5
    return torch.cat([torch.cartesian_prod(axis, axis, axis) for axis in (corners, centres)])


def border(resolution: int) -> Tensor:
    """Returns which vertices lie on the border of what the tetrahedra fill, `[vertices]`.

    These are all corners on the faces of the cube, and the centres of the cells there: the space between a face and
    the centres below it is left out.
    """
    cells = lattice(resolution)
    return cells.abs().amax(1) > resolution / 2 - 1 + 0.25


@torch.no_grad()
def crossed(inside: Tensor, resolution: int) -> Tensor:
    """Returns the tetrahedra that have vertices on both sides of a surface.

    Args:
        inside: Whether each vertex lies inside, bool, `[vertices]`.
        resolution: Cells along each edge of the cube.

    Returns:
        The vertices of each tetrahedron (a, b, c, d), with det(b - a, c - a, d - a) > 0, int64, `[tetrahedra, 4]`.
    """
    n, first_centre = resolution, (resolution + 1) ** 3
    corners = inside[:first_centre].view(n + 1, n + 1, n + 1)
    centres = inside[first_centre:].view(n, n, n)
    found = []
    for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        # Faces between two cells along the first of the axes, each with the ring of its corners.
        across, below = corners.permute(axes)[1:-1], centres.permute(axes)
        ring = [across[:, :-1, :-1], across[:, 1:, :-1], across[:, 1:, 1:], across[:, :-1, 1:]]
        sides = [*ring, below[:-1], below[1:]]
        some, every = sides[0].clone(), sides[0].clone()
        for side in sides[1:]:
            some |= side
            every &= side
        places = (some & ~every).nonzero()  # [faces, 3], along the permuted axes
        step = [((n + 1) ** 2, n + 1, 1)[axis] for axis in axes]
        cell = [(n**2, n, 1)[axis] for axis in axes]
        # Not by @, which CUDA has not for whole numbers.
        corner = (places * places.new_tensor(step)).sum(-1) + step[0]
        centre = (places * places.new_tensor(cell)).sum(-1) + first_centre
        around = corner[:, None] + places.new_tensor(
            [0, step[1], step[1] + step[2], step[2]]
        )  # [faces, 4]
        both = torch.stack([centre, centre + cell[0]], 1)[:, None].expand(-1, 4, -1)
        edges = torch.stack([around, around.roll(-1, 1)], 2)  # [faces, 4, 2]
        found.append(torch.cat([both, edges], 2).view(-1, 4))
    tetrahedra = torch.cat(found)
    count = inside[tetrahedra].sum(1)
    return tetrahedra[(count > 0) & (count < 4)]


@torch.no_grad()
def enclosed(inside: Tensor, resolution: int) -> Tensor:
    """Returns which vertices lie inside, or in a hole that edges through the outside do not lead out of.

    Args:
        inside: Whether each vertex lies inside, bool, `[vertices]`.
        resolution: Cells along each edge of the cube.

    Returns:
        Bool, `[vertices]`. What lies on the border is in no hole.
    """
    free, reached = ~inside, border(resolution).to(inside.device) & ~inside
    count = -1
    while count != (count := int(reached.sum())):
        reached = _spread(reached, resolution) & free
    return ~reached


def _spread(some: Tensor, n: int) -> Tensor:
    """Returns some vertices with their neighbours on the edges of tetrahedra, `[vertices]`."""
    corners, centres = some.split([(n + 1) ** 3, n**3])
    corners, centres = corners.view((n + 1,) * 3), centres.view((n,) * 3)
    wide_corners, wide_centres = corners.clone(), centres.clone()
    for axis in range(3):
        for before, after in ((corners, wide_corners), (centres, wide_centres)):
            size = before.shape[axis] - 1
            after.narrow(axis, 1, size).logical_or_(before.narrow(axis, 0, size))
            after.narrow(axis, 0, size).logical_or_(before.narrow(axis, 1, size))
    for x in (0, 1):
        for y in (0, 1):
            for z in (0, 1):
                cell = (slice(x, x + n), slice(y, y + n), slice(z, z + n))
                wide_corners[cell] |= centres
                wide_centres |= corners[cell]
    return torch.cat([wide_corners.view(-1), wide_centres.view(-1)])
