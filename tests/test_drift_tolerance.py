"""The rule that accepts guesses by their drift error: measures by group, thresholds, and its state."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from picardopt import DriftTolerance
from picardopt.layout import ParameterLayout
from picardopt.measures import DriftPair, GroupMeasures, Measures
from picardopt.sweep import as_measures, choose_stride, measure, within
from tests.helpers.quadratic import Quadratic


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


def test_a_pair_of_points_far_apart_tells_nothing() -> None:
    tolerance = DriftTolerance(noise=0.5, drift=0.0)
    tolerance.update(replace(SILENT, pair=pair(0.3)), 1)
    before = tolerance.state_dict()
    wild = replace(pair(1e-3), distances=(1e6,))
    tolerance.update(replace(SILENT, pair=wild), 1)
    assert tolerance.state_dict()["distances"] == before["distances"]
    assert stride(tolerance, 0.3) == 1
