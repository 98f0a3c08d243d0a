"""The grid of tetrahedra and the triangles in it: closed, oriented, on the zero set, differentiable."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picardopt_3d.scenes.mesh.marching import cut, march
from picardopt_3d.scenes.mesh.tetrahedra import border, crossed, enclosed, lattice, vertex_count
from picardopt_3d.scenes.mesh.triangles import Triangles
from torch import Tensor

SIZES = st.integers(2, 6)
SEEDS = st.integers(0, 2**31)


def everything(resolution: int) -> Tensor:
    """All tetrahedra: those around each vertex that is inside alone."""
    count = vertex_count(resolution)
    found = [crossed(torch.arange(count) == vertex, resolution) for vertex in range(count)]
    return torch.cat(found).sort(1).values.unique(dim=0)


def random_distance(resolution: int, seed: int, zeros: float = 0.0) -> Tensor:
    """Distances without any order, positive on the border; some are 0, and many are equal."""
    draws = torch.Generator().manual_seed(seed)
    distance = torch.randn(vertex_count(resolution), generator=draws, dtype=torch.float64)
    if zeros:
        distance = (2 * distance).round() / 2
        distance[torch.rand(len(distance), generator=draws) < zeros] = 0.0
    return torch.where(border(resolution), distance.abs(), distance)


def half_edges(faces: Tensor) -> Tensor:
    return torch.stack([faces, faces.roll(-1, 1)], 2).view(-1, 2)


def assert_closed(triangles: Triangles) -> None:
    """Each edge is in two faces, once in each direction; no vertex is left over."""
    vertices, faces = triangles
    edges = half_edges(faces)
    forth, back = (
        edges[:, 0] * len(vertices) + edges[:, 1],
        edges[:, 1] * len(vertices) + edges[:, 0],
    )
    assert len(forth.unique()) == len(forth)
    assert torch.equal(forth.sort().values, back.sort().values)
    assert torch.equal(faces.unique(), torch.arange(len(vertices)))


def volume(triangles: Triangles) -> Tensor:
    """Volume inside, positive if faces are counter-clockwise seen from outside."""
    a, b, c = triangles.vertices[triangles.faces].unbind(1)
    return (torch.linalg.cross(a, b) * c).sum() / 6


def euler(triangles: Triangles) -> int:
    return len(triangles.vertices) - len(half_edges(triangles.faces)) // 2 + len(triangles.faces)


def sphere(resolution: int, radius: float = 0.4, centre: float = 0.0) -> tuple[Tensor, Tensor]:
    """Positions in a cube of half-edge 0.6, and distances from a sphere."""
    positions = lattice(resolution).double() * (1.2 / resolution)
    return positions, (positions - centre).norm(dim=1) - radius


@pytest.mark.parametrize("resolution", [2, 3, 4])
def test_the_tetrahedra_fill_the_grid_once_and_agree_on_their_faces(resolution: int) -> None:
    n, places = resolution, lattice(resolution).double()
    tetrahedra = everything(n)
    assert len(tetrahedra) == 4 * 3 * n * n * (n - 1)
    corners = places[tetrahedra]
    sides = corners[:, 1:] - corners[:, :1]
    volumes = torch.linalg.det(sides).abs() / 6
    assert torch.allclose(volumes, torch.full_like(volumes, 1 / 12))  # all alike
    pyramids = 6 * n * n / 6  # one is left out on each face of the cube's cells
    assert math.isclose(float(volumes.sum()), n**3 - pyramids)
    faces = torch.cat([tetrahedra[:, [j for j in range(4) if j != i]] for i in range(4)])
    faces, times = faces.unique(dim=0, return_counts=True)
    assert set(times.tolist()) == {1, 2}
    on_border = border(n)
    assert on_border[faces[times == 1]].all()
    assert (times[~on_border[faces].all(1)] == 2).all()
    used = faces[times == 1].unique()
    assert on_border.sum() == len(used) + 8  # the corners of the cube are in no tetrahedron


@given(SIZES, SEEDS)
def test_crossed_finds_each_tetrahedron_that_is_cut_and_turns_it_right(n: int, seed: int) -> None:
    inside = torch.rand(vertex_count(n), generator=torch.Generator().manual_seed(seed)) < 0.5
    found = crossed(inside, n)
    count = inside[found].sum(1)
    assert ((count > 0) & (count < 4)).all()
    corners = lattice(n).double()[found]
    assert (torch.linalg.det(corners[:, 1:] - corners[:, :1]) > 0).all()
    if n <= 4:
        expected = everything(n)
        mixed = inside[expected].sum(1)
        expected = expected[(mixed > 0) & (mixed < 4)]
        assert torch.equal(found.sort(1).values.unique(dim=0), expected)
        assert len(found) == len(expected)


@given(SIZES, SEEDS, st.sampled_from([0.0, 0.3]))
def test_any_surface_is_closed_oriented_and_on_the_zero_set(
    n: int, seed: int, zeros: float
) -> None:
    distance, positions = random_distance(n, seed, zeros), lattice(n).double()
    triangles = march(positions, distance, n)
    inside = distance < 0
    if not inside.any():
        assert triangles.vertices.shape == triangles.faces.shape == (0, 3)
        return
    assert triangles.vertices.isfinite().all()
    assert_closed(triangles)
    assert volume(triangles) >= 0
    edges, faces = cut(crossed(inside, n), inside)
    assert torch.equal(faces, triangles.faces)
    assert inside[edges[:, 0]].all()
    assert not inside[edges[:, 1]].any()
    start, end = positions[edges[:, 0]], positions[edges[:, 1]]
    along = (triangles.vertices - start).norm(dim=1) / (end - start).norm(dim=1)
    low, high = distance[edges].unbind(1)
    assert torch.allclose(low + along * (high - low), torch.zeros_like(low), atol=1e-9)
    assert torch.allclose(start + along[:, None] * (end - start), triangles.vertices)


@given(SIZES, SEEDS)
def test_faces_look_from_the_inside_to_the_outside(n: int, seed: int) -> None:
    """For every case of a tetrahedron: their normal makes an acute angle with the slope of the distance in it."""
    distance, positions = random_distance(n, seed), lattice(n).double()
    for tetrahedron in crossed(distance < 0, n)[:40]:
        corners, values = positions[tetrahedron], distance[tetrahedron]
        slope = torch.linalg.solve(corners[1:] - corners[:1], values[1:] - values[:1])
        edges, faces = cut(tetrahedron[None], distance < 0)
        low, high = distance[edges].unbind(1)
        points = positions[edges[:, 0]] + (low / (low - high))[:, None] * (
            positions[edges[:, 1]] - positions[edges[:, 0]]
        )
        a, b, c = points[faces].unbind(1)
        normals = torch.linalg.cross(b - a, c - a)
        assert ((normals * slope).sum(1) > 0).all()
        assert torch.allclose(
            torch.linalg.cross(normals, slope.expand_as(normals)),
            torch.zeros_like(normals),
            atol=1e-9,
        )


def test_a_sphere_converges_to_its_volume_and_area() -> None:
    errors = []
    for n in (8, 16, 32):
        triangles = march(*sphere(n), n)
        assert_closed(triangles)
        assert euler(triangles) == 2
        a, b, c = triangles.vertices[triangles.faces].unbind(1)
        area = torch.linalg.cross(b - a, c - a).norm(dim=1).sum() / 2
        errors.append(
            [
                abs(float(volume(triangles)) / (4 / 3 * math.pi * 0.4**3) - 1),
                abs(float(area) / (4 * math.pi * 0.4**2) - 1),
            ]
        )
    for coarse, fine in itertools.pairwise(errors):
        for before, after in zip(coarse, fine, strict=True):
            assert after < before / 3  # of second order: a quarter
    assert max(errors[-1]) < 3e-3


def test_a_torus_has_a_hole_and_two_balls_are_apart() -> None:
    positions = lattice(20).double() * 0.06
    ring = torch.hypot(positions[:, :2].norm(dim=1) - 0.35, positions[:, 2]) - 0.12
    assert euler(march(positions, ring, 20)) == 0
    shift = positions.new_tensor([0.3, 0, 0])
    two = torch.minimum((positions - shift).norm(dim=1), (positions + shift).norm(dim=1)) - 0.2
    assert euler(march(positions, two, 20)) == 4


@given(SEEDS)
@settings(max_examples=5)
def test_gradients_of_positions_are_those_of_finite_differences(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    distance = random_distance(3, seed)
    distance = distance + 0.1 * distance.sign()  # away from where the triangles change
    positions = lattice(3).double() + 0.1 * torch.randn(len(distance), 3, generator=draws)
    assert torch.autograd.gradcheck(
        lambda p, d: march(p, d, 3).vertices,
        (positions.double().requires_grad_(), distance.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-42])
def test_distances_that_vanish_leave_finite_gradients(value: float, dtype: torch.dtype) -> None:
    """Where both ends of an edge are 0 or nearly so, too."""
    distance = random_distance(4, 1).to(dtype)
    vanish = torch.rand(len(distance), generator=torch.Generator().manual_seed(2)) < 0.6
    distance = torch.where(vanish, value * distance.sign(), distance)
    distance = torch.where(border(4), distance.abs(), distance).requires_grad_()
    positions = lattice(4).to(dtype).requires_grad_()
    triangles = march(positions, distance, 4)
    assert len(triangles.faces)
    assert triangles.vertices.isfinite().all()
    triangles.vertices.square().sum().backward()
    assert distance.grad is not None
    assert positions.grad is not None
    assert distance.grad.isfinite().all()
    assert positions.grad.isfinite().all()


def test_the_order_depends_on_the_signs_alone() -> None:
    distance = random_distance(5, 3)
    first = march(lattice(5).double(), distance, 5)
    other = march(lattice(5).double() + 0.1, 3 * distance.sign() + distance, 5)
    assert torch.equal(first.faces, other.faces)


def test_large_grids_need_no_table_of_their_tetrahedra() -> None:
    """At 48 cells there are 1.3 million, of which a small sphere crosses few."""
    positions, distance = sphere(48, 0.1)
    found = crossed(distance < 0, 48)
    assert 0 < len(found) < 4 * 3 * 48**3 / 100
    assert euler(march(positions, distance, 48)) == 2


@given(st.integers(3, 6), SEEDS)
def test_holes_are_what_no_edge_leads_out_of(n: int, seed: int) -> None:
    """Against a search along the edges of all tetrahedra."""
    inside = torch.rand(vertex_count(n), generator=torch.Generator().manual_seed(seed)) < 0.75
    inside &= ~border(n)
    pairs = (
        everything_of(n)[:, [0, 0, 0, 1, 1, 2, 1, 2, 3, 2, 3, 3]].view(-1, 2, 6).mT.reshape(-1, 2)
    )
    reached = border(n).clone()
    for _ in range(len(inside)):
        ahead = reached.clone()
        for a, b in (pairs.T, pairs.T.flip(0)):
            ahead[b[reached[a]]] = True
        ahead &= ~inside
        if torch.equal(ahead, reached):
            break
        reached = ahead
    found = enclosed(inside, n)
    assert torch.equal(found, ~reached)
    assert found[inside].all()


@functools.cache
def everything_of(resolution: int) -> Tensor:
    return everything(resolution)


def test_a_hollow_ball_is_filled_and_a_cup_is_not() -> None:
    positions = lattice(16).double() * 0.08
    radius = positions.norm(dim=1)
    shell = (radius - 0.4).abs() < 0.12
    assert torch.equal(enclosed(shell, 16), radius < 0.52)
    cup = shell & (positions[:, 2] < 0.2)
    assert torch.equal(enclosed(cup, 16), cup)
