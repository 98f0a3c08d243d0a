from __future__ import annotations

import math

import pytest
import torch
from picardopt_3d.cameras import (
    CONDITION_SIZE,
    CameraConfig,
    Cameras,
    orbit_cameras,
    random_cameras,
    turntable_cameras,
)


def project(cameras: Cameras, point: torch.Tensor) -> torch.Tensor:
    """Where a world point falls, in half-heights right of and above the middle. [batch, 2]."""
    local = torch.linalg.inv(cameras.camera_to_world) @ torch.cat([point, torch.ones(1)])
    half = torch.tan(torch.deg2rad(cameras.fov) / 2)
    return local[:, :2] / (-local[:, 2:3] * half[:, None])


def test_poses_are_rotations_that_look_at_the_origin() -> None:
    cameras = orbit_cameras(torch.tensor([-90.0, -10.0, 0.0, 45.0, 90.0]), 33.0, 2.0, 40.0)
    rotation = cameras.camera_to_world[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(5, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(5))
    torch.testing.assert_close(cameras.position.norm(dim=-1), torch.full((5,), 2.0))
    torch.testing.assert_close(project(cameras, torch.zeros(3)), torch.zeros(5, 2))


def test_known_views() -> None:
    """From +x at the horizon: y to the right, z up; from +y, x to the left; from above, -x is up."""
    front, side, above = (
        orbit_cameras(*angles) for angles in ((0.0, 0.0), (0.0, 90.0), (90.0, 0.0))
    )
    torch.testing.assert_close(front.position, torch.tensor([[front.distance.item(), 0.0, 0.0]]))
    right, up = torch.tensor([0.0, 0.3, 0.0]), torch.tensor([0.0, 0.0, 0.3])
    assert project(front, right)[0, 0] > 0.1
    assert abs(project(front, right)[0, 1]) < 1e-6
    assert project(front, up)[0, 1] > 0.1
    assert project(side, torch.tensor([0.3, 0.0, 0.0]))[0, 0] < -0.1
    assert project(above, torch.tensor([-0.3, 0.0, 0.0]))[0, 1] > 0.1


def test_rays_are_unit_and_go_through_the_projected_pixels() -> None:
    cameras = random_cameras(4)
    height, width = 6, 10
    origins, directions = cameras.rays(height, width)
    assert origins.shape == directions.shape == (4, height, width, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(4, height, width))
    row, column = 1, 7
    for index in range(4):
        point = origins[index, row, column] + 1.3 * directions[index, row, column]
        x, y = project(cameras[index : index + 1], point)[0]
        assert x.item() == pytest.approx((2 * column + 1 - width) / height, abs=1e-5)
        assert y.item() == pytest.approx(1 - (2 * row + 1) / height, abs=1e-5)


def test_cameras_in_another_type_of_number() -> None:
    cameras = orbit_cameras(10.0, torch.tensor([0.0, 90.0]))
    double = cameras.to(torch.float64)
    assert double.fov.dtype == double.position.dtype == torch.float64
    torch.testing.assert_close(double.position.float(), cameras.position)


def test_the_field_of_view_is_vertical() -> None:
    cameras = orbit_cameras(20.0, 50.0, fov=60.0)
    _, directions = cameras.rays(2001, 1)
    angle = torch.acos((directions[0, 0, 0] * directions[0, -1, 0]).sum())
    assert math.degrees(angle.item()) == pytest.approx(60.0, abs=0.05)


def test_random_cameras_follow_the_recipe() -> None:
    torch.manual_seed(0)
    config = CameraConfig(elevation=(-10.0, 60.0), distance=(1.2, 1.4), fov=(30.0, 35.0))
    cameras = random_cameras(20_000, config)
    strata = ((cameras.azimuth + 180) / 360 * 20_000).floor().clamp(0, 19_999)
    assert (strata - torch.arange(20_000)).abs().max() <= 1  # one a stratum, to rounding
    for values, (low, high) in ((cameras.distance, config.distance), (cameras.fov, config.fov)):
        assert low <= values.min() < low + 0.01 * (high - low) + 1e-4
        assert high >= values.max() > high - 0.01 * (high - low) - 1e-4
    # The mean elevation: half of 25 degrees (uniform in degrees), half of the mean over the area.
    low, high = math.radians(-10), math.radians(60)
    area = (high * math.sin(high) + math.cos(high) - low * math.sin(low) - math.cos(low)) / (
        math.sin(high) - math.sin(low)
    )
    expected = (25 + math.degrees(area)) / 2
    assert cameras.elevation.mean().item() == pytest.approx(expected, abs=0.5)
    below_zero = (cameras.elevation < 0).float().mean().item()
    share = math.sin(math.radians(10)) / (math.sin(high) - math.sin(low))
    assert below_zero == pytest.approx((10 / 70 + share) / 2, abs=0.01)


def test_random_cameras_draw_from_torchs_global_generator_only() -> None:
    torch.manual_seed(5)
    first = random_cameras(3)
    torch.manual_seed(5)
    again, other = random_cameras(3), random_cameras(3)
    assert torch.equal(first.camera_to_world, again.camera_to_world)
    assert not torch.equal(first.camera_to_world, other.camera_to_world)


def test_the_condition_tells_cameras_apart_and_is_periodic() -> None:
    cameras = random_cameras(64)
    condition = cameras.condition()
    assert condition.shape == (64, CONDITION_SIZE)
    distances = torch.cdist(condition, condition) + torch.eye(64)
    assert distances.min() > 1e-3
    assert condition.norm(dim=-1).min() > 1  # never near the zero vector, which means "unknown"
    around = orbit_cameras(10.0, torch.tensor([-170.0, 190.0])).condition()
    torch.testing.assert_close(around[0], around[1], atol=1e-5, rtol=0)


def test_turntable_and_slices() -> None:
    cameras = turntable_cameras(8, elevation=12.0)
    torch.testing.assert_close(cameras.azimuth, torch.arange(8) * 45.0)
    part = cameras[2:4]
    assert len(part) == 2
    assert torch.equal(part.camera_to_world, cameras.camera_to_world[2:4])
    with pytest.raises(TypeError, match=r"cameras\[3:4\]"):
        cameras[3]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("elevation", (30.0, 10.0)),
        ("elevation", (-100.0, 10.0)),
        ("distance", (0.0, 1.0)),
        ("fov", (40.0, 180.0)),
    ],
)
def test_bad_ranges_are_named(name: str, value: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=name):
        CameraConfig(**{name: value})
