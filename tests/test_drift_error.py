"""Runs that measure their drift error: what is gauged and when, and what strides come of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from picardopt import DriftTolerance, StepRelativeTolerance
from tests.helpers.quadratic import Quadratic

EVERYTHING = float("inf")


def test_the_gauge_measures_what_a_drift_was_off_by() -> None:
    """The pair's numbers are those of two gradients at the guess and at the iterate, group by group."""
    run = Quadratic(tolerance=StepRelativeTolerance(0.5, 0.0), secants=0)
    run.run(40)
    pairs = [r.measures.pair for r in run.optimizer.stats.records if r.measures is not None]
    found = [pair for pair in pairs if pair is not None]
    assert len(found) > 3
    for pair in found:
        for curvature, distance, error in zip(
            (1.0, run.curvature), pair.distances, pair.errors, strict=True
        ):
            # The gradient is linear and its noise the same: off by curvature times distance.
            assert error == pytest.approx(curvature**2 * distance, rel=1e-3)
    flat, stiff = run.optimizer.stats.drift_error
    assert 0 < flat < stiff


@pytest.mark.parametrize("window", [2, 3, 8])
def test_a_sweep_that_keeps_everything_is_gauged_now_and_then(window: int) -> None:
    """Under 2 % of all evaluations are spent on it at a window of 8, and nothing is spent elsewhere."""
    run = Quadratic(noise=1e-3, stiff=1.0, tolerance=DriftTolerance(noise=1e9), window=window)
    run.run(400)
    stats = run.optimizer.stats
    held = [r.measures.pair for r in stats.records if r.measures and r.measures.pair]
    assert len(held) >= stats.steps // 80
    assert all(pair.slot == window - 1 for pair in held[1:])
    assert stats.wasted_evaluations <= len(held) * 1 + 2 * window
    if window == 8:
        assert stats.wasted_evaluations < 0.02 * stats.drift_evaluations + 2 * window


@pytest.mark.parametrize("options", [{"tolerance": 0}, {"window": 1}])
def test_nothing_is_gauged_where_nothing_is_inexact(options: Any) -> None:
    run = Quadratic(**options)
    run.run(20)
    assert run.optimizer.stats.drift_error == ()


def test_other_tolerances_keep_all_that_they_accept() -> None:
    """The paper's rule and numbers are gauged where they refuse; no stride of theirs becomes shorter."""
    run = Quadratic(tolerance=EVERYTHING)
    run.run(80)
    assert run.optimizer.stats.strides == [8] * 10


def test_stiff_problems_get_short_strides_and_easy_ones_long() -> None:
    """What no rule on distances tells apart: the residuals in step lengths are alike, the drift errors are not."""
    strides = {}
    for stiff in (0.1, 100.0):
        run = Quadratic(noise=1.0, stiff=stiff, secants=0)
        run.run(120)
        strides[stiff] = run.optimizer.stats.mean_stride
    assert strides[0.1] > 6 > 1.5 * strides[100.0]


@pytest.mark.parametrize("stiff", [0.0, 30.0])
def test_an_edit_by_the_user_is_seen(stiff: float) -> None:
    """Before the first pair too, and where there is no curvature: the queued drift is not committed."""
    run = Quadratic(stiff=stiff)
    run.run(1)
    with torch.no_grad():
        run.flat.fill_(1000.0)
    assert float(run.optimizer.step(run.loss)) > 1e6
    assert run.optimizer.stats.dropped > 0


def test_flush_forgets_what_was_learned_of_another_closure() -> None:
    """The kept drift and the secants are of the closure before the change."""
    run = Quadratic(secants=4)
    run.run(40)
    records = len(run.optimizer.stats.records)
    while run.optimizer.stats.records[-1].stride == 8 or run.optimizer.stats.sweeps == records:
        run.run(1)
    run.optimizer.flush()
    sweeps = run.optimizer.stats.sweeps
    run.run(1)
    assert run.optimizer.stats.sweeps == sweeps + 1
    measures = run.optimizer.stats.records[-1].measures
    assert measures is not None
    assert measures.pair is None
