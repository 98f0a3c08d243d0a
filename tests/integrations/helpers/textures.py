"""Meshes with textures that tests know, and processes that unwrap."""

from __future__ import annotations

import math

import torch
from picardopt_3d.scenes.mesh.extract import extract_triangles
from picardopt_3d.scenes.mesh.triangles import Triangles
from torch import Tensor

from tests.integrations.helpers.analytic import Balls


def ball(resolution: int = 20, faces: int | None = None) -> Triangles:
    """A ball of radius 0.4 about the origin."""
    return extract_triangles(Balls().surface(), resolution, faces=faces)


def bumpy(rows: int) -> Triangles:
    """A bumpy ball of 4 * rows^2 triangles, open at the poles, that takes long to unwrap."""
    up = torch.linspace(0.05, math.pi - 0.05, rows + 1)
    around = torch.arange(2 * rows) * (math.pi / rows)
    up, around = up[:, None].expand(-1, 2 * rows), around[None].expand(rows + 1, -1)
    radius = 0.4 + 0.03 * torch.sin(9 * around) * torch.sin(7 * up)
    axes = [up.sin() * around.cos(), up.sin() * around.sin(), up.cos()]
    vertices = torch.stack([radius * axis for axis in axes], dim=-1).view(-1, 3)
    here = torch.arange(rows)[:, None] * 2 * rows + torch.arange(2 * rows)[None]
    right = torch.arange(rows)[:, None] * 2 * rows + (torch.arange(2 * rows)[None] + 1) % (2 * rows)
    below, across = here + 2 * rows, right + 2 * rows
    faces = torch.stack([here, below, right, right, below, across], dim=-1).view(-1, 3)
    return Triangles(vertices, faces)


def charts(faces: Tensor) -> Tensor:
    """The chart of each triangle: those that share texture coordinates, by their least coordinate. # [faces]"""
    chart = torch.arange(int(faces.max()) + 1)
    while True:
        least = chart[faces].amin(1)
        after = chart.clone()
        for corner in faces.unbind(1):
            after.scatter_reduce_(0, corner, least, "amin")
        if torch.equal(after, chart):
            return least
        chart = after
