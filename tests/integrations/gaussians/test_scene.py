"""3D Gaussians as a scene: where they start, their rates, and the views of them."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.export.mesh import extract_mesh
from picardopt_3d.methods.optim import OptimizerConfig, build_optimizer, gaussian_rates
from picardopt_3d.scenes import (
    Gaussians,
    GaussiansConfig,
    HashConfig,
    Light,
    NerfConfig,
    build_scene,
)
from picardopt_3d.scenes.gaussians.density import THRESHOLD
from picardopt_3d.scenes.gaussians.splats import SH_C0

from tests.integrations.helpers.gaussian_scenes import AROUND, changed, optimizer_of, scene, take
from tests.integrations.helpers.splats import shell

# -- scenes before -------------------------------------------------------------------------------------------


def test_gaussians_start_on_the_surface_of_a_field_in_its_colours() -> None:
    """The blob of a new field: its density falls with the distance from the origin."""
    encoding = HashConfig(levels=2, log2_size=6, base=4, scale=1.5)
    torch.manual_seed(0)
    field = build_scene(NerfConfig(encoding=encoding, width=4, blob_scale=50.0, background="solid"))
    made = build_scene(GaussiansConfig(count=300), field)
    assert isinstance(made, Gaussians)
    assert made.count == 300
    surface = field.surface()
    along = surface.level_set(made.means.detach())
    further = surface.level_set(1.02 * made.means.detach())
    assert (along.abs() < 1e-2 * surface.level_set(torch.zeros(1, 3))).all()
    assert (further < along).all()
    colours = 0.5 + SH_C0 * made.colours
    torch.testing.assert_close(colours, surface.colour(made.means.detach()))


def test_gaussians_start_on_the_surface_of_others_in_their_colours() -> None:
    """A red ball and a blue one: where opacity exp(-r^2 / 2 s^2) is the surface's density."""
    before = shell(2, 1.0, 0.1)
    centres = torch.tensor([[0.25, 0.0, 0.0], [-0.25, 0.0, 0.0]])
    shades = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])
    balls = before._replace(means=centres, colours=(shades - 0.5) / SH_C0)
    torch.manual_seed(0)
    made = Gaussians.from_scene(GaussiansConfig(count=200), Gaussians(GaussiansConfig(), balls))
    radius = 0.1 * math.sqrt(-2 * math.log(THRESHOLD / torch.tensor(8.0).sigmoid()))
    distances, nearest = torch.cdist(made.means, centres).min(1)
    torch.testing.assert_close(distances, torch.full((200,), radius), rtol=2e-2, atol=0)
    assert 60 < int(nearest.sum()) < 140
    torch.testing.assert_close(0.5 + SH_C0 * made.colours, shades[nearest], rtol=0, atol=0.02)
    assert 0.01 < made.log_scales.exp().median() < 0.05
    assert made.opacity_logits.sigmoid().mean().item() == pytest.approx(made.config.opacity)


def test_a_scene_without_a_surface_is_refused() -> None:
    nothing = scene()
    with torch.no_grad():
        nothing.opacity_logits.fill_(-20.0)
    with pytest.raises(ValueError, match="has no surface"):
        Gaussians.from_scene(GaussiansConfig(), nothing)


# -- rates ---------------------------------------------------------------------------------------------------


def test_every_tensor_has_a_rate_of_its_own() -> None:
    base = optimizer_of(scene(), means=0.5)
    names = list(gaussian_rates())
    assert names[-1] == "harmonics"
    assert [group["name"] for group in base.param_groups] == names[
        :-1
    ]  # of degree 0 there are none
    assert base.param_groups[0]["lr"] == 0.5
    base = optimizer_of(scene(degree=1))
    assert [group["name"] for group in base.param_groups] == names
    without = OptimizerConfig(rates=dict.fromkeys(names[:-1], 0.1))
    with pytest.raises(ValueError, match="give a rate for the scene's harmonics"):
        build_optimizer(without, scene(degree=1).groups())
    assert len(build_optimizer(without, scene().groups()).param_groups) == 5
    with pytest.raises(ValueError, match=r"rates\.encoding: the scene has no such parameters"):
        optimizer_of(scene(), encoding=0.1)
    assert scene().counts() == {"Gaussians": 20}


def test_harmonics_have_a_twentieth_of_the_rate_of_the_colours() -> None:
    assert gaussian_rates()["harmonics"] == 0.01 / 20
    moving = gaussian_rates(colours=((0, 0.02), (9, 0.001)))["harmonics"]
    assert moving == ((0, 0.02 / 20), (9, 0.001 / 20))
    assert gaussian_rates(colours=0.03, harmonics=0.5)["harmonics"] == 0.5


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_harmonics_are_trained_and_colours_depend_on_the_side(degree: int) -> None:
    made = scene(degree=degree)
    with torch.no_grad():
        made.harmonics.zero_()
    assert made.harmonics.shape == (20, (degree + 1) ** 2 - 1, 3)
    base = optimizer_of(made, harmonics=0.05)
    take(made, base, 0)
    assert (made.harmonics != 0).all()
    with torch.no_grad():  # one Gaussian, seen from two sides
        alone = replace_rows(made)
    front, back = alone.render(orbit_cameras(torch.zeros(2), torch.tensor([0.0, 180.0])), 9).rgb
    assert (front[:, 4, 4] - back[:, 4, 4]).abs().max() > 1e-3


def replace_rows(made: Gaussians) -> Gaussians:
    """The first Gaussian of a scene, round and in the middle."""
    config = replace(made.config, count=1)
    alone = Gaussians(config)
    alone.harmonics.copy_(made.harmonics[:1])
    alone.means.zero_()
    alone.log_scales.fill_(-2.0)
    alone.opacity_logits.fill_(3.0)
    return alone


# -- views ---------------------------------------------------------------------------------------------------


def test_normals_of_a_ball_point_outward() -> None:
    ball = Gaussians(GaussiansConfig(), shell(20_000, 0.4, 0.007))
    cameras = orbit_cameras(torch.tensor([10.0, -40.0]), torch.tensor([30.0, 200.0]))
    render = ball.render(cameras, 128, normals=True)
    assert render.normal is not None
    origins, directions = cameras.rays(128, 128)
    along = -(origins * directions).sum(-1)
    nearest = origins + along[..., None] * directions
    inside = nearest.norm(dim=-1) < 0.28  # apart from the rim, where depths are steep
    hit = along - (0.4**2 - nearest.square().sum(-1)).clamp_min(0).sqrt()
    true = F.normalize(origins + hit[..., None] * directions, dim=-1)
    found = F.normalize(render.normal, dim=1).movedim(1, -1)
    degrees = torch.rad2deg(torch.acos((true * found).sum(-1).clamp(-1, 1)))[inside]
    assert inside.sum() > 1000
    assert degrees.median() < 4
    assert degrees.quantile(0.99) < 10
    lengths = render.normal.norm(dim=1, keepdim=True)
    torch.testing.assert_close(lengths, render.opacity * (render.opacity > 1e-3))


@pytest.mark.parametrize(
    "asked", [{"light": Light(torch.ones(3, 3))}, {"normal_smoothness": True, "normals": True}]
)
def test_what_needs_normals_in_space_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no normals in space: leave lights and weights") as caught:
        scene().render(AROUND, 4, **asked)
    assert "\n" not in str(caught.value)


def test_backgrounds_show_through() -> None:
    made = scene(background=(0.0, 1.0, 0.0), count=1)
    corner = made.render(orbit_cameras(0.0, 0.0), 33).rgb[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.tensor([0.0, 1.0, 0.0]))
    given = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    render = made.render(AROUND, 33, background=given)
    torch.testing.assert_close(render.rgb[:, :, 0, 0], given)


def test_no_gaussians_at_all_are_a_picture_of_the_background() -> None:
    made, _ = changed()
    state = {name: value[:0] if value.ndim else value for name, value in made.state_dict().items()}
    made.load_state_dict(state)
    assert made.count == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render = made.render(AROUND, 4)
    assert (render.rgb == 1).all()
    render.rgb.sum().backward()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 0),
        ("radius", 0.0),
        ("radius", math.nan),
        ("opacity", 1.0),
        ("opacity", 0.0),
        ("degree", 4),
        ("degree", -1),
    ],
)
def test_a_configuration_that_cannot_be_names_the_value(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}: give"):
        GaussiansConfig(**{name: value})


def test_the_surface_reaches_as_far_as_the_object_and_not_to_what_is_far_off() -> None:
    """Whatever the ball that they started in."""
    made = Gaussians(GaussiansConfig(radius=0.1, strategy=None), shell(400, 0.4, 0.03))
    assert 0.4 < made.surface().radius < 0.6
    with torch.no_grad():
        made.means[0] = torch.tensor([50.0, 0.0, 0.0])
    assert 0.4 < made.surface().radius < 1.6
    assert extract_mesh(made, 32).vertices.shape[0] > 100
