"""Density of Gaussians against their formula in double precision, and the meshes that are made of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh
from picardopt_3d.export.mesh import Mesh, extract_mesh
from picardopt_3d.scenes.gaussians import Gaussians, GaussiansConfig
from picardopt_3d.scenes.gaussians.density import THRESHOLD, Density, surface_of
from picardopt_3d.scenes.gaussians.splats import SH_C0, Splats
from picardopt_3d.scenes.mesh.surfaces import NoSurfaceError
from scipy.spatial.transform import Rotation
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integrations.helpers.splats import random_splats, shell


def some_splats(count: int, *, degree: int = 0, scale: float = 0.05) -> Splats:
    return random_splats(count, degree=degree, scale=scale, dtype=torch.float32)


def scene_of(splats: Splats) -> Gaussians:
    return Gaussians(GaussiansConfig(count=len(splats.means)), splats)


def formula(splats: Splats, points: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Density and colour as they are defined, one Gaussian after the other."""
    density, mixed = np.zeros(len(points)), np.zeros((len(points), 3))
    for mean, log_scale, rotation, logit, colour, _ in zip(*splats, strict=True):
        turned = Rotation.from_quat(rotation.double().numpy(), scalar_first=True).as_matrix()
        covariance = turned @ np.diag(np.exp(2 * log_scale.double().numpy())) @ turned.T
        away = points.double().numpy() - mean.double().numpy()
        squared = np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away)
        share = np.exp(-squared / 2) / (1 + math.exp(-float(logit)))
        density += share
        mixed += share[:, None] * np.clip(0.5 + SH_C0 * colour.double().numpy(), 0, 1)
    return density, mixed / density[:, None]


def closed(mesh: Mesh) -> trimesh.Trimesh:
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert shape.is_watertight
    return shape


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("places", [1, 7, 5000])
def test_density_and_colour_are_the_formulas(count: int, places: int) -> None:
    splats = some_splats(count, scale=0.1)
    points = 0.6 * torch.randn(places, 3, generator=torch.Generator().manual_seed(1))
    field = Density(splats)
    density, colour = formula(splats, points)
    # What is left out, a Gaussian's share below 1e-4, can add up.
    assert np.abs(field(points).numpy() - density).max() < 1e-4 * min(count, 30)
    dense = density > 0.1
    assert np.abs(field.colour(points).numpy() - colour)[dense].max(initial=0) < 0.01


def test_points_in_any_order_get_their_own_density() -> None:
    field = Density(some_splats(500, scale=0.05))
    points = torch.rand(4000, 3) - 0.5
    order = torch.randperm(4000)
    assert torch.allclose(field(points[order]), field(points)[order], atol=3e-3)
    assert field(points[:0]).shape == (0,)
    assert field.colour(points[:0]).shape == (0, 3)
    assert torch.allclose(field(points[:1].expand(3000, 3)), field(points[:1]), atol=1e-3)


def test_where_there_is_nothing_the_density_is_zero_and_the_colour_black() -> None:
    far = torch.full((5, 3), 30.0)
    field = Density(some_splats(20))
    assert field(far).tolist() == [0.0] * 5
    assert field.colour(far).abs().max() == 0
    none = Density(some_splats(0))
    assert none(far).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log_scales", 1e4),
        ("log_scales", -1e4),
        ("opacity_logits", 1e4),
        ("opacity_logits", -1e4),
        ("rotations", 0.0),
        ("rotations", 1e30),
        ("means", 1e30),
        ("means", -1e30),
        ("colours", 1e30),
    ],
)
def test_degenerate_gaussians_do_no_harm(field: str, value: float) -> None:
    splats = some_splats(40)
    getattr(splats, field)[:10] = value
    points = torch.rand(2000, 3) - 0.5
    found = Density(splats)
    density, colour = found(points), found.colour(points)
    assert density.isfinite().all()
    assert (density >= 0).all()
    assert (density <= 40.001).all()
    assert colour.isfinite().all()
    assert (colour == colour.clamp(0, 1)).all()
    if (field, value) == ("opacity_logits", -1e4) or field == "means":
        others = Splats(*(tensor[10:] for tensor in splats))
        assert torch.allclose(density, Density(others)(points), atol=1e-3)
    if (field, value) == ("log_scales", 1e4):  # as large as space
        full = splats.opacity_logits[:10].sigmoid().sum()
        others = Splats(*(tensor[10:] for tensor in splats))
        assert torch.allclose(density - full, Density(others)(points), atol=1e-3)


@pytest.mark.parametrize("field", Splats._fields)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(field: str, value: float) -> None:
    splats = some_splats(12, degree=1)
    getattr(splats, field)[3:5] = value
    with pytest.raises(ValueError, match=f"{field}: 2 of 12 Gaussians .* {value} in row 3: their"):
        surface_of(splats, 0.5)


def test_one_gaussian_is_an_ellipsoid_of_its_own_axes() -> None:
    turned = Rotation.from_euler("zyx", (30, 40, 50), degrees=True)
    deviations = np.array([0.25, 0.12, 0.06])
    one = Splats(
        torch.tensor([[0.05, -0.04, 0.03]]),
        torch.tensor(np.log(deviations)[None], dtype=torch.float32),
        3 * torch.tensor(turned.as_quat(scalar_first=True)[None], dtype=torch.float32),
        torch.tensor([20.0]),
        torch.tensor([[1.0, 0.0, -1.0]]),
        torch.zeros(1, 0, 3),
    )
    mesh = extract_mesh(scene_of(one), 96, level=math.exp(-0.5) - THRESHOLD)
    shape = closed(mesh)
    assert shape.volume == pytest.approx(4 / 3 * math.pi * deviations.prod(), rel=0.03)
    own = turned.inv().apply(mesh.vertices - np.array([0.05, -0.04, 0.03])) / deviations
    assert np.abs(np.linalg.norm(own, axis=1) - 1).max() < 0.03
    assert np.allclose(mesh.colours, (0.5 + SH_C0, 0.5, 0.5 - SH_C0), atol=1e-5)


def test_a_sphere_of_gaussians_is_a_closed_mesh_of_its_radius_and_colours() -> None:
    mesh = extract_mesh(scene_of(shell(2000, 0.35, 0.03)), 64)
    closed(mesh)
    outside = np.linalg.norm(mesh.vertices, axis=1)
    outer = outside > 0.35  # the rest is the shell's inner side
    # Spread evenly, 2000 opaque Gaussians make a density of 2000 * 0.03**2 / (2 * 0.35**2) in the middle of the shell.
    middle = 2000 * 0.03**2 / (2 * 0.35**2)
    assert outside[outer].mean() == pytest.approx(
        0.35 + 0.03 * math.sqrt(2 * math.log(middle / THRESHOLD)), abs=0.003
    )
    assert outside[outer].std() < 0.003
    # Colours are those of the sphere's points at the Gaussians' distance.
    true = 0.5 + 0.35 * mesh.vertices / outside[:, None]
    assert np.abs(mesh.colours - true)[outer].max() < 0.02


def test_transparent_gaussians_have_no_surface_and_the_message_says_what_to_do() -> None:
    splats = some_splats(50)._replace(opacity_logits=torch.full((50,), -6.0))
    with pytest.raises(NoSurfaceError, match="Give a lower level"):
        extract_mesh(scene_of(splats), 16)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize(("count", "places"), [(10_000, 300), (300, 10_000), (1700, 1700)])
def test_memory_does_not_grow_with_points_times_gaussians(count: int, places: int) -> None:
    field = Density(some_splats(count, scale=0.3))  # all reach every point
    with Largest() as largest:
        assert field(torch.rand(places, 3) - 0.5).min() > 1
    assert largest.numbers < 2e6  # all pairs at once have 3e6 distances, of three numbers each
