from __future__ import annotations

import math

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.world import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    Subject,
    all_subjects,
    held_out_subjects,
    parse_prompt,
    render,
    render_shading,
)
from picardopt_3d.world.views import _trace


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_is_the_object_on_the_plain_background(shape: str) -> None:
    rgb, alpha = render(Subject(shape, "green"), turntable_cameras(3, elevation=20.0), 24, 20)
    assert rgb.shape == (3, 3, 24, 20)
    assert alpha.shape == (3, 1, 24, 20)
    assert 0 <= rgb.min() <= rgb.max() <= 1
    background = torch.tensor(BACKGROUND)[:, None]
    empty = (alpha == 0).expand_as(rgb)
    assert torch.equal(rgb[empty], background.expand(3, empty[:, 0].sum()).T.flatten())
    assert (alpha[:, :, [0, -1]] == 0).all()  # nothing is cut off by the frame
    assert (alpha[:, :, :, [0, -1]] == 0).all()
    assert alpha.max() == 1
    # Solid pixels are the colour at some brightness; it varies, so that the shape shows.
    solid = rgb.permute(0, 2, 3, 1)[alpha[:, 0] == 1]
    brightness = solid / torch.tensor(COLOURS["green"])
    torch.testing.assert_close(brightness, brightness[:, :1].expand(-1, 3), atol=1e-5, rtol=1e-5)
    assert brightness.std() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fit_their_sphere_and_distances_never_overshoot(shape: str) -> None:
    """A sphere tracer may not step over a surface: |d(a) - d(b)| <= |a - b|."""
    distance = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(20_000, 3, generator=generator) * 0.4
    outside = points[points.norm(dim=-1) > 0.52]
    assert (distance(outside) > 0).all()
    assert (distance(points) < 0).any()
    moved = points + 0.05 * torch.randn(points.shape, generator=generator)
    change = (distance(moved) - distance(points)).abs()
    assert (change <= (moved - points).norm(dim=-1) * (1 + 1e-3) + 1e-6).all()


def test_a_ray_hits_a_sphere_where_geometry_says() -> None:
    """Ray by ray: it hits if it passes the centre within the radius, and where the quadratic says."""
    cameras = orbit_cameras(torch.tensor([0.0, 50.0]), torch.tensor([0.0, 70.0]), 1.6, 44.0)
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays(256, 256))
    points, hit = _trace(SHAPES["sphere"], origins, directions)
    along = -(origins * directions).sum(-1)
    miss = (origins + along[:, None] * directions).norm(dim=-1) - 0.4
    clear = miss.abs() > 1e-5  # a step of the tracer can jump over that much
    assert (~clear).sum() < 20
    assert torch.equal(hit[clear], miss[clear] < 0)
    depth = (0.4**2 - (miss[hit] + 0.4).square()).clamp(min=0).sqrt()
    truth = origins[hit] + (along[hit] - depth)[:, None] * directions[hit]
    steep = depth > 0.3  # refining a slanting hit converges more slowly
    torch.testing.assert_close(points[hit][steep], truth[steep], atol=1e-4, rtol=0)


def test_a_ray_hits_a_cube_where_geometry_says() -> None:
    """Ray by ray against slabs; only rays that cut off less than a tracer's step at an edge may differ."""
    cameras = orbit_cameras(torch.tensor([0.0, 35.0]), torch.tensor([0.0, 20.0]), 1.6, 44.0)
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays(256, 256))
    _, hit = _trace(SHAPES["cube"], origins, directions)
    slabs = torch.stack([(side - origins) / directions for side in (-0.29, 0.29)])
    chord = slabs.amax(0).amin(-1) - slabs.amin(0).amax(-1)  # out of the first slab - into the last
    assert torch.equal(hit[chord > 2e-3], torch.ones_like(hit[chord > 2e-3]))
    assert not hit[chord < -1e-5].any()
    assert hit.sum().item() == pytest.approx((chord > 0).sum().item(), rel=2e-3)


def test_a_sphere_covers_what_geometry_says() -> None:
    """A ball of radius r at distance d fills a disc of radius tan(asin(r / d)) / tan(fov / 2) half-heights."""
    _, alpha = render(Subject("sphere", "red"), orbit_cameras(0.0, 0.0, 1.6, 44.0), 128, 128)
    radius = math.tan(math.asin(0.4 / 1.6)) / math.tan(math.radians(22))
    assert alpha.mean().item() == pytest.approx(math.pi * radius**2 / 4, rel=1e-3)


def test_which_shapes_look_alike_from_all_sides() -> None:
    """Silhouettes: bodies of revolution do not change with the azimuth, the others do."""
    cameras = orbit_cameras(15.0, torch.tensor([0.0, 40.0, 100.0]))
    for shape in SHAPES:
        alpha = render_shading(shape, cameras, 32, 32)[:, 1]
        change = (alpha - alpha[:1]).abs().mean().item()
        if shape in ("sphere", "cylinder", "cone", "torus"):
            assert change < 0.001, shape
        else:
            assert change > 0.003, shape


def test_the_light_is_fixed_in_the_world_and_tells_the_sides_apart() -> None:
    shading = render_shading("sphere", turntable_cameras(4, elevation=0.0), 33, 33)
    middle = shading[:, 0, 16, 16]
    assert torch.pdist(middle[:, None]).min() > 0.02
    assert shading[:, 0, 8, 16].min() > shading[:, 0, 24, 16].min()  # lit from above


def test_shapes_differ_from_each_other() -> None:
    cameras = turntable_cameras(4, elevation=25.0)
    views = torch.stack([render_shading(shape, cameras, 32, 32).flatten() for shape in SHAPES])
    assert torch.pdist(views).min() / views.shape[1] ** 0.5 > 0.08


def test_more_samples_a_pixel_converge() -> None:
    cameras = turntable_cameras(2)
    coarse, fine, finest = (render_shading("chair", cameras, 16, 16, n) for n in (1, 2, 4))
    assert (fine - finest).square().mean() < (coarse - finest).square().mean()


def test_prompts_are_parsed_back() -> None:
    assert len(all_subjects()) == len(set(all_subjects())) == 64
    for subject in all_subjects():
        for caption in subject.captions:
            assert parse_prompt(caption) == subject
    assert parse_prompt("A RED Cube!") == Subject("cube", "red")
    for other in (
        "",
        "a cube",
        "a red thing",
        "a red cube and a blue cube",
        "a redcube",
        "an astronaut",
    ):
        assert parse_prompt(other) is None


def test_held_out_subjects_cover_each_shape_and_colour_once() -> None:
    held_out = held_out_subjects()
    assert {subject.shape for subject in held_out} == set(SHAPES)
    assert {subject.colour for subject in held_out} == set(COLOURS)
    assert len(held_out) == 8


def test_unknown_words_are_named() -> None:
    with pytest.raises(ValueError, match=r"shape='dog'.*cube"):
        Subject("dog", "red")
    with pytest.raises(ValueError, match="colour='pink'"):
        Subject("cube", "pink")
    with pytest.raises(ValueError, match="shape='dog'"):
        render_shading("dog", turntable_cameras(1), 8, 8)
