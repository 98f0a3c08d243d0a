"""Input at the limits: finite pictures and gradients, or a refusal that names it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.scenes.gaussians.rasterize import Rasterized, chosen, rasterize
from picardopt_3d.scenes.gaussians.splats import Splats, check_finite

from tests.integrations.helpers.splats import leaves, random_splats

CAMERAS = orbit_cameras(torch.tensor([15.0, 0.0]), torch.tensor([0.0, 90.0]))
CAMERA = CAMERAS.position[1].tolist()


def changed(field: str, value: object, count: int = 5, degree: int = 0) -> Splats:
    """Gaussians of which the first has another value."""
    splats = random_splats(count, scale=0.1, degree=degree, dtype=torch.float32)
    getattr(splats, field)[0] = torch.as_tensor(value)
    return splats


def assert_finite(splats: Splats, cameras: Cameras = CAMERAS, degree: int = 0) -> Rasterized:
    splats = leaves(splats)
    pictures = rasterize(splats, cameras, 20, 24, degree=degree)
    (pictures.colour.sum() + pictures.opacity.sum() + pictures.depth.sum()).backward()
    for name, tensor in pictures._asdict().items():
        assert tensor.isfinite().all(), name
    for name, tensor in splats._asdict().items():
        if tensor.numel():
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name
    return pictures


@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one(count: int, degree: int) -> None:
    splats = random_splats(count, scale=0.1, degree=degree, dtype=torch.float32)
    pictures = assert_finite(splats, degree=degree)
    assert bool(pictures.opacity.any()) == bool(count)
    assert pictures.means2d.shape == (2, count, 2)
    assert pictures.radii.shape == (2, count)


@pytest.mark.parametrize("value", [-1e4, -100.0, 50.0, 88.0, 100.0, 1e30, [100.0, -100.0, 0.0]])
def test_scales(value: object) -> None:
    assert_finite(changed("log_scales", value))


def test_an_infinite_scale_covers_everything_evenly() -> None:
    splats = changed("log_scales", 200.0, count=1)
    splats.opacity_logits.fill_(0.0)
    opacity = assert_finite(splats).opacity
    torch.testing.assert_close(opacity, torch.full_like(opacity, 0.5), atol=1e-4, rtol=0)


def test_a_tiny_scale_leaves_the_blur() -> None:
    tiny, small = changed("log_scales", -1e4), changed("log_scales", -12.0)
    torch.testing.assert_close(assert_finite(tiny).colour, assert_finite(small).colour)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, [0.0, 0.0, 0.0, -1e-20]])
def test_quaternions(value: object) -> None:
    """Of any length; that of 0 turns nothing."""
    splats = changed("rotations", value)
    pictures = assert_finite(splats)
    if value == 0.0:
        splats.rotations[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        assert torch.equal(pictures.colour, assert_finite(splats).colour)


@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.parametrize(
    "place",
    [
        pytest.param(CAMERA, id="at the camera"),
        pytest.param([0.0, 3.0, 0.0], id="behind it"),
        pytest.param([0.0, CAMERA[1] - 0.01, 0.0], id="on the near plane"),
        pytest.param([0.001, CAMERA[1], 0.0], id="beside it"),
        pytest.param([1e30, -1e30, 0.0], id="far away"),
        pytest.param([0.0, -1e11, 0.0], id="too far ahead"),
        pytest.param([3e38, 3e38, 3e38], id="at the largest number"),
    ],
)
def test_what_the_camera_cannot_see(place: list[float], degree: int) -> None:
    with_it = assert_finite(changed("means", place, degree=degree), CAMERAS[1:], degree)
    assert with_it.radii[0, 0] == 0
    others = random_splats(5, scale=0.1, degree=degree, dtype=torch.float32)
    others = Splats(*(tensor[1:] for tensor in others))
    without = assert_finite(others, CAMERAS[1:], degree)
    torch.testing.assert_close(with_it.colour, without.colour, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(with_it.depth, without.depth, rtol=1e-5, atol=1e-6)


def test_one_close_to_the_plane_of_the_camera_and_far_aside() -> None:
    """Where the place on the screen is no number any more."""
    along_x = orbit_cameras(0.0, 0.0)
    assert assert_finite(changed("means", [1.63, 3e38, 0.0]), along_x).radii[0, 0] == 0


def test_one_just_beyond_the_near_plane() -> None:
    assert_finite(changed("means", [0.0, CAMERA[1] - 0.0101, 0.0]))


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_opacity_logits(logit: float) -> None:
    splats = changed("opacity_logits", logit)
    pictures = assert_finite(splats)
    assert bool((pictures.radii[:, 0] > 0).all()) == (logit > 0)


def test_a_wall_of_opaque_gaussians() -> None:
    splats = random_splats(60, dtype=torch.float32)
    splats.opacity_logits.fill_(1e4)
    splats.log_scales.fill_(100.0)
    assert float(assert_finite(splats).opacity.detach().amin()) > 0.99


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 40.0, -40.0, 1e4, -1e4, 1e10, -1e30]), min_size=9),
    st.integers(0, 100),
)
def test_any_finite_numbers(values: list[float], seed: int) -> None:
    splats = random_splats(6, seed=seed, dtype=torch.float32)
    for at, value in enumerate(values):
        tensor = splats[at % 4]
        flat = tensor.view(-1)
        flat[(7 * at + seed) % len(flat)] = value
    assert_finite(splats)


def _refusal(field: str, which: str, value: float, row: int) -> str:
    return f"{field}: {which} hold values that are not finite, the first is {value} in row {row}: "


def test_numbers_whose_sum_is_infinite_are_finite() -> None:
    splats = random_splats(4, dtype=torch.float32)
    splats.opacity_logits[:] = 3e38
    check_finite(splats)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", Splats._fields)
def test_what_is_not_finite_is_refused_by_name(field: str, value: float) -> None:
    splats = random_splats(5, degree=1, dtype=torch.float32)
    getattr(splats, field)[3].fill_(value)
    with pytest.raises(ValueError, match=_refusal(field, "1 of 5 Gaussians", value, 3)):
        rasterize(splats, CAMERAS, 8, 8, degree=1)


def test_a_camera_that_is_not_finite_is_refused() -> None:
    cameras = orbit_cameras(0.0, torch.tensor([0.0, float("nan")]))
    with pytest.raises(
        ValueError, match=_refusal("camera_to_world", "1 of 2 cameras", math.nan, 1)
    ):
        rasterize(random_splats(2, dtype=torch.float32), cameras, 8, 8, degree=0)


def test_finite_numbers_with_an_infinite_sum_are_no_fault() -> None:
    assert_finite(changed("means", [3e38, 3e38, 0.0]))


def test_what_has_no_picture_is_refused() -> None:
    splats = random_splats(2, degree=1)
    with pytest.raises(ValueError, match=r"degree=4: give 0 to 3"):
        rasterize(splats, CAMERAS, 8, 8, degree=4)
    with pytest.raises(ValueError, match=r"degree=2 needs 8 rows of harmonics, and there are 3"):
        rasterize(splats, CAMERAS, 8, 8, degree=2)
    with pytest.raises(ValueError, match=r"height=0, width=8"):
        rasterize(splats, CAMERAS, 0, 8, degree=1)


def test_gsplat_is_refused_where_it_cannot_run() -> None:
    cpu = torch.device("cpu")
    assert chosen("auto", cpu) == chosen("torch", cpu) == "torch"
    with pytest.raises(ValueError, match=r'rasterizer="gsplat": .*; give rasterizer="torch"'):
        rasterize(random_splats(2), CAMERAS, 8, 8, degree=0, rasterizer="gsplat")
