from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.scenes import HashConfig, Light, OccupancyConfig, SdfConfig, SdfField

SMALL = SdfConfig(
    encoding=HashConfig(levels=3, base=3, scale=1.7, log2_size=6),
    width=8,
    radius=0.6,
    samples=48,
    surface_radius=0.4,
    background="solid",
    normals="analytic",
    occupancy=None,
)


def fresh(config: SdfConfig = SMALL) -> SdfField:
    torch.manual_seed(0)
    return SdfField(config).double()


def grown(config: SdfConfig = SMALL) -> SdfField:
    """A field that is no longer a sphere."""
    field = fresh(config)
    with torch.no_grad():
        field.encoding.table.normal_()
        field.network.layers[-1].weight.normal_(std=0.05)
    return field


def rays_of(size: int = 9, views: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    origins, directions = turntable_cameras(views).rays(size, size)
    return origins.double(), directions.double()


def points_of(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5


@pytest.mark.parametrize("normals", ["analytic", "finite_difference"])
def test_it_starts_as_a_sphere(normals: str) -> None:
    field, points = fresh(replace(SMALL, normals=normals)), points_of(100)
    assert torch.equal(field.signed_distance(points), points.norm(dim=1) - 0.4)
    assert torch.equal(field.level_set(points) > 0, points.norm(dim=1) < 0.4)
    render = field.render_rays(*rays_of(), normals=True)
    assert render.eikonal is not None
    assert render.eikonal.item() < 1e-6
    assert render.depth[:, 0, 4, 4].tolist() == pytest.approx([1.65 - 0.4] * 2, abs=0.05)
    assert render.opacity[:, 0, 4, 4].min() > 0.999
    assert render.opacity[:, 0, 0, 0].max() < 1e-3  # the corner misses it
    towards = torch.nn.functional.normalize(turntable_cameras(2).position, dim=1)
    assert render.normal is not None
    middle = render.normal[:, :, 4, 4]
    assert torch.allclose(middle, towards.double(), atol=5e-3)
    assert render.orientation_penalty is not None
    assert render.orientation_penalty.item() < 1e-2


def test_the_density_is_laplaces_distribution_over_its_deviation() -> None:
    field = fresh(replace(SMALL, inverse_deviation=20.0))
    distances = torch.tensor([-0.3, -0.05, 0.0, 0.05, 0.3], dtype=torch.float64)
    laplace = torch.distributions.Laplace(0.0, torch.tensor(1 / 20, dtype=torch.float64))
    expected = 20.0 * laplace.cdf(-distances)
    points = torch.stack([distances + 0.4, 0 * distances, 0 * distances], 1)
    assert field.density(points).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_surface_grows_no_thinner_than_its_bound() -> None:
    """A thinner one lies between samples, where no gradient finds it."""
    field = fresh(replace(SMALL, sharpest=40.0))
    inside = torch.zeros(1, 3, dtype=torch.float64)
    with torch.no_grad():
        field.sharpness.fill_(8.9)  # exp(89) is beyond float32
    assert field.density(inside).item() == pytest.approx(40.0, rel=1e-3)


def test_its_opacity_is_that_of_the_integrated_density() -> None:
    field = fresh(replace(SMALL, samples=4000, inverse_deviation=15.0))
    origins = torch.tensor([0.0, 0.45, 2.0]).double().expand(1, 1, 1, 3)
    down = torch.tensor([0.0, 0.0, -1.0]).double().expand(1, 1, 1, 3)
    opacity = field.render_rays(origins, down).opacity.item()
    along = torch.linspace(-1, 1, 200_001, dtype=torch.float64) * math.sqrt(0.6**2 - 0.45**2)
    distance = (
        torch.hypot(along, torch.tensor(0.45).double()) - 0.4
    )  # positive: the ray passes beside
    density = 15.0 * 0.5 * torch.exp(-15.0 * distance)
    expected = -math.expm1(-torch.trapezoid(density, along).item())
    assert opacity == pytest.approx(expected, rel=1e-4)
    assert 0.3 < expected < 0.99


def test_analytic_slopes_are_those_of_finite_differences() -> None:
    field = grown()
    # From no axis: a sample on a face between cells has two slopes.
    rays = [
        x.double() for x in orbit_cameras(33.0, torch.tensor([17.0, 120.0]), 1.6, 40.0).rays(8, 8)
    ]
    by_slope = field.render_rays(*rays, normals=True)
    field.config = replace(SMALL, normals="finite_difference", normal_step=1e-7)
    by_difference = field.render_rays(*rays, normals=True)
    assert by_slope.eikonal is not None
    assert by_slope.eikonal.item() > 0.01
    for name in ("normal", "eikonal", "rgb"):
        one, other = getattr(by_slope, name), getattr(by_difference, name)
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("normals", ["analytic", "finite_difference"])
def test_gradients_are_those_of_finite_differences(normals: str) -> None:
    field = grown(replace(SMALL, samples=5, normals=normals, background="neural"))
    rays, generator = rays_of(4, 1), torch.Generator().manual_seed(0)
    weights = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    light = Light(torch.tensor([[1.0, 2.0, 1.5]]))

    def loss() -> torch.Tensor:
        render = field.render_rays(*rays, normals=True, light=light)
        return ((render.rgb + render.normal) * weights).sum() + render.eikonal

    loss().backward()
    grouped = [p for parameters in field.groups().values() for p in parameters]
    assert {id(p) for p in grouped} == {id(p) for p in field.parameters()}
    for parameter in grouped:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for size in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=size)
                values.append(loss().item())
                parameter.sub_(direction, alpha=size)
        slope = (parameter.grad * direction).sum().item()
        assert slope != 0
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_the_deviation_is_learned_only_if_asked_for() -> None:
    fixed = fresh(replace(SMALL, learn_deviation=False))
    assert all(p is not fixed.sharpness for p in fixed.groups()["networks"])
    assert not fixed.sharpness.requires_grad
    assert any(p is field.sharpness for field in [fresh()] for p in field.groups()["networks"])


def test_culling_where_there_is_next_to_nothing_changes_next_to_nothing() -> None:
    field = fresh(replace(SMALL, occupancy=OccupancyConfig(resolution=16, threshold=0.05)))
    assert field.occupancy is not None
    rays = rays_of()
    full = field.render_rays(*rays, normals=True)
    for step in range(3):
        torch.manual_seed(step)
        field.occupancy.update(field.occupancy.measure(field.density))
    assert 0.2 < field.occupancy.occupied().float().mean() < 0.8
    culled = field.render_rays(*rays, normals=True)
    assert (full.rgb - culled.rgb).abs().max() < 0.02
    assert not torch.equal(full.rgb, culled.rgb)


def test_colours_are_those_of_a_network_of_their_own() -> None:
    field, points = grown(), points_of(5)
    with torch.no_grad():
        before = field.signed_distance(points)
        field.colours.layers[-1].weight.zero_()
        field.colours.layers[-1].bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.equal(before, field.signed_distance(points))
    expected = torch.sigmoid(torch.tensor([-1.0, 0.0, 1.0]).double()).expand(5, 3)
    assert torch.allclose(field.colour(points), expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"inverse_deviation": 0.0}, "inverse_deviation"),
        ({"inverse_deviation": 81.0}, "inverse_deviation"),
        ({"surface_radius": 2.0}, "surface_radius"),
        ({"normals": "guessed"}, "normals"),
        ({"normal_step": 0.0}, "normal_step"),
        ({"depth": 0}, "depth"),
        ({"samples": 0}, "samples"),
        ({"background": "black"}, "background"),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SdfConfig(**options)
