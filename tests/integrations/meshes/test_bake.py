"""Baking: means over views in any order, what no view sees, what hides what; and where a surface's outlines are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.scenes import Render, Scene, Surface, TexturedMeshConfig
from picardopt_3d.scenes.mesh import bake as baking
from picardopt_3d.scenes.mesh.bake import Seen, bake
from picardopt_3d.scenes.mesh.extract import extract_triangles, sample
from picardopt_3d.scenes.mesh.outline import best_level, level_of
from picardopt_3d.scenes.mesh.surfaces import NoSurfaceError
from picardopt_3d.scenes.mesh.texels import texels_of
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped, unwrap
from picardopt_3d.scenes.mesh.viewpoints import VIEWS, views_around
from torch import Tensor

from tests.integrations.helpers.analytic import Balls
from tests.integrations.helpers.textures import ball

SMALL = TexturedMeshConfig(resolution=24, texture=64, view_pixels=48)


@pytest.fixture(scope="module")
def mesh() -> tuple[Triangles, Unwrapped]:
    triangles = ball(24)
    return triangles, unwrap(triangles, 64)


class Flickering(Balls):
    """A ball each of whose views is in a colour of its own: no two agree."""

    def render(self, cameras: Cameras, size: int | tuple[int, int], **options: object) -> Render:
        seen = super().render(cameras, size, background=torch.zeros(len(cameras), 3))
        own = torch.stack(
            [(13.7 * cameras.azimuth + k * cameras.elevation).sin() for k in (1, 2, 3)], 1
        )
        return replace(seen, rgb=(0.5 + 0.5 * own)[:, :, None, None] * seen.opacity)


def test_a_texture_does_not_depend_on_the_order_of_views(
    mesh: tuple[Triangles, Unwrapped], monkeypatch: pytest.MonkeyPatch
) -> None:
    triangles, flat = mesh
    forward = bake(triangles, flat, Flickering(), SMALL)
    assert float(forward.std()) > 0.02  # the views do disagree

    def backward(*arguments: object) -> Cameras:
        return views_around(*arguments)[torch.arange(VIEWS - 1, -1, -1)]  # type: ignore[arg-type]

    monkeypatch.setattr(baking, "views_around", backward)
    assert torch.allclose(bake(triangles, flat, Flickering(), SMALL), forward, atol=1e-6)


def test_texels_have_the_colour_of_their_place(mesh: tuple[Triangles, Unwrapped]) -> None:
    triangles, flat = mesh
    told: list[int] = []
    colours = bake(triangles, flat, Balls(), SMALL, progress=told.append)
    assert told == [1] * VIEWS
    texels = texels_of(flat, 64)
    found = colours.view(-1, 3)[texels.place]
    assert float((found - texels.points(triangles) - 0.5).abs().max()) < 0.03


def two_balls() -> Balls:
    """A small ball in front of a large one, each of which hides parts of the other."""
    return Balls([(-0.1, 0.0, 0.0, 0.25), (0.3, 0.0, 0.0, 0.1)])


class Marked(Scene):
    """Two balls, the large one red and the small one green; views are traced, and colours in space are blue."""

    def __init__(self) -> None:
        super().__init__()
        self.balls = two_balls()

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return self.balls.groups()

    def surface(self) -> Surface:
        blue = torch.tensor([0.0, 0.0, 1.0])
        return replace(self.balls.surface(), colour=lambda points: blue.expand(len(points), 3))

    def render(self, cameras: Cameras, size: int | tuple[int, int], **options: object) -> Render:
        assert isinstance(size, int)
        origins, directions = cameras.rays(size, size)
        rgb, nearest = torch.zeros(*origins.shape), torch.full(origins.shape[:-1], math.inf)
        for (*centre, radius), colour in zip(
            self.balls.balls.tolist(), ([1.0, 0, 0], [0, 1.0, 0]), strict=True
        ):
            away = origins - torch.tensor(centre)
            middle = -(away * directions).sum(-1)
            squared = radius**2 - (away.square().sum(-1) - middle.square())
            depth = torch.where(squared > 0, middle - squared.clamp_min(0).sqrt(), math.inf)
            rgb = torch.where((depth < nearest)[..., None], torch.tensor(colour), rgb)
            nearest = torch.minimum(nearest, depth)
        opacity = nearest.isfinite()[:, None].float()
        return Render(rgb.movedim(-1, 1), opacity, torch.zeros_like(opacity))


def test_nothing_wears_the_colour_of_what_is_in_front_of_it() -> None:
    scene = Marked()
    triangles = extract_triangles(scene.surface(), 48)
    flat = unwrap(triangles, 64)
    colours = bake(triangles, flat, scene, SMALL)
    texels = texels_of(flat, 64)
    green = texels.points(triangles)[:, 0] > 0.18
    found = colours.view(-1, 3)[texels.place]
    wanted = torch.where(green[:, None], torch.tensor([0, 1.0, 0]), torch.tensor([1.0, 0, 0]))
    error = (found - wanted).abs().amax(1)
    assert float(error.max()) < 0.1  # where the balls almost touch, views are too coarse
    assert float(error.quantile(0.99)) < 0.01


def test_what_no_view_sees_has_the_colour_of_space() -> None:
    scene = Marked()
    triangles = extract_triangles(scene.surface(), 32)
    # A wall around the large ball's back, so that no view sees it.
    wall = extract_triangles(Balls([(-0.25, 0.0, 0.0, 0.24)]).surface(), 24)
    both = Triangles(
        torch.cat([triangles.vertices, wall.vertices]),
        torch.cat([triangles.faces, wall.faces + len(triangles.vertices)]),
    )
    flat = unwrap(both, 64)
    colours = bake(both, flat, scene, replace(SMALL, view_pixels=96))
    texels = texels_of(flat, 64)
    points = texels.points(both)
    hidden = (texels.face < len(triangles.faces)) & (
        (points - torch.tensor([-0.25, 0, 0])).norm(dim=1) < 0.15
    )
    assert int(hidden.sum()) > 20
    found = colours.view(-1, 3)[texels.place[hidden]]
    assert torch.allclose(found, torch.tensor([0.0, 0.0, 1.0]), atol=1e-3)


def test_views_that_look_squarely_count_more(mesh: tuple[Triangles, Unwrapped]) -> None:
    triangles, flat = mesh
    texels = texels_of(flat, 64)
    found = Seen(triangles, texels)
    scene = Balls()
    for azimuth, shade in ((0.0, 1.0), (60.0, 0.0)):
        camera = orbit_cameras(0.0, azimuth)
        view = scene.render(camera, 64)
        found.add(camera, shade * view.opacity.expand(-1, 3, -1, -1), view.opacity)
    points = texels.points(triangles)
    at_front = (points - torch.tensor([0.4, 0, 0])).norm(dim=1) < 0.05
    means, weights = found.mean(), found.weights
    assert bool((means[at_front] > 0.6).all())
    assert bool((weights[at_front] > 0).all())
    assert bool((weights[points[:, 0] < -0.3] == 0).all())


# Outlines.


class Swollen(Balls):
    """A ball whose views show it larger than its surface is."""

    def __init__(self, by: float, opacity: float = 1.0) -> None:
        super().__init__([(0.0, 0.0, 0.0, 0.3)])
        self.by, self.opacity = by, opacity

    def render(self, cameras: Cameras, size: int | tuple[int, int], **options: object) -> Render:
        seen = Balls([(0.0, 0.0, 0.0, 0.3 + self.by)]).render(cameras, size)
        return replace(seen, opacity=self.opacity * seen.opacity)


@pytest.mark.parametrize("by", [-0.1, -0.03, 0.0, 0.05, 0.1])
def test_the_level_is_where_the_views_end(by: float) -> None:
    scene = Swollen(by)
    level = level_of(scene, sample(scene.surface(), 40), SMALL)
    assert level == pytest.approx(-by, abs=0.006)


def test_the_best_level_is_found_by_trying_all() -> None:
    generator = torch.Generator().manual_seed(0)
    highest = torch.randn(200, generator=generator)
    opacity = torch.sigmoid(4 * highest + torch.randn(200, generator=generator))

    def error(level: float) -> float:
        return float(((highest > level).float() - opacity).square().sum())

    found = best_level(highest, opacity)
    assert error(found) <= min(error(float(level) - 1e-6) for level in highest) + 1e-9
    # Of many that are as good, the one nearest to 0.
    assert best_level(torch.tensor([5.0, -3.0]), torch.tensor([1.0, 0.0])) == 0.0
    assert best_level(torch.tensor([9.0, 1.0]), torch.tensor([1.0, 0.0])) == 3.0
    assert best_level(torch.tensor([-1.0, -9.0]), torch.tensor([1.0, 0.0])) == -3.0


def test_a_scene_that_fills_its_views_has_no_outlines() -> None:
    with pytest.raises(NoSurfaceError, match=r"opaque all over its views.*view_distance"):
        best_level(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 0.9, 0.8]))


def test_nothing_opaque_has_no_outlines() -> None:
    scene = Swollen(0.0, opacity=0.02)
    with pytest.raises(NoSurfaceError, match="scene before is empty: hardly anything"):
        level_of(scene, sample(scene.surface(), 16), SMALL)


def test_views_see_all_of_it() -> None:
    cameras = views_around(0.5)
    assert len(cameras) == VIEWS
    opacity = Balls([(0.0, 0.0, 0.0, 0.5)]).render(cameras, 32).opacity[:, 0]
    border = torch.cat([opacity[:, 0], opacity[:, -1], opacity[:, :, 0], opacity[:, :, -1]], 1)
    assert not bool(border.any())
    directions: Tensor = cameras.position / cameras.distance[:, None]
    around = torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
    assert float((around @ directions.T).amax(1).min()) > 0.8  # none is far from a camera
    assert torch.allclose(views_around(0.5, 2.0, 30.0).distance, torch.tensor(2.0))
