"""3D Gaussians as a scene: what is saved, measured, carried and changed."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.export.mesh import extract_mesh
from picardopt_3d.methods.optim import OptimizerConfig, build_optimizer, gaussian_rates
from picardopt_3d.problem import Losses
from picardopt_3d.scenes import (
    Gaussians,
    GaussiansConfig,
    HashConfig,
    Light,
    NerfConfig,
    StrategyConfig,
    build_scene,
    load_scene,
    save_scene,
)
from picardopt_3d.scenes.gaussians.density import THRESHOLD
from picardopt_3d.scenes.gaussians.rasterize import rasterize
from picardopt_3d.scenes.gaussians.splats import SH_C0

from picardopt import ParallelPicardOptimizer
from tests.integrations.helpers.splats import shell

EVERY_TWO = StrategyConfig(
    start=1,
    stop=20,
    every=2,
    gradient=0.0,
    split_scale=0.1,
    least_opacity=0.1,
    reset_every=3,
    reset_opacity=0.3,
)
AROUND = orbit_cameras(torch.tensor([0.0, 20.0, -30.0]), torch.tensor([0.0, 120.0, 240.0]))


def scene(seed: int = 0, **options: Any) -> Gaussians:
    """A few random Gaussians of different colours, sizes and opacities."""
    given: dict[str, Any] = {"count": 20, "strategy": EVERY_TWO} | options
    torch.manual_seed(seed)
    made = Gaussians(GaussiansConfig(**given))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.opacity_logits.add_(1.5)
    return made


def optimizer_of(made: Gaussians, **rates: float) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(rates={**gaussian_rates(), **rates}), made.groups())


def take(made: Gaussians, base: torch.optim.Optimizer, step: int, change: Any = None) -> Losses:
    """One step towards black views."""
    base.zero_grad()
    render = made.render(AROUND, 12)
    total = render.rgb.square().mean()
    losses = Losses(total, {}, made.measure(step, render))
    total.backward()
    base.step()
    carry = made.carry()
    assert carry is not None
    assert carry.update is not None
    with torch.no_grad():
        carry.update(losses)
    if change is not None and change.due(step):
        change.function(step)
    return losses


def changed(steps: int = 2) -> tuple[Gaussians, torch.optim.Optimizer]:
    """Gaussians whose number has changed."""
    made = scene()
    base = optimizer_of(made)
    change = made.restructure([base])
    for step in range(steps):
        take(made, base, step, change)
    assert made.count != 20
    return made, base


# -- files and states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 2])
def test_a_file_brings_back_another_number_of_gaussians(tmp_path: Path, degree: int) -> None:
    made = scene(degree=degree)
    base = optimizer_of(made)
    change = made.restructure([base])
    for step in range(2):
        take(made, base, step, change)
    save_scene(made, tmp_path / "scene.safetensors")
    found = load_scene(tmp_path / "scene.safetensors")
    assert isinstance(found, Gaussians)
    assert found.config == made.config
    assert found.count == made.count != 20
    assert torch.equal(found.render(AROUND, 8).rgb, made.render(AROUND, 8).rgb)


def test_loading_another_number_keeps_the_optimizers_parameters() -> None:
    """A run is resumed by building it anew and loading: its optimizer must train what was loaded."""
    made, base = changed()
    saved = copy.deepcopy((made.state_dict(), base.state_dict()))
    fresh = scene(seed=1)
    again = optimizer_of(fresh)
    held = [id(group["params"][0]) for group in again.param_groups]
    take(fresh, again, 0)  # with states of the old number
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert [id(group["params"][0]) for group in again.param_groups] == held
    assert [id(parameter) for parameter in fresh.parameters()] == held
    assert fresh.count == made.count
    for one, other, step in ((made, base, 2), (fresh, again, 2)):
        take(one, other, step)
    for name, value in made.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_state_that_does_not_fit_is_refused() -> None:
    state = changed()[0].state_dict()
    with pytest.raises(RuntimeError, match="harmonics"):
        scene(degree=1).load_state_dict(state)


@pytest.mark.parametrize("count", [20, 30])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda state: state.pop("colours"), "colours"),
        (lambda state: state.update(harmonics=state["colours"][:, None]), "harmonics"),
        (lambda state: state.update(rotations=state["rotations"][:, :3]), "rotations"),
        (lambda state: state.update(opacity_logits=state["opacity_logits"][1:]), "opacity_logits"),
        (lambda state: state.update({"statistics.radii": torch.zeros(3)}), "radii"),
        (lambda state: state.update(means=torch.zeros(())), "means"),
    ],
    ids=["missing", "unknown", "narrower", "shorter", "another number", "a number"],
)
def test_a_refused_state_changes_nothing(count: int, broken: Any, named: str) -> None:
    """Neither the number of Gaussians nor a single one of them."""
    made, base = scene(), scene(seed=1, count=count)
    optimizer = optimizer_of(made)
    take(made, optimizer, 0)
    before, state = copy.deepcopy(made.state_dict()), base.state_dict()
    parameters = {name: (id(p), p.grad) for name, p in made.named_parameters()}
    broken(state)
    with pytest.raises(RuntimeError, match=named) as caught:
        made.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert {name: (id(p), p.grad) for name, p in made.named_parameters()} == parameters
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name
    take(made, optimizer, 1)


def test_a_part_of_a_state_is_loaded_if_that_is_asked_for() -> None:
    """As torch has it, for the same number of Gaussians; another number needs all of them."""
    made, other = scene(), scene(seed=1)
    part = {"means": other.state_dict()["means"], "more": torch.zeros(2)}
    made.load_state_dict(part, strict=False)
    assert torch.equal(made.means, other.means)
    assert not torch.equal(made.colours, other.colours)
    with pytest.raises(RuntimeError, match="colours"):
        made.load_state_dict({"means": scene(count=30).means}, strict=False)
    assert made.count == 20


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


# -- statistics ----------------------------------------------------------------------------------------------


def test_statistics_are_the_lengths_of_each_views_own_gradient() -> None:
    """In units of half a screen edge, and of that view's own loss, although the step's is a mean over views."""
    made = scene()
    target = torch.rand(3, 3, 10, 14)
    render = made.render(AROUND, (10, 14))
    found = made.measure(0, render)
    (render.rgb - target).square().mean().backward()

    gradients = torch.zeros(20)
    for view, degrees in enumerate([(0.0, 0.0), (20.0, 120.0), (-30.0, 240.0)]):
        drawn = rasterize(made.splats(), orbit_cameras(*degrees), 10, 14, degree=0)
        rgb = drawn.colour + (1 - drawn.opacity)
        loss = (rgb - target[view]).square().mean()
        (gradient,) = torch.autograd.grad(loss, drawn.means2d)
        gradients += (gradient[0] * torch.tensor([7.0, 5.0])).norm(dim=1)
    torch.testing.assert_close(found["gradients"], gradients)
    assert (found["views"] == 3).all()
    radii = rasterize(made.splats(), AROUND, 10, 14, degree=0).radii.amax(0)
    torch.testing.assert_close(found["radii"], radii.float() / 14)


def test_a_gaussian_that_no_view_shows_has_no_statistics() -> None:
    made = scene()
    with torch.no_grad():
        made.means[3] = torch.tensor([50.0, 0.0, 0.0])  # behind the first camera
        made.means[4] = torch.tensor([0.0, 30.0, 0.0])
    render = made.render(orbit_cameras(0.0, 0.0), 10)
    found = made.measure(0, render)
    render.rgb.square().mean().backward()
    unseen = [index for index in range(20) if index in (3, 4)]
    for name in ("gradients", "views", "radii"):
        assert (found[name][unseen] == 0).all(), name
    seen = found["views"] > 0
    assert seen.sum() > 10
    assert (found["radii"][seen] > 0).all()


def test_statistics_add_up_over_renders_and_steps_and_start_again_where_gaussians_change() -> None:
    made = scene()
    base = optimizer_of(made)
    change = made.restructure([base])
    assert change is not None
    assert [step for step in range(8) if change.due(step)] == [1, 2, 3, 5, 7]
    first = take(made, base, 0, change).aux
    assert torch.equal(made.statistics.gradients, first["gradients"])
    take(made, base, 1, change)  # adds and removes Gaussians
    assert made.statistics.gradients.shape == made.means.shape[:1]
    assert made.statistics.gradients.sum() == made.statistics.views.sum() == 0
    count = made.count
    one = take(made, base, 2, change).aux  # resets opacities, and leaves the statistics
    assert made.count == count
    assert made.opacity_logits.sigmoid().max() <= 0.3 + 1e-6
    for name in ("gradients", "views", "radii"):
        assert torch.equal(getattr(made.statistics, name), one[name])
    both = made.measure(9, made.render(AROUND, 8), made.render(AROUND, 10))
    assert both["views"].max() == 6


def test_what_no_later_step_reads_is_not_measured() -> None:
    """From the strategy's last step on, neither picture nor gradients are measured, and the statistics stay."""
    made = scene(strategy=replace(EVERY_TWO, stop=4))
    base = optimizer_of(made)
    change = made.restructure([base])
    assert change is not None
    measured = [bool(take(made, base, step, change).aux) for step in range(6)]
    assert measured == [True, True, True, False, False, False]
    assert not any(map(change.due, range(3, 20)))
    render = made.render(AROUND, 8)
    assert made.measure(3, render) == {}
    assert not render.drawn.means2d._backward_hooks


@pytest.mark.parametrize(("tolerance", "across"), [(0, False), (0, True), (math.inf, True)])
def test_one_window_runs_over_the_end_of_the_strategy(tolerance: float, across: bool) -> None:
    """Its first steps return statistics, the others nothing; at tolerance 0 the bits are the sequential run's."""
    states = []
    for window in (1, 6):
        made = scene(strategy=replace(EVERY_TWO, stop=5, reset_every=0), across=across)
        base = optimizer_of(made)
        optimizer = ParallelPicardOptimizer(
            base,
            window=window,
            tolerance=tolerance,
            total_steps=8,
            carry=made.carry(),
            restructure=made.restructure([base]),
        )

        def closure(step: int, made: Gaussians = made, base: Any = base) -> Losses:
            base.zero_grad()
            render = made.render(AROUND, 12)
            total = render.rgb.square().mean()
            losses = Losses(total, {}, made.measure(step, render))
            total.backward()
            return losses

        measured = [bool(optimizer.step(closure).aux) for _ in range(8)]
        assert measured == 4 * [True] + 4 * [False]
        states.append(made.state_dict())
        if tolerance and window > 1:
            assert optimizer.stats.strides == [6, 2]
    for name, value in states[0].items():
        assert tolerance or torch.equal(value, states[1][name]), name


def test_without_a_strategy_nothing_is_measured_or_changed() -> None:
    made = scene(strategy=None)
    assert made.measure(0, made.render(AROUND, 4)) == {}
    assert made.carry() is None
    assert made.restructure([]) is None


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
