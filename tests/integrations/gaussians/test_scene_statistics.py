"""Statistics of Gaussians: what views measure for the strategy, and until when."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.problem import Losses
from picardopt_3d.scenes import Gaussians
from picardopt_3d.scenes.gaussians.rasterize import rasterize

from picardopt import ParallelPicardOptimizer
from tests.integrations.helpers.gaussian_scenes import AROUND, EVERY_TWO, optimizer_of, scene, take


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
