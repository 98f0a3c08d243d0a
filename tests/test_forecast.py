"""Strides of other windows, from a short run's records."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from picardopt import (
    AdaptiveTolerance,
    DriftTolerance,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
)
from picardopt.forecast import FIRST_SWEEPS, Forecast, extended, growth
from picardopt.gauge import RARELY


def bowl(steps: int, noise: float, stiff: float, **options: Any) -> ParallelPicardOptimizer:
    """A run over noisy gradients of ``x' A x / 2``, flat in most directions and stiff in some."""
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(20))
    curvature = torch.ones(20)
    curvature[:3] = stiff
    base = torch.optim.SGD([x], 0.01, momentum=0.9)
    optimizer = ParallelPicardOptimizer(base, seed=1, audit="never", **options)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = (curvature * x * x).sum() / 2 + noise * (torch.randn(20) * x).sum()
        loss.backward()
        return loss.detach()

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def slope(steps: int, rate: float, **options: Any) -> ParallelPicardOptimizer:
    """A run down a plane: every gradient is the same, wherever it is evaluated."""
    x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    base = torch.optim.SGD([x], rate)
    optimizer = ParallelPicardOptimizer(base, audit="never", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x.sum().backward()
        return torch.zeros(())

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def forecast(optimizer: ParallelPicardOptimizer) -> Forecast:
    tolerance = optimizer.tolerance
    return Forecast(
        optimizer.stats.records, exact=tolerance.exact, holds_back=tolerance.needs_pairs
    )


TOLERANCES = {
    "drift": lambda: DriftTolerance(),
    "step-relative": lambda: StepRelativeTolerance(),
    "the paper's": lambda: AdaptiveTolerance(1e-5),
    "a number": lambda: 1e-4,
    "everything": lambda: math.inf,
    "exact": lambda: 0,
}


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(TOLERANCES)),
    st.integers(2, 12),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.sampled_from([1.0, 10.0, 60.0]),
)
def test_at_its_own_window_a_forecast_repeats_the_run(
    rule: str, window: int, noise: float, stiff: float
) -> None:
    run = bowl(50, noise, stiff, window=window, tolerance=TOLERANCES[rule]())
    strides = run.stats.strides
    try:
        found = forecast(run)
    except ValueError:
        assert len(strides) < FIRST_SWEEPS + 3
        return
    assert found.strides(window) == strides[FIRST_SWEEPS:]


@settings(max_examples=12)
@given(
    st.integers(2, 10),
    st.integers(2, 20),
    st.sampled_from(["a number", "everything", "exact"]),
    st.integers(0, 12),
)
def test_where_nothing_else_changes_a_forecast_is_the_other_run(
    window: int, other: int, rule: str, holds: int
) -> None:
    """Down a plane all refined guesses are right, and fresh ones good for `holds` steps: strides of every window."""
    rate = 0.01
    number = ((holds + 0.5) * rate) ** 2
    tolerance = number if rule == "a number" else TOLERANCES[rule]()
    run = slope(40, rate, window=window, tolerance=tolerance)
    real = slope(100, rate, window=other, tolerance=tolerance).stats.strides
    pairs = len(real[FIRST_SWEEPS:]) // 2 * 2
    measured = statistics.fmean(real[FIRST_SWEEPS : FIRST_SWEEPS + pairs])
    assert forecast(run).mean_stride(other) == pytest.approx(measured)


@given(
    st.floats(0.5, 6),
    st.floats(1.0, 60.0),
    st.integers(3, 12),
)
def test_growth_is_extended_to_where_it_is_refused(power: float, first: float, count: int) -> None:
    """The first distance at which ``(distance / first) ** power`` exceeds 1."""
    values = [(distance / first) ** power for distance in range(1, count + 1)]
    assert growth(values) == pytest.approx(power)
    if values[-1] <= 1:
        assert extended(values) == pytest.approx(math.floor(first) + 1, abs=1)


@pytest.mark.parametrize("values", [[], [0.1], [0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.5, 0.2, 0.1]])
def test_what_does_not_grow_is_never_refused(values: list[float]) -> None:
    assert extended(values) == math.inf


@pytest.mark.parametrize("stiff", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("other", [2, 4, 16])
def test_other_windows_are_predicted(stiff: float, other: int) -> None:
    """Smaller windows, and one twice as wide."""
    run = bowl(160, 0.3, stiff, window=8, tolerance=DriftTolerance())
    real = bowl(160, 0.3, stiff, window=other, tolerance=DriftTolerance()).stats.strides
    assert forecast(run).mean_stride(other) == pytest.approx(statistics.fmean(real[2:-1]), rel=0.3)


def test_full_sweeps_hold_a_drift_back_now_and_then() -> None:
    run = bowl(200, 3.0, 1.0, window=4, tolerance=DriftTolerance(noise=1e9))
    assert forecast(run).mean_stride(4) == pytest.approx(4 - 4 / RARELY)
    assert forecast(run).mean_stride(16) == pytest.approx(16 - 16 / RARELY)


def test_drift_errors_at_the_first_guesses_are_told() -> None:
    stiff = forecast(bowl(80, 0.0, 120.0, window=8, tolerance=DriftTolerance()))
    assert stiff.drift_error() is not None
    flat = forecast(bowl(80, 0.3, 1.0, window=8, tolerance=math.inf))
    assert flat.drift_error() is None


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 8, "tolerance": math.inf}])
def test_too_few_sweeps_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="usable sweeps"):
        forecast(bowl(30, 0.1, 1.0, **options))
