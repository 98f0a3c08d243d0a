"""Tetrahedral scenes made of other scenes: their shape, their colours, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.scenes import (
    FieldConfig,
    Gaussians,
    GaussiansConfig,
    NerfConfig,
    NerfField,
    RadianceField,
    Scene,
    SdfConfig,
    SdfField,
    Tetrahedral,
    build_scene,
)
from picardopt_3d.scenes.mesh.conversion import outline_level
from picardopt_3d.world.shapes import SHAPES
from torch import Tensor

from tests.integrations.helpers.analytic import Balls, voxels
from tests.integrations.helpers.splats import shell as shell_of_splats
from tests.integrations.helpers.tetrahedra import ENCODING, config, rugged
from tests.integrations.meshes.test_marching import assert_closed, euler, volume

CAMERAS = turntable_cameras(4, elevation=25.0)
ORIGIN = torch.zeros(3)


def converted(other: Scene, resolution: int = 14, **changes: Any) -> Tetrahedral:
    torch.manual_seed(0)
    scene = Tetrahedral.from_scene(config(resolution, **changes), other)
    assert_closed(scene.shell().triangles)
    return scene


def radii(scene: Tetrahedral) -> Tensor:
    return scene.shell().triangles.vertices.norm(dim=1)


@pytest.mark.parametrize("name", ["snowman", "torus", "chair"])
def test_a_field_keeps_its_shape_and_colours(name: str) -> None:
    """Against a field that is opaque inside of a known shape."""
    colour = torch.tensor([0.8, 0.3, 0.2])
    field = voxels(SHAPES[name], (0.8, 0.3, 0.2))
    scene = converted(field, 20)
    with torch.no_grad():
        true, found = field.render(CAMERAS, 48), scene.render(CAMERAS, 48)
    both = (true.opacity > 0.5) & (found.opacity > 0.5)
    either = (true.opacity > 0.5) | (found.opacity > 0.5)
    assert both.sum() / either.sum() > 0.9
    seen = found.rgb.movedim(1, -1)[found.opacity[:, 0] == 1]
    assert (seen - colour).abs().mean() < 0.02
    vertices = scene.shell().triangles.vertices
    assert SHAPES[name](vertices).abs().mean() < 0.2 * float(scene.cell)


@pytest.mark.parametrize("resolution", [8, 14])
def test_a_ball_much_smaller_than_the_cube_keeps_its_size(resolution: int) -> None:
    """With few cells the cube around it still shrinks when the last look has been taken."""
    scene = converted(Balls([(0.0, 0.0, 0.0, 0.1)]), resolution, radius=2.0)
    assert radii(scene).sub(0.1).abs().max() < 0.1 * float(scene.cell)


def soft_ball(edge: float, height: float, radius: float = 0.35) -> Callable[[Tensor], Tensor]:
    """A density that falls from `height` to 0 over a distance of about 4 x `edge`."""
    return lambda points: height * torch.sigmoid((radius - points.norm(dim=1)) / edge)


@pytest.mark.parametrize("edge", [1e-4, 0.01, 0.03])
@pytest.mark.parametrize("height", [4.0, 40.0, 1000.0])
def test_the_level_is_where_the_outline_is(edge: float, height: float) -> None:
    """The ray that just meets the level set is half as opaque as the most opaque one, however soft the field is."""
    density = soft_ball(edge, height)
    level = outline_level(density, ORIGIN, 0.6)
    assert 0 < level < height
    across = torch.linspace(0, 0.6, 2001)
    outline = float(across[density(across[:, None] * torch.eye(3)[:1]) > level].max())
    along = torch.linspace(-0.6, 0.6, 4001)
    rays = across[::20, None, None] * torch.eye(3)[0] + along[:, None] * torch.eye(3)[1]
    depth = density(rays.view(-1, 3)).view(len(rays), -1).sum(1) * 1.2 / 4000
    opacity = -torch.expm1(-depth)
    expected = float(across[::20][opacity > opacity.max() / 2].max())
    assert outline == pytest.approx(expected, abs=0.02)
    if height > 10 and edge < 0.02:
        assert outline == pytest.approx(0.35, abs=0.6 * 1.2 / 40 + 4 * edge)


def test_haze_and_dense_cores_do_not_move_the_level() -> None:
    """A mean of the density, or a volume that counts the haze, would."""
    ball = soft_ball(0.01, 40.0)

    def hazy(points: Tensor) -> Tensor:
        return ball(points) + 0.1

    def cored(points: Tensor) -> Tensor:
        return ball(points) + 5e3 * (points.norm(dim=1) < 0.1)

    level = outline_level(ball, ORIGIN, 0.6)
    assert outline_level(hazy, ORIGIN, 0.6) == pytest.approx(level, rel=0.3)
    assert outline_level(cored, ORIGIN, 0.6) == pytest.approx(level, rel=1e-6)


def test_a_field_of_one_density_is_inside_as_a_whole() -> None:
    level = outline_level(lambda points: 3.0 * (points.norm(dim=1) < 0.4), ORIGIN, 0.6)
    assert 0 < level < 3.0


@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (0.25, -0.2, 0.1)])
def test_the_cube_fits_the_shape(centre: tuple[float, float, float]) -> None:
    """A small ball in a large cube gets the grid's cells, with space to grow."""
    scene = converted(Balls([(*centre, 0.15)]), 12, radius=2.0)
    assert float(scene.cell) < 0.6 / 12
    assert torch.allclose(scene.centre, torch.tensor(centre), atol=0.06)
    triangles = scene.shell().triangles
    assert float(volume(triangles)) == pytest.approx(4 / 3 * math.pi * 0.15**3, rel=0.1)
    assert ((triangles.vertices - scene.centre).abs() < 6 * scene.cell - scene.cell).all()


def test_distances_are_those_of_the_surface() -> None:
    """Where the other scene has nothing but a level set of any slope: in cells, exact near the surface, limited."""
    ball = Balls([(0.0, 0.0, 0.0, 0.4)])
    honest = ball.surface

    def steep() -> Any:
        return replace(
            honest(), level_set=lambda p: 30 * ball.level_set(p) + ball.level_set(p) ** 3
        )

    ball.surface = steep  # type: ignore[method-assign]
    scene = converted(ball, 16)
    points = scene.centre + scene.cell * scene.lattice
    true = (points.norm(dim=1) - 0.4) / scene.cell
    near = true.abs() < 2
    assert (scene.distance - true)[near].abs().max() < 0.15
    assert scene.distance.abs().max() <= 4
    assert ((scene.distance < 0) == (true < 0))[true.abs() > 0.05].all()
    assert (radii(scene) - 0.4).abs().max() < 0.05 * float(scene.cell)


def test_a_signed_distance_is_taken_over() -> None:
    field = SdfField(SdfConfig(ENCODING, 8, radius=0.6, surface_radius=0.4, background="solid"))
    with torch.no_grad():
        field.encoding.table.normal_()
        field.network.layers[-1].weight.normal_(std=0.02)
        scene = converted(field, 12)
        points = scene.centre + scene.cell * scene.lattice
        expected = torch.maximum(field.signed_distance(points), points.norm(dim=1) - 0.6)
    inner = ~scene.border
    expected = (expected / scene.cell).clamp(-4, 4)
    assert torch.allclose(scene.distance[inner], expected[inner], atol=1e-5)


def test_gaussians_give_their_surface() -> None:
    splats = shell_of_splats(600, 0.35, 0.03)
    scene = converted(Gaussians(GaussiansConfig(count=600, strategy=None), splats), 16)
    assert 0.35 < float(radii(scene).amax()) < 0.5
    triangles = scene.shell().triangles
    outer = triangles.vertices[triangles.vertices.norm(dim=1) > 0.35]
    found = scene.colours(outer).T
    assert (found - (outer + 0.5).clamp(0, 1)).abs().mean() < 0.06


def test_holes_that_nobody_sees_are_filled() -> None:
    """Of a ball with an empty core; a field may have any density where no light gets to."""
    hollow = voxels(lambda points: (points.norm(dim=-1) - 0.3).abs() - 0.12, (0.8, 0.3, 0.2))
    scene = converted(hollow, 14)
    triangles = scene.shell().triangles
    assert euler(triangles) == 2
    assert triangles.vertices.norm(dim=1).amin() > 0.35
    assert float(volume(triangles)) == pytest.approx(4 / 3 * math.pi * 0.42**3, rel=0.1)


def test_noise_of_a_field_makes_no_pinholes() -> None:
    field = voxels(lambda points: 0.1 * (points.norm(dim=-1) - 0.35), (0.8, 0.3, 0.2))
    noise = torch.randn(field.levels[0][0].shape, generator=torch.Generator().manual_seed(0))
    field.levels[0].data[0] += 3 * noise
    assert euler(converted(field, 16).shell().triangles) == 2


def test_what_is_seen_of_a_soft_surface_is_its_colour() -> None:
    """A red skin over a green core: the surface lies in both, and shows what the field shows."""
    field = RadianceField(FieldConfig(resolutions=(32,), radius=0.6, samples=64))
    distance = field.voxels().norm(dim=-1)
    with torch.no_grad():
        field.levels[0][0] = 60 * (0.4 - distance) + 4 - field.blob
        skin = distance > 0.3
        field.levels[0][1:] = (
            torch.where(skin, 1.0, -1.0) * torch.tensor([4.0, -4.0, -4.0])[:, None, None, None]
        )
        scene = converted(field, 14)
        true, found = field.render(CAMERAS, 32), scene.render(CAMERAS, 32)
        shell = scene.shell().triangles
        naive = field.colour(shell.vertices)
        better = scene.colours(shell.vertices).T
    sure = ((true.opacity > 0.97) & (found.opacity == 1)).expand_as(true.rgb)
    middle = true.rgb.movedim(1, -1)[(true.opacity > 0.97)[:, 0]].mean(0)
    assert (true.rgb - found.rgb)[sure].abs().mean() < 0.15
    assert (better - middle).abs().mean() < 0.5 * (naive - middle).abs().mean()


@pytest.mark.parametrize("kind", ["nerf", "sdf"])
def test_colours_of_the_same_sizes_start_as_a_copy(kind: str) -> None:
    """And keep their details: half a cell off the surface, too, where nothing is fitted exactly."""
    given: dict[str, Any] = {"radius": 0.6, "background": "solid", "samples": 8}
    field: Any = (
        NerfField(NerfConfig(ENCODING, 8, blob_scale=40.0, **given))
        if kind == "nerf"
        else SdfField(SdfConfig(ENCODING, 8, surface_radius=0.4, **given))
    )
    with torch.no_grad():
        field.encoding.table.normal_()
        if kind == "nerf":
            field.network.layers[-1].weight[0] = 0.0
    scene = Tetrahedral(config(8))
    assert scene.colours.copy_from(field)
    points = 1.2 * torch.rand(200, 3) - 0.6
    assert torch.equal(scene.colours(points), field.query(points, None, False).colour)
    for other in (
        config(width=9),
        config(encoding=replace(ENCODING, levels=2)),
        config(radius=0.7),
    ):
        scene = Tetrahedral(other)
        before = {name: value.clone() for name, value in scene.state_dict().items()}
        assert not scene.colours.copy_from(field)
        assert all(torch.equal(value, before[name]) for name, value in scene.state_dict().items())
    same = converted(field, 8)
    points = same.shell().triangles.vertices
    error = (same.colours(points) - field.query(points, None, False).colour).abs().mean()
    assert error < 0.1


@pytest.mark.parametrize("trained", ["all", "shape", "colour"])
@pytest.mark.parametrize("deform", [True, False])
def test_another_grid_is_copied_bit_for_bit(trained: str, deform: bool) -> None:
    before = rugged(background="neural", trained="shape")
    before.centre.fill_(0.05)
    after = build_scene(replace(before.config, trained=trained, deform=deform), before)
    assert isinstance(after, Tetrahedral)
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    assert torch.equal(before.render(CAMERAS, 16).rgb, after.render(CAMERAS, 16).rgb)
    assert bool(after.groups()["shape"]) == (trained != "colour")
    after.distance.data.add_(1.0)
    assert not torch.equal(after.distance, before.distance)


def test_another_grid_with_other_colours_keeps_its_shape_bit_for_bit() -> None:
    before = rugged()
    after = converted(before, 8, width=12)
    for name in ("distance", "offsets", "centre", "cell"):
        assert torch.equal(before.state_dict()[name], after.state_dict()[name])
    points = after.shell().triangles.vertices
    assert (after.colours(points) - before.colours(points)).abs().mean() < 0.12


def test_a_neural_background_takes_over_any_other() -> None:
    directions = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
    field = RadianceField(FieldConfig(resolutions=(8,), background=(0.2, 0.5, 0.9)))
    scene = converted(field, 8, background="neural")
    found = scene.background(directions)
    assert torch.allclose(found, torch.tensor([0.2, 0.5, 0.9]).expand(50, 3), atol=1e-3)
    nerf = NerfField(NerfConfig(ENCODING, 8, radius=0.6, background="neural", samples=8))
    scene = converted(nerf, 8, background="neural")
    assert torch.equal(scene.background(directions), nerf.background(directions))


@pytest.mark.parametrize("kind", ["voxels", "nerf", "sdf", "balls"])
def test_an_empty_scene_is_refused_and_left_as_it_is(kind: str) -> None:
    other: Any
    if kind == "voxels":
        other = RadianceField(FieldConfig(resolutions=(6,), blob_scale=-10.0))
        other.levels[0].data[0] = -30.0
    elif kind == "nerf":
        other = NerfField(NerfConfig(ENCODING, 8, radius=0.6, blob_scale=1e-3, samples=8))
        other.network.layers[-1].bias.data[0] = -30.0
    elif kind == "sdf":
        other = SdfField(SdfConfig(ENCODING, 8, radius=0.6))
        other.network.layers[-1].bias.data[0] = 5.0
    else:
        other = Balls([(0.0, 0.0, 0.0, -1.0)])
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"scene before is empty.*kept.*more steps"):
        Tetrahedral.from_scene(config(8), other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_grid_of_another_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"resolution=10: the grid before has 8 cells"):
        Tetrahedral.from_scene(config(10), rugged(8))


def test_the_same_seed_gives_the_same_bits_and_training_flags_are_kept() -> None:
    field = voxels(SHAPES["snowman"], (0.2, 0.3, 0.9), 12)
    first, second = (converted(field, 8, trained="shape") for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not any(parameter.requires_grad for parameter in first.colours.parameters())
    assert all(parameter.grad is None for parameter in first.parameters())
