"""Projection, covariances and spherical harmonics against gsplat's reference in torch."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.scenes.gaussians.harmonics import count_higher, harmonic_basis, view_colours
from picardopt_3d.scenes.gaussians.projection import (
    axes,
    focal_lengths,
    project,
    world_to_camera,
)
from picardopt_3d.scenes.gaussians.splats import SH_C0, rotation_matrices
from picardopt_3d.scenes.gaussians.tile_table import inverses
from torch import Tensor

from tests.integrations.helpers.splats import leaves, random_splats


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """gsplat's own formulas in torch, which its kernels are tested against."""
    pytest.importorskip("gsplat")
    return pytest.importorskip("gsplat.cuda._torch_impl")


def cameras(distance: float = 1.65) -> Cameras:
    """Poses are made in single precision: here their axes are at right angles in double precision."""
    found = orbit_cameras(
        torch.tensor([-10.0, 35.0, 90.0]), torch.tensor([0.0, 130.0, 10.0]), distance
    ).to(torch.float64)
    left, _, right = torch.linalg.svd(found.camera_to_world[:, :3, :3])
    found.camera_to_world[:, :3, :3] = left @ right
    return found


def in_computer_vision(seen_by: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """View matrices and intrinsics, found otherwise than in the package: by an inverse, and from the rays."""
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    views = torch.linalg.inv(seen_by.camera_to_world @ flip)
    intrinsics = torch.zeros(len(seen_by), 3, 3, dtype=torch.float64)
    for view, fov in enumerate(seen_by.fov.tolist()):
        focal = height / (2 * math.tan(math.radians(fov) / 2))
        intrinsics[view] = torch.tensor(
            [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64
        )
    return views, intrinsics


def test_covariances(reference: ModuleType) -> None:
    splats = random_splats(50, spread=1.5)
    own = axes(splats)
    expected, _ = reference._quat_scale_to_covar_preci(
        splats.rotations, splats.log_scales.exp(), compute_preci=False
    )
    torch.testing.assert_close(own @ own.mT, expected)
    torch.testing.assert_close(
        rotation_matrices(splats.rotations), reference._quat_to_rotmat(splats.rotations)
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 70), (65, 24)])
@pytest.mark.parametrize("distance", [1.65, 0.3])
def test_projection(reference: ModuleType, height: int, width: int, distance: float) -> None:
    """Also from among the Gaussians, where the projection is cut off at 1.3 times the picture's edge."""
    splats = leaves(random_splats(200, scale=0.02, spread=1.0))
    seen_by = cameras(distance)
    views, intrinsics = in_computer_vision(seen_by, height, width)
    torch.testing.assert_close(world_to_camera(seen_by), views)
    torch.testing.assert_close(focal_lengths(seen_by, height), intrinsics[:, 0, 0])
    own = axes(splats)
    radii, means2d, depths, conics, _ = reference._fully_fused_projection(
        splats.means, own @ own.mT, views, intrinsics, width, height, near_plane=0.01
    )
    opaque = torch.ones(200, dtype=torch.float64)
    found = project(splats, opaque, seen_by, height, width)
    seen = (radii > 0).all(-1)
    assert seen.any()
    assert (~seen).any() or distance > 1
    torch.testing.assert_close(found.means2d[seen], means2d[seen])
    torch.testing.assert_close(found.depths, depths)
    torch.testing.assert_close(inverses(found.covariances)[seen], conics[seen])
    # Theirs are 3.33 standard deviations, rounded up; ours are as large as can count at all: 3.329 if opaque.
    ours, theirs = found.extents.ceil(), radii.double()
    both = seen & (ours > 0).all(-1)
    assert int((seen & ~both).sum()) <= 2  # at the picture's very edge, or nearly whole pixels
    assert (ours[both] <= theirs[both]).all()
    assert (ours[both] >= (theirs[both] / 1.001 - 1).floor()).all()

    weights = torch.randn(conics.shape, generator=torch.Generator().manual_seed(2)).double()
    expected = torch.autograd.grad(
        (conics * weights)[seen].sum() + means2d[seen].square().sum(), splats[:3], retain_graph=True
    )
    loss = (inverses(found.covariances) * weights)[seen].sum() + found.means2d[seen].square().sum()
    for ours, theirs in zip(torch.autograd.grad(loss, splats[:3]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8 * float(theirs.abs().amax()))


def test_pixels_are_where_the_rays_go() -> None:
    """A point on the ray through a pixel's centre is projected onto that centre."""
    height, width, seen_by = 11, 17, cameras()
    origins, directions = seen_by.rays(height, width)
    for row, column in [(0, 0), (10, 16), (3, 12)]:
        points = origins[:, row, column] + 1.3 * directions[:, row, column]
        splats = random_splats(len(seen_by))._replace(means=points)
        opaque = torch.ones(len(points), dtype=torch.float64)
        found = project(splats, opaque, seen_by, height, width).means2d
        own = found[torch.arange(len(points)), torch.arange(len(points))]
        expected = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64)
        torch.testing.assert_close(own, expected.expand_as(own), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics(reference: ModuleType, degree: int) -> None:
    splats = random_splats(40, degree=3)
    offsets = splats.means[None] - cameras().position[:, None]
    coefficients = torch.cat([splats.colours[:, None], splats.harmonics], dim=1)
    expected = reference._spherical_harmonics(
        degree, offsets, coefficients.expand(len(offsets), -1, -1, -1)
    )
    found = view_colours(splats.colours, splats.harmonics, offsets, degree)
    torch.testing.assert_close(found, (expected + 0.5).clamp_min(0), rtol=1e-6, atol=1e-7)


def test_harmonics_are_orthonormal() -> None:
    """Without any other package: over the sphere they are 0 on average, and orthonormal."""
    count = 200_000
    draws = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = harmonic_basis(torch.nn.functional.normalize(draws, dim=-1), 3)
    basis = torch.cat([torch.full((count, 1), SH_C0, dtype=torch.float64), basis], dim=-1)
    products = 4 * math.pi * (basis.T @ basis) / count
    torch.testing.assert_close(
        products, torch.eye(1 + count_higher(3), dtype=torch.float64), atol=0.03, rtol=0
    )
