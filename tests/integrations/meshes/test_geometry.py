"""Normals and the losses on surfaces, against their definitions in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from picardopt_3d.scenes.mesh.geometry import (
    face_normals,
    laplacian,
    normal_consistency,
    vertex_normals,
)
from picardopt_3d.scenes.mesh.marching import march
from picardopt_3d.scenes.mesh.triangles import Triangles
from torch import Tensor

from tests.integrations.meshes.test_marching import random_distance, sphere

SIZE = 8


def ball(size: int = SIZE) -> Triangles:
    return march(*sphere(size), size)


def rugged() -> Triangles:
    """A closed surface without any order."""
    positions, _ = sphere(4)
    return march(positions, random_distance(4, 0), 4)


def neighbours(faces: Tensor, count: int) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(count)]
    for a, b, c in faces.tolist():
        found[a] |= {b, c}
        found[b] |= {a, c}
        found[c] |= {a, b}
    return found


def test_normals_point_outward_on_a_sphere() -> None:
    triangles = ball(16)
    outward = torch.nn.functional.normalize(triangles.vertices, dim=1)
    normals = vertex_normals(triangles)
    assert torch.allclose(normals.norm(dim=1), torch.ones(len(normals)).double())
    cosine = (normals * outward).sum(1)
    assert cosine.min() > math.cos(math.radians(12))
    assert cosine.mean() > math.cos(math.radians(3))
    middle = torch.nn.functional.normalize(triangles.vertices[triangles.faces].mean(1), dim=1)
    solid = face_normals(triangles).any(1)
    assert ((face_normals(triangles) * middle).sum(1)[solid] > 0.9).all()


def test_the_losses_are_what_threestudio_defines() -> None:
    """The mean over unique edges, and over vertices of |degree x vertex - sum of neighbours|."""
    triangles = rugged()
    vertices, around = triangles.vertices, neighbours(triangles.faces, len(triangles.vertices))
    normals = vertex_normals(triangles)
    edges = [(i, j) for i, near in enumerate(around) for j in near if i < j]
    expected = sum(1 - float(normals[i] @ normals[j]) for i, j in edges) / len(edges)
    assert float(normal_consistency(triangles)) == pytest.approx(expected)
    assert float(normal_consistency(triangles, normals)) == pytest.approx(expected)
    sums = [len(near) * vertices[i] - vertices[list(near)].sum(0) for i, near in enumerate(around)]
    expected = float(torch.stack(sums).norm(dim=1).mean())
    assert float(laplacian(triangles)) == pytest.approx(expected)


def test_finer_spheres_are_smoother_and_a_plane_has_no_bends() -> None:
    values = [(float(normal_consistency(ball(n))), float(laplacian(ball(n)))) for n in (8, 16)]
    assert values[1][0] < values[0][0] / 2
    assert values[1][1] < values[0][1] / 1.5
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]).double()
    flat = Triangles(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]))
    assert float(normal_consistency(flat)) == 0


def test_gradients_are_those_of_finite_differences() -> None:
    triangles = rugged()
    some = triangles.vertices + 0.02 * torch.randn(
        triangles.vertices.shape, generator=torch.Generator().manual_seed(0)
    )

    def losses(vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved = Triangles(vertices, triangles.faces)
        return normal_consistency(moved), laplacian(moved), face_normals(moved).sum(0)

    assert torch.autograd.gradcheck(losses, some.detach().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_faces_without_an_area_have_no_normal_and_finite_gradients(dtype: torch.dtype) -> None:
    """Two corners in one point, three on a line, three in one point, a vertex without a face."""
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0], [5, 5, 5]])
    vertices = corners.to(dtype).requires_grad_()
    triangles = Triangles(vertices, torch.tensor([[0, 1, 3], [0, 1, 2], [0, 3, 4]]))
    assert not face_normals(triangles).any()
    assert not vertex_normals(triangles).any()
    (normal_consistency(triangles) + laplacian(triangles)).backward()
    assert vertices.grad is not None
    assert vertices.grad.isfinite().all()


def test_no_faces_at_all_cost_nothing() -> None:
    vertices = torch.zeros(0, 3).requires_grad_()
    nothing = Triangles(vertices, torch.zeros(0, 3, dtype=torch.long))
    total = normal_consistency(nothing) + laplacian(nothing)
    total.backward()
    assert float(total.detach()) == 0
