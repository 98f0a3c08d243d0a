"""Corrections by secants: exact for linear drifts, bounded, and nearer to the sequential run."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from picardopt import PicardWarning, StepRelativeTolerance, step_rng
from picardopt.correction import Secants
from picardopt.drift import Drift
from picardopt.layout import ParameterLayout
from tests.helpers.quadratic import Quadratic


def sequential(run: Quadratic, steps: int) -> list[Tensor]:
    """The parameters after every step of the plain loop."""
    after = []
    for step in range(steps):
        with step_rng(run.optimizer.seed, step):
            run.loss(step)
        run.optimizer.base.step()
        after.append(torch.cat([run.flat.detach(), run.stiff.detach()]))
    return after


@pytest.mark.parametrize("secants", [0, 1, 4, 8])
def test_corrections_leave_the_fixed_point(secants: int) -> None:
    """With a tolerance that accepts equal numbers alone every commit has the sequential bits, corrected or not."""
    run, plain = Quadratic(tolerance=1e-300, secants=secants), Quadratic()
    expected = sequential(plain, 60)
    for step in range(60):
        run.optimizer.step(run.loss)
        assert torch.equal(torch.cat([run.flat.detach(), run.stiff.detach()]), expected[step])
    assert run.optimizer.stats.drift_evaluations > 60


def deviation(run: Quadratic, steps: int = 120) -> float:
    """How far a run ends from the sequential one."""
    run.run(steps)
    plain = Quadratic(run.noise, run.curvature)
    expected = sequential(plain, steps)[-1]
    return float((torch.cat([run.flat.detach(), run.stiff.detach()]) - expected).norm())


def test_corrected_runs_end_nearer_to_the_sequential_one() -> None:
    """At about the same strides."""
    plain, corrected = (
        Quadratic(stiff=10.0, window=4, tolerance=StepRelativeTolerance(1.0, 0.2), secants=secants)
        for secants in (0, 4)
    )
    assert deviation(corrected) < 0.7 * deviation(plain)
    strides = [run.optimizer.stats.mean_stride for run in (plain, corrected)]
    assert strides == pytest.approx([3.7, 3.7], abs=0.2)


def test_corrections_lengthen_the_strides_of_stiff_problems() -> None:
    """Without them guesses of stiff directions become worse from sweep to sweep."""
    strides = []
    for secants in (0, 8):
        run = Quadratic(tolerance=StepRelativeTolerance(1.0, 0.2), secants=secants)
        run.run(120)
        strides.append(run.optimizer.stats.mean_stride)
    assert strides[1] > 2 * strides[0]


@pytest.mark.parametrize("secants", [0, 8])
@pytest.mark.parametrize("stiff", [100.0, 300.0])
def test_no_run_diverges_where_the_sequential_one_does_not(stiff: float, secants: int) -> None:
    """Up to near the largest stable curvature of this momentum, 380; guesses may overflow on the way."""
    run = Quadratic(noise=1.0, stiff=stiff, secants=secants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PicardWarning)
        assert deviation(run, 150) < 0.5


def drift_of(layout: ParameterLayout, value: Tensor) -> Drift:
    row = layout.row()
    row.store([value])
    return Drift(0, row, (True,))


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 10**6))
def test_secants_of_a_quadratic_correct_exactly(dimension: int, more: int, seed: int) -> None:
    """As many secants as dimensions tell the whole of a linear drift; without a ridge, to rounding."""
    generator = torch.Generator().manual_seed(seed)
    hessian = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    hessian = hessian @ hessian.T / dimension
    parameter = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))
    layout = ParameterLayout([parameter])
    secants = Secants(layout, dimension + more, ridge=1e-9)

    def row(value: Tensor) -> Any:
        return drift_of(layout, value).row

    steps = torch.linalg.qr(torch.randn(hessian.shape, generator=generator, dtype=torch.float64)).Q
    for index in range(dimension + more):
        y = torch.randn(dimension, generator=generator, dtype=torch.float64)
        x = y + steps[index % dimension]
        secants.observe(row(x), row(y), row(hessian @ x), row(hessian @ y), None)
    # A long drift, as corrections are no longer than that.
    offset = 1e3 * torch.ones(dimension, dtype=torch.float64)
    guess, iterate = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    drift = drift_of(layout, hessian @ guess + offset)
    secants.correct(drift, row(guess), row(iterate))
    torch.testing.assert_close(
        drift.row.tensors[0], hessian @ iterate + offset, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("factor", "share"), [(1.0, 1.0), (-1.0, 0.0), (0.5, 0.5), (2.0, 1.0)])
def test_a_correction_counts_as_far_as_past_ones_came_true(factor: float, share: float) -> None:
    """Ten times a drift changes along the same step, by `factor` times what the only secant predicts."""
    layout = ParameterLayout([nn.Parameter(torch.zeros(2))])
    secants = Secants(layout, 1, ridge=1e-9)
    zero, unit = torch.zeros(2), torch.tensor([1.0, 0.0])
    guess, iterate = drift_of(layout, zero).row, drift_of(layout, unit).row
    for index in range(10):
        found = drift_of(layout, factor**index * unit).row
        secants.observe(iterate, guess, found, drift_of(layout, zero).row, None)
    drift = drift_of(layout, torch.tensor([0.0, 1e4]))
    secants.correct(drift, guess, iterate)
    expected = torch.tensor([share * factor**9, 1e4])
    torch.testing.assert_close(drift.row.tensors[0], expected, rtol=1e-4, atol=1e-6)


def corrected(drift: Tensor, change: float) -> tuple[Tensor, Drift, Secants]:
    """A drift of three numbers, corrected by one secant along the first axis with a change along the second."""
    layout = ParameterLayout([nn.Parameter(torch.zeros(3))])
    secants = Secants(layout, 2, ridge=0.0001)
    zero, unit = torch.zeros(3), torch.tensor([1.0, 0.0, 0.0])
    rows = [drift_of(layout, v).row for v in (unit, zero, torch.tensor([0.0, change, 0.0]), zero)]
    secants.observe(rows[0], rows[1], rows[2], rows[3], None)
    given = drift_of(layout, drift)
    secants.correct(given, rows[1], rows[0])
    return given.row.tensors[0], given, secants


def test_a_right_guess_is_not_corrected_in_one_bit() -> None:
    """Not even a negative zero, which any addition would change."""
    layout = ParameterLayout([nn.Parameter(torch.zeros(3))])
    _, _, secants = corrected(torch.ones(3), 1.0)
    value = torch.tensor([-0.0, 1.0, -0.0])
    drift = drift_of(layout, value)
    here = drift_of(layout, torch.ones(3)).row
    secants.correct(drift, here, here)
    assert torch.equal(drift.row.tensors[0].view(torch.int32), value.view(torch.int32))


def test_a_correction_is_no_longer_than_its_drift() -> None:
    value, _, _ = corrected(torch.tensor([1.0, 0.0, 0.0]), 100.0)
    torch.testing.assert_close(value, torch.tensor([1.0, 1.0, 0.0]), rtol=1e-3, atol=1e-3)


def test_a_drift_is_corrected_once() -> None:
    value, drift, secants = corrected(torch.ones(3), 0.5)
    layout = ParameterLayout([nn.Parameter(torch.zeros(3))])
    before = value.clone()
    far = drift_of(layout, torch.full((3,), 9.0)).row
    secants.correct(drift, drift_of(layout, torch.zeros(3)).row, far)
    assert torch.equal(drift.row.tensors[0], before)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_secant_of_no_use_teaches_nothing(bad: float) -> None:
    layout = ParameterLayout([nn.Parameter(torch.zeros(3))])
    secants = Secants(layout, 1)
    zero = drift_of(layout, torch.zeros(3)).row
    there = drift_of(layout, torch.full((3,), bad)).row
    secants.observe(there, zero, drift_of(layout, torch.ones(3)).row, zero, None)
    drift = drift_of(layout, torch.ones(3))
    secants.correct(drift, zero, drift_of(layout, torch.ones(3)).row)
    assert torch.equal(drift.row.tensors[0], torch.ones(3))


def test_the_audit_repeats_corrected_drifts() -> None:
    """Every queued drift is evaluated again, corrected like the first time, and has the same bits."""
    run = Quadratic(tolerance=StepRelativeTolerance(3.0, 0.3), secants=4, audit="always")
    run.run(60)
    stats = run.optimizer.stats
    assert stats.mean_stride > 2
    assert stats.audits > 30


@pytest.mark.parametrize("secants", [-1, 1.5, "4"])
def test_bad_numbers_of_secants_are_refused(secants: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="secants"):
        Quadratic(secants=secants)


def test_a_correction_that_overflows_is_left_out() -> None:
    layout = ParameterLayout([nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    secants = Secants(layout, 1, ridge=1e-6)
    zero, one = torch.zeros(2, dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    rows = [drift_of(layout, value).row for value in (one, zero, one * 6e4, zero)]
    secants.observe(*rows, None)
    drift = drift_of(layout, one * 6e4)
    secants.correct(drift, rows[1], rows[0])
    assert torch.equal(drift.row.tensors[0], one * 6e4)
