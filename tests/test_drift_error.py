"""The drift error: what is measured, by group, and what is corrected and accepted because of it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from picardopt import (
    DriftTolerance,
    ParallelPicardOptimizer,
    PicardWarning,
    StepRelativeTolerance,
    step_rng,
)
from picardopt.correction import Secants
from picardopt.drift import Drift
from picardopt.layout import ParameterLayout
from picardopt.measures import DriftPair, GroupMeasures, Measures
from picardopt.sweep import as_measures, choose_stride, measure, within

EVERYTHING = float("inf")


class Quadratic:
    """Noisy gradients of ``x' A x / 2`` in two parameter groups, one flat and one stiff."""

    def __init__(self, noise: float = 0.1, stiff: float = 30.0, **options: Any) -> None:
        torch.manual_seed(0)
        self.flat, self.stiff = nn.Parameter(torch.randn(40)), nn.Parameter(torch.randn(3))
        self.noise, self.curvature = noise, stiff
        base = torch.optim.SGD([{"params": [self.flat]}, {"params": [self.stiff]}], 0.01, 0.9)
        self.optimizer = ParallelPicardOptimizer(
            base, **{"window": 8, "seed": 3, "tolerance": DriftTolerance(), **options}
        )

    def loss(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        noise = [torch.randn_like(p) for p in (self.flat, self.stiff)]
        loss = (self.flat**2).sum() / 2 + self.curvature * (self.stiff**2).sum() / 2
        loss = loss + self.noise * ((noise[0] * self.flat).sum() + (noise[1] * self.stiff).sum())
        loss.backward()
        return loss

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.loss)


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


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_groups_add_up_to_the_whole(sizes: list[int], slots: int, seed: int) -> None:
    """What is measured by group is what each group alone would give, and pools to what one group would."""
    sizes = [*sizes, 2]
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    layout = ParameterLayout(parameters, sizes=[1] * len(sizes))
    whole = ParameterLayout(parameters)
    values = [
        [torch.randn(size, generator=generator) for size in sizes] for _ in range(2 * slots + 2)
    ]

    def measured(layout: ParameterLayout) -> Measures:
        rows = []
        for value in values:
            rows.append(layout.row())
            rows[-1].store(value)
        before, after = rows[: slots + 1], rows[slots + 1 :]
        table = measure(before, after, layout.numels)
        return as_measures(table.tolist(), layout.numels)

    parts, one = measured(layout), measured(whole)
    assert len(parts.groups) == sum(size > 0 for size in sizes)
    for name in ("residuals", "step_lengths", "distances"):
        assert getattr(parts, name) == pytest.approx(getattr(one, name), rel=1e-6)
    for group, size in zip(parts.groups, [s for s in sizes if s], strict=True):
        assert len(group.residuals) == slots
        assert size in parts.numels


@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_nan_is_never_within(value: float) -> None:
    threshold = (math.nan if value == value else 1.0,)
    assert not within([value], threshold, [3])
    assert not within([math.nan], math.inf, [3])


GROUP = GroupMeasures((1.0, 4.0, 9.0), (1.0,) * 3, (1.0,) * 3, drift=1.0, noise=0.5)
SILENT = Measures((1.0, 4.0, 9.0), (1.0,) * 3, (1.0,) * 3, (False,) * 3, (GROUP,), (7,))


def pair(error: float) -> DriftPair:
    return DriftPair(3, False, (1.0,), (error,), (error,), (1.0,))


def stride(tolerance: DriftTolerance, error: float) -> int:
    measures = replace(SILENT, pair=pair(error))
    return choose_stride(measures, tolerance.thresholds(measures), exact=False)


@pytest.mark.parametrize(("error", "accepted"), [(0.3, 1), (0.07, 2), (0.05, 3), (0.0, 3)])
def test_a_guess_is_accepted_while_its_drift_error_hides_in_the_noise(
    error: float, accepted: int
) -> None:
    """Errors of 1, 4 and 9 times `error` against half of the noise, 0.25."""
    tolerance = DriftTolerance(noise=0.5, drift=0.0)
    assert stride(tolerance, error) == accepted


def test_without_noise_a_share_of_the_drift_may_be_off() -> None:
    measures = replace(SILENT, groups=(replace(GROUP, noise=0.0),), pair=pair(0.01))
    tolerance = DriftTolerance(
        noise=0.5, drift=0.25
    )  # of 1: squared 0.0625, against 0.01, 0.04, 0.09
    assert choose_stride(measures, tolerance.thresholds(measures), exact=False) == 3
    measures = replace(measures, pair=pair(0.02))
    assert choose_stride(measures, tolerance.thresholds(measures), exact=False) == 2


def test_before_the_first_pair_one_guess_is_accepted() -> None:
    tolerance = DriftTolerance()
    assert choose_stride(SILENT, tolerance.thresholds(SILENT), exact=False) == 2


def test_a_group_counts_by_how_much_it_moves_the_loss() -> None:
    """A group that hardly moves may be off by as much as it likes; one that does may not."""

    def of(drift: float) -> int:
        idle = replace(
            GROUP, drift=drift
        )  # its steps are as long, its drifts are longer: a smaller rate
        measures = replace(SILENT, groups=(GROUP, idle), numels=(7, 7))
        measures = replace(
            measures, pair=DriftPair(3, False, (1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0))
        )
        tolerance = DriftTolerance(noise=0.5, drift=0.0)
        return choose_stride(measures, tolerance.thresholds(measures), exact=False)

    assert of(1e12) == 3
    assert of(1.0) == 1


def stride_of_two(scale: float, errors: tuple[float, float], losses: tuple[int, ...] | None) -> int:
    """The stride of two groups with equal steps, where the second one's drifts are longer by a factor."""
    square = scale * scale
    other = replace(GROUP, drift=square * GROUP.drift, noise=square * GROUP.noise)
    off = (errors[0], square * errors[1])
    measures = replace(SILENT, groups=(GROUP, other), numels=(7, 7))
    measures = replace(
        measures, pair=DriftPair(3, False, (1.0, 1.0), off, (0.0, 0.0), (1.0, square))
    )
    tolerance = DriftTolerance(noise=0.5, drift=0.0, losses=losses)
    return choose_stride(measures, tolerance.thresholds(measures), exact=False)


@pytest.mark.parametrize(
    ("errors", "accepted"),
    [((0.0, 0.07), 2), ((0.07, 0.0), 2), ((0.04, 0.03), 2), ((0.0, 0.3), 1), ((0.0, 0.05), 3)],
)
def test_a_loss_of_its_own_has_a_scale_of_its_own(
    errors: tuple[float, float], accepted: int
) -> None:
    """Errors of 1, 4 and 9 times those given, each against half of its noise, 0.25: as a loss by itself has them."""
    for scale in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        assert stride_of_two(scale, errors, (1, 1)) == accepted
    assert stride_of_two(1e-6, (0.0, 0.07), None) == 3  # as one loss, its error is not seen


def test_losses_of_other_groups_than_those_measured_are_refused() -> None:
    with pytest.raises(ValueError, match="2 groups are measured"):
        stride_of_two(1.0, (0.0, 0.0), (1, 2))


def test_when_the_groups_change_the_rule_begins_anew() -> None:
    tolerance = DriftTolerance()
    measures = replace(SILENT, pair=pair(0.01))
    tolerance.update(measures, 3)
    assert stride(tolerance, 0.01) > 2
    other = replace(SILENT, groups=(GROUP, GROUP), numels=(7, 7))
    assert choose_stride(other, tolerance.thresholds(other), exact=False) == 2


@pytest.mark.parametrize("steps", [8, 64])
def test_a_pair_counts_the_more_the_longer_there_was_none(steps: int) -> None:
    """Between two pairs lie sweeps without one; that the steps were made by many or by few does not matter."""
    found = []
    for stride in (1, 4, 8):
        tolerance = DriftTolerance(noise=0.5, drift=0.0)
        tolerance.update(replace(SILENT, pair=pair(0.01)), stride)
        for _ in range(steps // stride - 1):
            tolerance.update(SILENT, stride)
        tolerance.update(replace(SILENT, pair=pair(0.4)), 1)
        found.append(tolerance.state_dict()["errors"][0])
    past = 0.95**steps
    assert found == pytest.approx([past * 0.01 + (1 - past) * 0.4] * 3)


def test_means_of_an_older_version_are_left_behind() -> None:
    tolerance = DriftTolerance()
    tolerance.load_state_dict({"drifts": [1e-10], "lengths": [1e-4], "errors": [1e-11]})
    assert tolerance.fingerprint() == DriftTolerance().fingerprint()


def test_its_state_goes_through_a_checkpoint() -> None:
    run = Quadratic()
    run.run(30)
    assert any(age > 1 for age in run.optimizer.tolerance.state_dict()["ages"].values())
    again = DriftTolerance()
    again.load_state_dict(run.optimizer.tolerance.state_dict())
    assert (
        again.fingerprint()
        == run.optimizer.tolerance.fingerprint()
        != DriftTolerance().fingerprint()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"noise": -1.0},
        {"drift": math.nan},
        {"losses": ()},
        {"losses": (1, 0)},
    ],
)
def test_values_out_of_range_are_refused_by_name(arguments: Any) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        DriftTolerance(**arguments)


@pytest.mark.parametrize("secants", [-1, 1.5, "4"])
def test_bad_numbers_of_secants_are_refused(secants: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="secants"):
        Quadratic(secants=secants)


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


def test_a_pair_of_points_far_apart_tells_nothing() -> None:
    tolerance = DriftTolerance(noise=0.5, drift=0.0)
    tolerance.update(replace(SILENT, pair=pair(0.3)), 1)
    before = tolerance.state_dict()
    wild = replace(pair(1e-3), distances=(1e6,))
    tolerance.update(replace(SILENT, pair=wild), 1)
    assert tolerance.state_dict()["distances"] == before["distances"]
    assert stride(tolerance, 0.3) == 1


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


def test_a_correction_that_overflows_is_left_out() -> None:
    layout = ParameterLayout([nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    secants = Secants(layout, 1, ridge=1e-6)
    zero, one = torch.zeros(2, dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    rows = [drift_of(layout, value).row for value in (one, zero, one * 6e4, zero)]
    secants.observe(*rows, None)
    drift = drift_of(layout, one * 6e4)
    secants.correct(drift, rows[1], rows[0])
    assert torch.equal(drift.row.tensors[0], one * 6e4)
