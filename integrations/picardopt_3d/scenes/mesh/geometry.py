"""Normals of triangles, and the losses that keep a surface smooth.

The losses are threestudio's. They go over the edges of the faces: an edge inside a surface belongs to two faces, one at
the border of an open surface to one, which counts half as much. No thread changes the order of a sum, gradients' too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from picardopt_3d.scenes.mesh.screen import add_rows, take_rows
from picardopt_3d.scenes.mesh.triangles import Triangles

_SMALL = 1e-20
"""Squared length below which a vector has no direction, and no gradient flows through its length."""


def face_normals(triangles: Triangles) -> Tensor:
    """Returns the outward unit normals of the faces, 0 for faces without an area, `[faces, 3]`."""
    return unit(_areas(triangles))


def vertex_normals(triangles: Triangles) -> Tensor:
    """Returns outward unit normals at the vertices: those of the faces around, weighted by area, `[vertices, 3]`.

    A vertex whose faces have no area, or none that does not cancel, has the normal 0.
    """
    areas = _areas(triangles)
    sums = torch.zeros_like(triangles.vertices)
    for corner in triangles.faces.unbind(1):
        sums = add_rows(sums, corner, areas)
    return unit(sums)


def normal_consistency(triangles: Triangles, normals: Tensor | None = None) -> Tensor:
    """Returns the mean over edges of 1 - the cosine between the normals at both ends, a scalar; 0 without faces.

    Args:
        triangles: The surface.
        normals: Its `vertex_normals`; None: they are computed.
    """
    normals = vertex_normals(triangles) if normals is None else normals
    start, end = _edges(triangles.faces)
    cosine = (take_rows(normals, start) * take_rows(normals, end)).sum(1)
    return (1 - cosine).sum() / max(1, len(start))


def laplacian(triangles: Triangles) -> Tensor:
    """Returns the mean over vertices of |sum over neighbours (vertex - neighbour)|, world units; 0 without vertices."""
    vertices = triangles.vertices
    start, end = _edges(triangles.faces)
    along = 0.5 * (take_rows(vertices, start) - take_rows(vertices, end))
    sums = add_rows(add_rows(torch.zeros_like(vertices), start, along), end, -along)
    return length(sums).sum() / max(1, len(vertices))


def unit(vectors: Tensor) -> Tensor:
    """Returns vectors `[..., 3]` with length 1, or 0 (and no gradient) where they are too short for a direction."""
    squared = vectors.square().sum(-1, keepdim=True)
    long = squared > _SMALL
    return torch.where(long, vectors * torch.where(long, squared, 1.0).rsqrt(), 0.0)


def length(vectors: Tensor) -> Tensor:
    """Returns the lengths of vectors `[..., 3]`, 0 (and no gradient) where they are very short, `[...]`."""
    squared = vectors.square().sum(-1)
    long = squared > _SMALL
    return torch.where(long, torch.where(long, squared, 1.0).sqrt(), 0.0)


def _areas(triangles: Triangles) -> Tensor:
    """Returns normals as long as twice the area of each face, `[faces, 3]`."""
    a, b, c = (take_rows(triangles.vertices, corner) for corner in triangles.faces.unbind(1))
    areas: Tensor = torch.linalg.cross(b - a, c - a)
    return areas


def _edges(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both ends of the three edges of each face, each `[3 faces]`."""
    return faces.reshape(-1), faces.roll(-1, 1).reshape(-1)
