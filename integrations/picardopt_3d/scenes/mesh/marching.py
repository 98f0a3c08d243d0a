"""Marching tetrahedra: the triangles in which tetrahedra cross the zero set of a signed distance.

The distance is linear along each edge. Positions are differentiable in the distances and in the grid's vertices; which
triangles there are is not, and follows from the signs alone. The order of vertices and faces does too.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from picardopt_3d.scenes.mesh.screen import take_rows
from picardopt_3d.scenes.mesh.tetrahedra import crossed
from picardopt_3d.scenes.mesh.triangles import Triangles

_LEAST = 1e-6
"""Least difference of the distances at the ends of an edge: below it, their quotient has no useful derivative."""


def march(positions: Tensor, distance: Tensor, resolution: int) -> Triangles:
    """Returns the surface on which a signed distance is 0, closed if no vertex on the grid's border lies inside.

    A vertex of distance 0 lies outside. Points on an edge between two distances that differ by less than 1e-6 lie
    somewhere on it.

    Args:
        positions: Positions of the grid's vertices, `[vertices, 3]`.
        distance: Signed distances at them, negative inside, `[vertices]`.
        resolution: Cells along each edge of the grid.
    """
    inside = distance.detach() < 0
    edges, faces = cut(crossed(inside, resolution), inside)
    within, without = edges[:, 0], edges[:, 1]
    low, high = take_rows(distance, within), take_rows(distance, without)
    part = low / (low - high).clamp_max(-_LEAST)  # 0 at the end inside, 1 at the one outside
    start, end = take_rows(positions, within), take_rows(positions, without)
    return Triangles(start + part[:, None] * (end - start), faces)


@torch.no_grad()
def cut(tetrahedra: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts tetrahedra between their vertices inside and outside.

    Args:
        tetrahedra: The vertices of each, as `crossed` orders them, `[tetrahedra, 4]`.
        inside: Whether each vertex of the grid lies inside, bool, `[vertices]`.

    Returns:
        The edges that are cut, in ascending order, the end inside before the one outside, `[edges, 2]`, and the
        triangles as indices of three edges each, counter-clockwise seen from outside, `[faces, 3]`.
    """
    powers = torch.tensor([1, 2, 4, 8], device=inside.device)
    case = (inside[tetrahedra] * powers).sum(1)
    corners, used = (table.to(inside.device) for table in _cases())
    ends = tetrahedra.gather(1, corners[case].view(-1, 12)).view(-1, 2, 3, 2)
    ends = ends[used[case]]  # [faces, 3, 2]
    count = len(inside)
    edges, faces = torch.unique(ends[..., 0] * count + ends[..., 1], return_inverse=True)
    return torch.stack([edges // count, edges % count], 1), faces


@functools.cache
def _cases() -> tuple[Tensor, Tensor]:
    """Returns the triangles of a tetrahedron by its case: the sum of 2^i over the vertices i that lie inside.

    With one vertex p on its side and the others q, r, s in the order that makes (p, q, r, s) positive, the triangle
    (pq, pr, ps) faces away from p. With p, q inside and r, s outside in such an order, the quadrilateral
    (pr, ps, qs, qr) faces away from p and q.

    Returns:
        The vertices (inside, outside) whose edge holds each corner of up to two triangles, `[16, 2, 3, 2]`, and which
        of the two there are, bool, `[16, 2]`.
    """
    corners = torch.zeros(16, 2, 3, 2, dtype=torch.long)
    used = torch.zeros(16, 2, dtype=torch.bool)
    for p, q, r, s in itertools.permutations(range(4)):
        if not _even(p, q, r, s):
            continue
        within = [(p, r), (p, s), (q, s), (q, r)]
        alone, rest = [(p, q), (p, r), (p, s)], [(q, p), (s, p), (r, p)]
        cases = {
            1 << p: [alone],
            15 - (1 << p): [rest],
            (1 << p) + (1 << q): [within[:3], [within[0], *within[2:]]],
        }
        for case, triangles in cases.items():
            for number, triangle in enumerate(triangles):
                corners[case, number], used[case, number] = torch.tensor(triangle), True
    return corners, used


def _even(*order: int) -> bool:
    """Returns whether a permutation is even."""
    return sum(a > b for a, b in itertools.combinations(order, 2)) % 2 == 0
