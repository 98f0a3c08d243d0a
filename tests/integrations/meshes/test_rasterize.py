"""Rasterizing triangles in plain torch: against rays, against finite differences, and what must not change a bit."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.scenes.mesh import z_buffer
from picardopt_3d.scenes.mesh.rasterize import Fragments, antialias, interpolate, rasterize
from picardopt_3d.scenes.mesh.screen import NEAR
from picardopt_3d.scenes.mesh.triangles import Triangles
from torch import Tensor

from tests.integrations.helpers.triangles import (
    exact,
    grid,
    random_triangles,
    seen_by_rays,
    sphere,
)


def cameras(views: int, distance: float = 1.65) -> Cameras:
    """Not at heights or angles that are round."""
    return exact(
        orbit_cameras(
            torch.linspace(-9.3, 84.1, views), torch.linspace(13.7, 213.1, views), distance
        )
    )


def assert_is_what_rays_hit(
    triangles: Triangles, seen_by: Cameras, height: int, width: int
) -> float:
    """Returns the share of the pixels that show a face."""
    face, shares, distance = seen_by_rays(triangles, seen_by, height, width, NEAR)
    found = rasterize(triangles, seen_by, height, width)
    np.testing.assert_array_equal(found.face.numpy(), face)
    np.testing.assert_allclose(found.barycentric.numpy(), shares, atol=1e-8)
    points = interpolate(found, triangles.faces, triangles.vertices).numpy()
    origins, directions = (x.numpy() for x in seen_by.rays(height, width))
    seen = face >= 0
    expected = origins[seen] + distance[seen][:, None] * directions[seen]
    np.testing.assert_allclose(points[seen], expected, atol=1e-8)
    assert not points[~seen].any()
    return float(seen.mean())


@given(
    count=st.integers(1, 30),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    views=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    size=st.sampled_from([0.01, 0.1, 0.4, 3.0]),
    distance=st.sampled_from([0.2, 0.6, 1.65]),
    tight=st.booleans(),
)
def test_shows_what_rays_hit(
    count: int,
    height: int,
    width: int,
    views: int,
    seed: int,
    size: float,
    distance: float,
    tight: bool,
) -> None:
    """From outside and from among the triangles, which then reach behind the camera; in one piece and in many."""
    with pytest.MonkeyPatch.context() as patch:
        if tight:
            patch.setattr(z_buffer, "_PAIRS", 7)
            patch.setattr(z_buffer, "_CORNERS", 1)
        triangles = random_triangles(count, size, seed=seed)
        assert_is_what_rays_hit(triangles, cameras(views, distance), height, width)


def test_rays_hit_many_faces() -> None:
    """So that the test above is one."""
    assert assert_is_what_rays_hit(random_triangles(40, 0.1), cameras(3), 24, 31) > 0.1
    assert assert_is_what_rays_hit(random_triangles(5, 3.0), cameras(3, 0.2), 24, 31) > 0.5
    assert assert_is_what_rays_hit(sphere(3), cameras(2), 24, 24) > 0.3


def test_what_reaches_behind_the_camera_is_cut_off() -> None:
    """A floor on which the camera stands, and a wall behind it."""
    floor = torch.tensor([[-9.0, -9, -0.2], [9, -9, -0.2], [9, 9, -0.2], [-9, 9, -0.2]])
    wall = torch.tensor([[3.0, -9, -9], [3, 9, -9], [3, 0, 9]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6]])
    triangles = Triangles(torch.cat([floor, wall]).double().requires_grad_(), faces)
    found = rasterize(triangles, exact(orbit_cameras(0.0, 0.0)), 32, 32)
    face, _, _ = seen_by_rays(triangles, exact(orbit_cameras(0.0, 0.0)), 32, 32, NEAR)
    np.testing.assert_array_equal(found.face[0].numpy(), face[0])
    assert (found.face[0, 22:] >= 0).all()  # the floor, up to the camera's feet
    assert (found.face[0, :16] == -1).all()  # the sky: no mirror image of what is behind
    assert not (found.face == 2).any()
    image = interpolate(found, faces, triangles.vertices)
    antialias(image, found, triangles, exact(orbit_cameras(0.0, 0.0))).square().sum().backward()
    assert triangles.vertices.grad is not None
    assert triangles.vertices.grad.isfinite().all()


def test_inside_a_closed_mesh_every_pixel_is_covered() -> None:
    """In single precision too, and from anywhere."""
    for dtype in (torch.float32, torch.float64):
        triangles = sphere(3, 0.5, dtype)
        for distance in (0.01, 0.3, 0.45):
            inside = cameras(4, distance)
            inside = replace(inside, fov=torch.tensor([30.0, 60.0, 90.0, 150.0]))
            assert (rasterize(triangles, inside, 40, 40).face >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cells", [1, 17, 34, 119])
def test_a_sheet_has_neither_holes_nor_double_hits(cells: int, dtype: torch.dtype) -> None:
    """The sheet is 17 pixels wide: vertices of a grid of 17 lie on the centres of the 16, but for rounding."""
    camera = orbit_cameras(0.0, 0.0)
    pixel = 2 * float(camera.distance) * math.tan(math.radians(float(camera.fov)) / 2) / 16
    triangles = grid(cells, 17 * pixel, dtype)
    face = rasterize(triangles, camera, 16, 16).face
    assert (face >= 0).all()
    if cells == 1:
        alone = [
            rasterize(Triangles(triangles.vertices, one[None]), camera, 16, 16).face >= 0
            for one in triangles.faces
        ]
        covered = torch.stack(alone).sum(0)
        on_edge = np.isclose(np.abs(seen_by_rays(triangles, camera, 16, 16)[1]), 0, atol=1e-5)
        assert (covered >= 1).all()
        assert (covered[torch.from_numpy(~on_edge.any(-1))] == 1).all()


def test_vertices_on_the_centres_of_pixels_leave_no_holes() -> None:
    """Each at a depth of its own on the ray through a centre, so that rounding puts it on any side of it."""
    camera = orbit_cameras(0.0, 0.0)
    triangles = grid(65, dtype=torch.float32)
    wide = camera.rays(66, 66)[1][0].flip(0)  # row 0 below, as in the grid
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        depth = 1 + torch.rand(66, 66, 1, generator=generator)
        rays = wide / -wide[..., :1]
        vertices = camera.position + (depth * rays).view(-1, 3)
        face = rasterize(Triangles(vertices, triangles.faces), camera, 66, 66).face
        assert (face[:, 1:-1, 1:-1] >= 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_crumpled_sheet_has_no_holes_in_single_precision(seed: int) -> None:
    """Slivers, folds and all: what lies between the four outer corners is covered."""
    generator = torch.Generator().manual_seed(seed)
    triangles = grid(60, 2.0, torch.float32)
    inner = triangles.vertices[:, 1:].abs().amax(-1) < 0.999
    noise = torch.randn(triangles.vertices.shape, generator=generator) * torch.tensor(
        [0.05, 0.1, 0.1]
    )
    vertices = triangles.vertices + noise * inner[:, None]
    found = rasterize(Triangles(vertices, triangles.faces), orbit_cameras(0.0, 0.0), 128, 128)
    assert (found.face >= 0).all()


def test_the_order_of_faces_matters_only_to_their_numbers() -> None:
    triangles = sphere(3, dtype=torch.float32)
    order = torch.randperm(len(triangles.faces), generator=torch.Generator().manual_seed(1))
    one = rasterize(triangles, cameras(2), 33, 40)
    other = rasterize(Triangles(triangles.vertices, triangles.faces[order]), cameras(2), 33, 40)
    renamed = torch.where(other.face >= 0, order[other.face], -1)
    same = renamed == one.face  # a pixel on an edge may show either face
    assert same.float().mean() > 0.99
    assert torch.equal(other.barycentric[same], one.barycentric[same])
    assert torch.equal(one.face >= 0, other.face >= 0)


def test_of_faces_at_one_depth_the_first_is_shown() -> None:
    triangles = random_triangles(4, dtype=torch.float32)
    once = rasterize(triangles, cameras(2), 32, 32)
    twice = Triangles(triangles.vertices, triangles.faces.repeat(3, 1))
    with pytest.MonkeyPatch.context() as patch:
        for pairs in (1 << 18, 100):
            patch.setattr(z_buffer, "_PAIRS", pairs)
            assert torch.equal(rasterize(twice, cameras(2), 32, 32).face, once.face)


def test_both_sides_are_drawn() -> None:
    triangles = random_triangles(6)
    turned = Triangles(triangles.vertices, triangles.faces.flip(1))
    one, other = (rasterize(x, cameras(2), 20, 20) for x in (triangles, turned))
    assert torch.equal(one.face, other.face)
    torch.testing.assert_close(one.barycentric, other.barycentric.flip(-1))


def picture(
    triangles: Triangles, seen_by: Cameras, size: int, rows: Tensor | None = None
) -> Tensor:
    """An antialiased picture of all attributes, with a background."""
    found = rasterize(triangles, seen_by, size, size)
    values = torch.cat([triangles.vertices, triangles.vertices.square()], dim=-1)
    image = interpolate(found, triangles.faces, values if rows is None else rows)
    return antialias(image, found, triangles, seen_by)


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck_of_weights_and_values(seed: int) -> None:
    triangles = random_triangles(4, seed=seed)
    values = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([[0, 1, 2], [2, 3, 4], [4, 0, 2], [1, 1, 3]])  # of their own

    def drawn(vertices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = rasterize(Triangles(vertices, triangles.faces), cameras(2), 7, 6)
        return found.barycentric, interpolate(found, rows, values)

    inputs = triangles.vertices.requires_grad_(), values.requires_grad_()
    assert rasterize(triangles, cameras(2), 7, 6).face.unique().numel() > 2
    assert torch.autograd.gradcheck(drawn, inputs, eps=1e-7, atol=1e-5)


def with_gradients(triangles: Triangles, seen_by: Cameras, size: int) -> tuple[Tensor, ...]:
    """A picture, and the gradients of a random sum of it."""
    vertices = triangles.vertices.detach().clone().requires_grad_()
    rows = torch.randn(len(vertices), 4, generator=torch.Generator().manual_seed(2)).to(vertices)
    rows.requires_grad_()
    image = picture(Triangles(vertices, triangles.faces), seen_by, size, rows)
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(3)).to(image)
    return image.detach(), *torch.autograd.grad((image * weights).sum(), [vertices, rows])


def test_a_view_does_not_depend_on_the_others() -> None:
    """Not in its last bit."""
    triangles = sphere(3, dtype=torch.float32)
    seen_by = cameras(5)
    together = rasterize(triangles, seen_by, 24, 31)
    image = picture(triangles, seen_by, 24)
    with pytest.MonkeyPatch.context() as patch:
        for pairs in (1 << 18, 1000):
            patch.setattr(z_buffer, "_PAIRS", pairs)
            for view in range(5):
                alone = rasterize(triangles, seen_by[view : view + 1], 24, 31)
                assert torch.equal(together.face[view], alone.face[0])
                assert torch.equal(together.barycentric[view], alone.barycentric[0])
                own = picture(triangles, seen_by[view : view + 1], 24)
                assert torch.equal(image[view], own[0])


def test_the_number_of_threads_changes_no_bit() -> None:
    """Large enough to be split, in every pass: 50,000 pixels with a face."""
    triangles = sphere(4, dtype=torch.float32)
    seen_by = cameras(2, 1.2)
    kept = with_gradients(triangles, seen_by, 200)
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for ours, theirs in zip(with_gradients(triangles, seen_by, 200), kept, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_single_precision_is_enough() -> None:
    triangles = sphere(4)
    single = Triangles(triangles.vertices.float(), triangles.faces)
    double = Triangles(single.vertices.double(), triangles.faces)
    found, expected = (with_gradients(x, cameras(1), 96) for x in (single, double))
    difference = (found[0] - expected[0]).abs()
    assert float(difference.mean()) < 2e-4
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.parametrize(("vertices", "faces"), [(0, 0), (5, 0)])
def test_without_faces_there_is_the_background(vertices: int, faces: int) -> None:
    triangles = Triangles(
        torch.randn(vertices, 3, requires_grad=True), torch.zeros(faces, 3, dtype=torch.int64)
    )
    found = rasterize(triangles, cameras(2), 5, 6)
    assert (found.face == -1).all()
    assert found.face.shape == (2, 5, 6)
    image = interpolate(found, triangles.faces, triangles.vertices)
    background = torch.rand(2, 5, 6, 3)
    image = antialias(image + background, found, triangles, cameras(2))
    assert torch.equal(image, background)
    (image.square().sum() + found.barycentric.sum()).backward()
    assert triangles.vertices.grad is not None
    assert not triangles.vertices.grad.any()


def test_faces_without_an_area_show_nothing_and_break_nothing() -> None:
    good = random_triangles(3, dtype=torch.float32)
    bad = torch.tensor([[0, 0, 0], [0, 0, 5], [1, 4, 1]])
    line = torch.tensor([[0.0, 0, 0], [0.1, 0.1, 0.1], [0.2, 0.2, 0.2]])
    vertices = torch.cat([good.vertices, line, 0 * line]).requires_grad_()
    faces = torch.cat([good.faces, bad, torch.arange(9, 15).view(2, 3)])
    triangles = Triangles(vertices, faces)
    found = rasterize(triangles, cameras(2), 32, 32)
    assert torch.equal(found.face, rasterize(good, cameras(2), 32, 32).face)
    picture(triangles, cameras(2), 32).square().sum().backward()
    assert vertices.grad is not None
    assert vertices.grad.isfinite().all()


def test_what_has_no_picture_is_refused() -> None:
    triangles = random_triangles(1)
    with pytest.raises(ValueError, match="height=0, width=4"):
        rasterize(triangles, cameras(1), 0, 4)
    triangles.vertices[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"not finite.*diverged.*rates\.shape.*rates\.offsets"):
        rasterize(triangles, cameras(1), 4, 4)


def test_numbers_at_the_limits() -> None:
    """Far away, or at the camera's own place: finite pictures and gradients."""
    camera = orbit_cameras(0.0, 0.0)
    for edit in (1e30, -1e30, 1e-30):
        vertices = random_triangles(6, dtype=torch.float32).vertices
        vertices[0, 1], vertices[4] = edit, camera.position[0]
        triangles = Triangles(vertices.requires_grad_(), torch.arange(18).view(6, 3))
        image = picture(triangles, camera, 16, torch.rand(18, 2))
        image.square().sum().backward()
        assert image.isfinite().all()
        assert vertices.grad is not None
        assert vertices.grad.isfinite().all()


GROWTH = """
import resource, torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.scenes.mesh.rasterize import rasterize
from tests.integrations.helpers.triangles import random_triangles, sphere

torch.set_num_threads(1)
for count in (1, 60):
    found = rasterize(random_triangles(count, 30.0, dtype=torch.float32), orbit_cameras(15.0, 20.0), 512, 512)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_what_faces_cover() -> None:
    """60 faces that fill 512 pixels are 16 million pairs: 140 MB for each number that all pairs had at once."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 100, f"{small} MB, then {large} MB"


def test_five_thousand_faces_take_milliseconds() -> None:
    """All of it, forward and backward, 64 pixels, one core: 10 ms here, and CPU time only."""
    triangles = sphere(4, dtype=torch.float32)
    assert len(triangles.faces) > 5000
    triangles.vertices.requires_grad_()
    spent = []
    for _ in range(8):
        begun = time.process_time()
        picture(triangles, cameras(1), 64).square().sum().backward()
        spent.append(time.process_time() - begun)
    assert min(spent) < 0.06


def test_fragments_without_nvdiffrast_hold_nothing_else() -> None:
    found = rasterize(random_triangles(1), cameras(1), 4, 4, rasterizer="torch")
    assert isinstance(found, Fragments)
    assert found.raw is None
