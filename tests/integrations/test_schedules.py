"""Numbers that move over a run: the schedules themselves, and that those of the published settings do move."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from picardopt_3d.cameras import random_cameras
from picardopt_3d.methods import dreamfusion, textmesh, zero123
from picardopt_3d.methods.dreamfusion import DreamFusionWeights
from picardopt_3d.methods.dreamgaussian import DreamGaussianWeights
from picardopt_3d.methods.lighting import ShadingConfig, random_background, random_light
from picardopt_3d.methods.schedules import current, value_at
from picardopt_3d.scenes import HashGrid


def test_a_weight_moves_linearly_between_its_points_and_stays_outside_of_them() -> None:
    points = ((100, 2.0), (200, 6.0), (200, 0.0), (400, 1.0))
    seen = [value_at(points, step) for step in (0, 100, 125, 199, 200, 300, 400, 9999)]
    assert seen == pytest.approx([2.0, 2.0, 3.0, 5.96, 0.0, 0.5, 1.0, 1.0])
    assert value_at(3, 7) == 3.0


positive = st.floats(1e-9, 1e3)


@given(begin=st.integers(0, 10**6), length=st.integers(1, 10**5), first=positive, last=positive)
def test_equal_factors_are_a_straight_line_of_logarithms(
    begin: int, length: int, first: float, last: float
) -> None:
    """3D Gaussian Splatting's `get_expon_lr_func`: exp(log(first) (1 - t) + log(last) t)."""
    points = ((begin, first), (begin + length, last))
    steps = sorted({begin, begin + 1, begin + length // 2, begin + length - 1, begin + length})
    seen = [value_at(points, step, geometric=True) for step in steps]
    assert (seen[0], seen[-1]) == (first, last)
    assert [value_at(points, step, geometric=True) for step in (begin - 1, steps[-1] + 9)] == [
        first,
        last,
    ]
    if first > 1.001 * last:
        assert seen == sorted(seen, reverse=True)
    if last > 1.001 * first:
        assert seen == sorted(seen)
    shares = [(step - begin) / length for step in steps]
    published = [math.exp(math.log(first) * (1 - t) + math.log(last) * t) for t in shares]
    assert seen == pytest.approx(published, rel=1e-12)


def test_equal_factors_between_three_points_and_at_a_jump() -> None:
    points = ((0, 1.0), (4, 16.0), (4, 2.0), (6, 8.0))
    seen = [value_at(points, step, geometric=True) for step in range(8)]
    assert seen == pytest.approx([1.0, 2.0, 4.0, 8.0, 2.0, 4.0, 8.0, 8.0])
    assert value_at(3.0, 7, geometric=True) == 3.0


def test_a_milestone_is_in_force_from_its_step_on() -> None:
    milestones = ((0, 64), (600, 128), (900, 256))
    seen = [current(milestones, step) for step in (0, 599, 600, 899, 900, 10**6)]
    assert seen == [64, 64, 128, 128, 256, 256]
    assert current(5, 3) == 5


@pytest.mark.parametrize("points", [-1.0, math.nan, ((5, 1.0), (0, 2.0)), ((0, -1.0),), ()])
def test_weights_that_cannot_be_are_refused_by_name(points: object) -> None:
    with pytest.raises(ValueError, match=r"weights\.orientation=.*give a number"):
        DreamFusionWeights(orientation=points)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["batch", "pixels", "reference_pixels"])
@pytest.mark.parametrize("value", [0, ((1, 4),), ((0, 4), (0, 8)), ((0, 4), (9, 0)), ()])
def test_milestones_that_cannot_be_are_refused_by_name(name: str, value: object) -> None:
    numbers = {"steps": 10, "batch": 1, "pixels": 8, "reference_pixels": 8, name: value}
    with pytest.raises(ValueError, match=rf"^{name}=.*give a whole number of at least 1"):
        zero123.Zero123Config(scene=zero123.SMALL.scene, **numbers)  # type: ignore[arg-type]


def test_a_weight_of_nothing_is_left_out_until_it_counts() -> None:
    weights = DreamFusionWeights(sparsity=0.0, orientation=((0, 0.0), (10, 5.0)))
    assert weights.at(0) == {"sds": 1.0}
    assert weights.at(2) == {"sds": 1.0, "orientation": 1.0}


def test_weights_that_are_0_at_every_step_are_refused() -> None:
    for nothing in (0.0, ((0, 0.0), (10, 0.0))):
        with pytest.raises(ValueError, match="weights: all are 0 at every step; give"):
            DreamGaussianWeights(sds=nothing)
        DreamGaussianWeights(sds=nothing, rgb=((0, 0.0), (10, 1.0)))


# -- the published schedules, at the steps where they move ---------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "paper-sd"])
def test_dreamfusions_orientation_grows_over_5000_steps(preset: str) -> None:
    weights = dreamfusion.PRESETS[preset].weights
    seen = [weights.at(step)["orientation"] for step in (0, 2500, 5000, 9999)]
    assert seen == pytest.approx([10.0, 505.0, 1000.0, 1000.0])


@pytest.mark.parametrize("config", [dreamfusion.PAPER, dreamfusion.PAPER_SD, textmesh.PAPER])
def test_bands_of_the_encoding_come_in_one_by_one(config: dreamfusion.DreamFusionConfig) -> None:
    grid = HashGrid.__new__(HashGrid)  # without its tables, which are large
    grid.config = config.scene.encoding  # type: ignore[union-attr]
    seen = [grid.bands(step) for step in (0, 2000, 2499, 2500, 3000, 5999, 6000, 9999)]
    assert seen == [8, 8, 8, 9, 10, 15, 16, 16]


def test_zero123s_noise_levels_sink_over_600_steps() -> None:
    config = zero123.PAPER
    for step, (low, high) in {0: (0.4, 0.85), 300: (0.3, 0.675), 600: (0.2, 0.5)}.items():
        assert config.timesteps.at(step, config.steps) == pytest.approx((low, high))
    assert config.timesteps.at(1199, config.steps) == pytest.approx((0.2, 0.5))


def test_zero123s_views_grow_and_its_batch_shrinks() -> None:
    config = zero123.PAPER
    sizes = [
        tuple(current(x, step) for x in (config.batch, config.pixels, config.reference_pixels))
        for step in (0, 599, 600, 899, 900, 1199)
    ]
    assert sizes == [(16, 64, 128)] * 2 + [(16, 128, 256)] * 2 + [(10, 256, 512)] * 2
    assert (config.final_pixels, zero123.SMALL.final_pixels) == (256, 64)


# -- light -----------------------------------------------------------------------------------------------


def test_lights_of_magic3d_lie_in_a_cone_about_the_camera_at_a_uniform_angle() -> None:
    torch.manual_seed(0)
    cameras = random_cameras(4000)
    shading = ShadingConfig(ambient_steps=0, diffuse_probability=1.0, placement="magic3d")
    light = random_light(cameras, shading, 0)
    assert light is not None
    distance = light.position.norm(dim=-1)
    assert 0.8 <= distance.min() < 0.85 < 1.45 < distance.max() <= 1.5
    axes = F.normalize(cameras.position, dim=-1)
    towards = light.position / distance[:, None]
    angle = (towards * axes).sum(-1).clamp(-1, 1).acos() * 180 / math.pi
    assert angle.max() <= 60 + 1e-2
    for share in (0.25, 0.5, 0.75):
        assert float((angle < 60 * share).float().mean()) == pytest.approx(share, abs=0.03)
    sides = towards - (towards * axes).sum(-1, keepdim=True) * axes
    assert sides.mean(0).norm() < 0.03  # to all sides alike


def test_soft_shading_draws_how_much_of_the_light_is_ambient() -> None:
    torch.manual_seed(0)
    cameras = random_cameras(1)
    shading = ShadingConfig(ambient_steps=0, diffuse_probability=1.0, soft=True)
    lights = [random_light(cameras, shading, 0) for _ in range(1000)]
    diffuse = torch.tensor([light.diffuse for light in lights if light is not None])
    assert len(diffuse) == 1000
    assert float(diffuse.mean()) == pytest.approx(0.5, abs=0.03)
    assert 0 <= diffuse.min() < 0.02 < 0.98 < diffuse.max() <= 1
    assert all(light.ambient == 1 - light.diffuse for light in lights if light is not None)
    with pytest.raises(ValueError, match="placement='above': give one of dreamfusion, magic3d"):
        ShadingConfig(placement="above")  # type: ignore[arg-type]


def test_light_begins_after_2001_steps_and_only_then_draws() -> None:
    shading, cameras = (
        ShadingConfig(),
        dreamfusion.random_cameras(4, dreamfusion.PAPER.cameras),
    )
    before = torch.get_rng_state()
    assert all(random_light(cameras, shading, step) is None for step in (0, 1000, 2000))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    lights = [random_light(cameras, shading, 2001) for _ in range(2000)]
    lit = [light for light in lights if light is not None]
    assert len(lit) / len(lights) == pytest.approx(0.75, abs=0.04)
    assert sum(light.textureless for light in lit) / len(lit) == pytest.approx(0.5, abs=0.05)
    distances = torch.cat([light.position.norm(dim=-1) for light in lit])
    assert 0.8 <= distances.min() < 0.81
    assert 1.49 < distances.max() <= 1.5
    # Around each camera's direction: the mean over draws points to where the camera is.
    mean = torch.stack([light.position for light in lit]).mean(0)
    cosine = torch.nn.functional.cosine_similarity(mean, cameras.position, dim=-1)
    assert (cosine > 0.99).all()
    assert all((light.ambient, light.diffuse) == (0.1, 0.9) for light in lit)


def test_a_backdrop_comes_in_its_share_of_the_steps() -> None:
    torch.manual_seed(0)
    backdrops = [random_background(3, 0.25, torch.device("cpu")) for _ in range(2000)]
    there = [colours for colours in backdrops if colours is not None]
    assert len(there) / len(backdrops) == pytest.approx(0.25, abs=0.04)
    assert there[0].shape == (3, 3)
    before = torch.get_rng_state()
    assert random_background(3, 0.0, torch.device("cpu")) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_probabilities_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"diffuse_probability=1\.5"):
        ShadingConfig(diffuse_probability=1.5)
