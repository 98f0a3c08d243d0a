from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from picardopt_3d.cameras import random_cameras, turntable_cameras
from picardopt_3d.scenes import HashConfig, Light, NerfConfig, NerfField, OccupancyConfig

SMALL = NerfConfig(
    encoding=HashConfig(levels=3, base=3, scale=1.7, log2_size=6),
    width=8,
    radius=0.55,
    samples=12,
    background="solid",
    background_colour=(0.25, 0.5, 0.75),
    occupancy=None,
)


def grown(config: NerfConfig = SMALL, seed: int = 0) -> NerfField:
    """A field whose table is no longer next to nothing, in double precision."""
    torch.manual_seed(seed)
    field = NerfField(config).double()
    with torch.no_grad():
        field.encoding.table.normal_()
    return field


def rays_of(size: int = 6, views: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    origins, directions = turntable_cameras(views).rays(size, size)
    return origins.double(), directions.double()


def lamps(views: int = 2) -> Light:
    return Light(torch.tensor([[1.0, 2.0, 1.5]]).expand(views, 3), ambient=0.2, diffuse=0.8)


@pytest.mark.parametrize("background", ["solid", "neural"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_render_is_finite_in_range_and_every_parameter_is_in_one_group(
    background: str, depth: int
) -> None:
    field = grown(replace(SMALL, background=background, depth=depth))
    options = {"normals": True, "normal_smoothness": True, "light": lamps()}
    render = field.render_rays(*rays_of(), jitter=True, **options)
    assert render.eikonal is None
    assert render.rgb.shape == (2, 3, 6, 6)
    assert 0 <= render.rgb.min() < render.rgb.max() <= 1
    assert render.normal is not None
    assert render.orientation_penalty is not None
    assert render.normal_smoothness is not None
    loss = render.rgb.square().sum() + render.orientation_penalty + render.normal_smoothness
    loss.backward()
    grouped = [p for parameters in field.groups().values() for p in parameters]
    assert {id(p) for p in grouped} == {id(p) for p in field.parameters()}
    assert len(grouped) == len(list(field.parameters()))
    assert all(p.grad is not None and p.grad.any() for p in grouped)
    assert set(field.groups()) == {"encoding", "networks", "background"}


def test_a_fresh_field_is_the_blob() -> None:
    # softplus(10 (1 - r / 0.5)), and grey: the network adds next to nothing.
    field = NerfField(SMALL)
    with torch.no_grad():
        for parameter in field.network.parameters():
            parameter.zero_()
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.3, 0.0, 0.4]])
    density = field.density(points).detach()
    assert density.tolist() == pytest.approx([math.log1p(math.exp(10))] + 2 * [math.log(2)])
    assert field.colour(points).detach().unique().tolist() == [0.5]
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.6]])
    assert (field.level_set(points) > 0).tolist() == [True, False]  # density 10.00005
    field.config = replace(SMALL, surface_density=11.0)
    assert (field.level_set(points) > 0).tolist() == [False, False]


def test_normals_of_a_fresh_field_point_outward() -> None:
    render = NerfField(SMALL).render(turntable_cameras(2), 9, normals=True)
    assert render.normal is not None
    towards = torch.nn.functional.normalize(turntable_cameras(2).position, dim=1)
    middle = render.normal[:, :, 4, 4]
    assert ((middle * towards).sum(1) > 0.85).all()
    assert render.orientation_penalty is not None
    share = (render.opacity > 0).float().mean()  # of the rays: those that see something
    assert render.orientation_penalty.item() * share < 0.02


@pytest.mark.parametrize("depth", [1, 2])
def test_analytic_normals_are_those_of_finite_differences(depth: int) -> None:
    config = replace(SMALL, depth=depth)
    field = grown(config)
    by_slope = field.render_rays(*rays_of(), normals=True).normal
    field.config = replace(config, normals="finite_difference", normal_step=1e-7)
    by_difference = field.render_rays(*rays_of(), normals=True).normal
    assert by_slope is not None
    assert by_slope.abs().max() > 0.3
    assert torch.allclose(by_slope, by_difference, atol=1e-5)


@pytest.mark.parametrize("normals", ["analytic", "finite_difference"])
def test_what_trains_through_normals_has_the_gradient_of_finite_differences(normals: str) -> None:
    encoding = HashConfig(levels=2, base=2, scale=2, log2_size=4)
    field = grown(replace(SMALL, encoding=encoding, samples=3, width=4, normals=normals))
    rays, generator = rays_of(3, 1), torch.Generator().manual_seed(0)
    weights = torch.randn(1, 3, 3, 3, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        render = field.render_rays(*rays, normals=True, light=lamps(1))
        return (render.rgb * weights).sum() + (render.normal * weights).sum()

    loss().backward()
    for parameter in field.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for size in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=size)
                values.append(loss().item())
                parameter.sub_(direction, alpha=size)
        slope = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_light_shades_what_is_seen_and_textureless_hides_the_colour() -> None:
    field = grown()
    with torch.no_grad():
        field.network.layers[-1].weight[1:].zero_()
        field.network.layers[-1].bias[1:] = torch.tensor([-2.0, 0.0, 2.0]).double()
    rays, light = rays_of(), lamps()
    black = torch.zeros(2, 3)
    albedo = field.render_rays(*rays, background=black).rgb
    lit = field.render_rays(*rays, light=light, background=black).rgb
    plain = field.render_rays(*rays, light=replace(light, textureless=True), background=black).rgb
    ambient = field.render_rays(
        *rays, light=replace(light, ambient=1.0, diffuse=0.0), background=black
    )
    assert torch.allclose(ambient.rgb, albedo)
    assert torch.allclose(lit, plain * torch.sigmoid(torch.tensor([-2.0, 0, 2]))[:, None, None])
    assert torch.allclose(plain[:, :1].expand(-1, 3, -1, -1), plain)
    opacity = field.render_rays(*rays).opacity
    assert (plain[:, :1] >= 0.2 * opacity - 1e-9).all()
    assert (plain[:, :1] <= opacity + 1e-9).all()
    assert (plain[:, :1] - 0.2 * opacity).max() > 0.2


def test_a_neural_background_is_a_function_of_the_direction_and_gives_way_to_a_backdrop() -> None:
    field = grown(replace(SMALL, background="neural"))
    with torch.no_grad():
        field.network.layers[-1].weight[0].zero_()
        field.network.layers[-1].bias[0] = -1e3  # nothing there
    origins, directions = rays_of()
    seen = field.render_rays(origins, directions).rgb
    expected = field.background(directions.view(-1, 3)).view(2, 6, 6, 3).permute(0, 3, 1, 2)
    assert torch.allclose(seen, expected)
    assert seen.std(dim=(0, 2, 3)).min() > 0.005
    elsewhere = field.render_rays(0.9 * origins + 0.1, directions).rgb
    assert torch.allclose(seen, elsewhere)
    backdrop = torch.rand(2, 3)
    over = field.render_rays(origins, directions, background=backdrop).rgb
    assert torch.allclose(over, backdrop.double()[:, :, None, None].expand(2, 3, 6, 6))


def test_a_grid_that_is_full_changes_nothing_and_an_empty_one_shows_the_background() -> None:
    plain = grown()
    culled = grown(replace(SMALL, occupancy=OccupancyConfig(resolution=6)))
    assert culled.occupancy is not None
    options = {"normals": True, "light": lamps(), "jitter": True}
    pictures = []
    for field in (plain, culled):  # a new grid counts as full
        torch.manual_seed(0)
        pictures.append(field.render_rays(*rays_of(), **options))
    for name in ("rgb", "opacity", "depth", "normal", "orientation_penalty"):
        assert torch.equal(*(getattr(picture, name) for picture in pictures))
    culled.occupancy.values.zero_()
    empty = culled.render_rays(*rays_of(), **options)
    expected = torch.tensor(SMALL.background_colour).double()[None, :, None, None]
    assert torch.equal(empty.rgb, expected.expand(2, 3, 6, 6))
    assert not empty.opacity.any()
    empty.rgb.sum().backward()  # nothing to learn, but no error either


def test_what_a_render_draws_does_not_depend_on_what_is_there() -> None:
    field = grown(replace(SMALL, occupancy=OccupancyConfig(resolution=6)))
    assert field.occupancy is not None
    after = []
    for occupied in (1.0, 0.0):
        field.occupancy.values.fill_(occupied)
        torch.manual_seed(0)
        field.render_rays(*rays_of(), jitter=True, normals=True, normal_smoothness=True)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_normal_smoothness_measures_how_normals_turn() -> None:
    torch.manual_seed(0)
    smooth, rough = NerfField(SMALL).double(), grown()
    values = []
    for field in (smooth, rough):
        render = field.render_rays(*rays_of(), normals=True, normal_smoothness=True)
        assert render.normal_smoothness is not None
        values.append(render.normal_smoothness.item())
    # On a sphere normals turn by displacement / r: with 0.01 and r of 0.1 to 0.5 that is a few hundredths.
    assert 0.005 < values[0] < 0.05
    assert values[1] > 1.2 * values[0]


def test_levels_come_in_with_the_step() -> None:
    encoding = replace(SMALL.encoding, start_level=1, every=10, after=100)
    field = grown(replace(SMALL, encoding=encoding))
    rays = rays_of()
    pictures = [field.render_rays(*rays, step=step).rgb for step in (0, 100, 110, 120, None)]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[1], pictures[2])
    assert not torch.allclose(pictures[2], pictures[3])
    assert torch.equal(pictures[3], pictures[4])


def test_a_step_repeats_to_the_bit() -> None:
    torch.manual_seed(0)
    field = NerfField(replace(SMALL, occupancy=OccupancyConfig(resolution=6)))
    rays = random_cameras(2).rays(8, 8)
    gradients = []
    for _ in range(2):
        torch.manual_seed(1)
        field.zero_grad()
        render = field.render_rays(*rays, jitter=True, normals=True, light=lamps())
        (render.rgb.square().sum() + render.orientation_penalty).backward()
        gradients.append([p.grad.clone() for p in field.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"width": 0}, "width"),
        ({"depth": 0}, "depth"),
        ({"radius": 0.0}, "radius"),
        ({"samples": 0}, "samples"),
        ({"blob_radius": 0.0}, "blob_radius"),
        ({"normals": "guessed"}, "normals"),
        ({"normal_step": 0.0}, "normal_step"),
        ({"background": "black"}, "background"),
        ({"background_colour": (0.0, 0.0, 2.0)}, "background_colour"),
        ({"surface_density": 0.0}, "surface_density"),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        NerfConfig(**options)
