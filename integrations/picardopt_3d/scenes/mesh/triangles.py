"""Triangles, as the modules of meshes pass them on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Triangles(NamedTuple):
    """The triangles of a surface.

    Attributes:
        vertices: Positions, world units, `[vertices, 3]`.
        faces: Indices of three vertices each, counter-clockwise seen from outside, int64, `[faces, 3]`.
    """

    vertices: Tensor
    faces: Tensor
