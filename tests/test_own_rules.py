"""Tolerances and predictors of the user's own, and what the built-in ones promise."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import picardopt.stats
from picardopt import (
    AdaptiveTolerance,
    DriftTolerance,
    FixedTolerance,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
)
from picardopt.layout import Row
from picardopt.measures import GroupMeasures, Measures
from picardopt.options import Options
from picardopt.predictor import PREDICTORS, Coast, Predictor, as_predictor
from picardopt.protocols import members
from picardopt.tolerance import Tolerance, as_tolerance

COLUMNS = ((1.0, 2.0, 4.0), (0.5, 0.25, 0.125), (0.5, 0.75, 0.9))
MEASURES = Measures(*COLUMNS, (False,) * 3, (GroupMeasures(*COLUMNS, 2.0, 1.0),), (10,))
BUILT_IN = [
    FixedTolerance(1e-3),
    AdaptiveTolerance(1e-3),
    StepRelativeTolerance(2.0, 0.2),
    DriftTolerance(),
]


class Halving:
    """A tolerance of one's own: complete, and only just."""

    needs_lengths = needs_distances = needs_pairs = exact = False

    def __init__(self, value: float) -> None:
        self.value = value

    def thresholds(self, measures: Measures) -> list[float]:
        return [self.value] * len(measures.residuals)

    def update(self, measures: Measures, stride: int) -> None:
        self.value /= 2

    def fingerprint(self) -> tuple[object, ...]:
        return (self.value,)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def make(**options: Any) -> tuple[ParallelPicardOptimizer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = ParallelPicardOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-2), **{"window": 4, **options}
    )

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        x = torch.randn(8, 3)
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        return loss

    return optimizer, closure


def test_a_tolerance_of_ones_own_runs() -> None:
    optimizer, closure = make(tolerance=Halving(1e-2))
    for _ in range(10):
        optimizer.step(closure)
    assert optimizer.tolerance.value == 1e-2 / 2**optimizer.stats.sweeps
    assert [r.thresholds[0] for r in optimizer.stats.records][:2] == [1e-2, 5e-3]


@pytest.mark.parametrize("name", members(Tolerance))
def test_a_tolerance_that_lacks_a_member_is_refused_by_name(name: str) -> None:
    """At construction: not by an AttributeError in the middle of the first sweep."""

    class Incomplete(Halving):
        pass

    whole = {key: value for cls in (Halving, Incomplete) for key, value in vars(cls).items()}
    kept = {k: v for k, v in whole.items() if k not in (name, "__dict__", "__weakref__")}
    if name == "value":
        kept["__init__"] = lambda self, value: None
    own = type("Incomplete", (), kept)(1.0)
    with pytest.raises(TypeError, match=rf"lacks {name} of picardopt\.tolerance\.Tolerance"):
        make(tolerance=own)


@pytest.mark.parametrize("tolerance", BUILT_IN, ids=repr)
def test_asking_for_thresholds_changes_nothing(tolerance: Tolerance) -> None:
    tolerance = copy.deepcopy(tolerance)
    before = copy.deepcopy(vars(tolerance))
    first = tolerance.thresholds(MEASURES)
    assert vars(tolerance) == before
    assert tolerance.thresholds(MEASURES) == first


def test_the_first_mean_is_the_heads_step_and_then_learns() -> None:
    tolerance = StepRelativeTolerance(2.0, 0.0, decay=0.5)
    assert tolerance.thresholds(MEASURES) == [1.0] * 3  # 2 x 0.5
    tolerance.update(MEASURES, 2)  # 0.5, then 0.25 into a mean that began at 0.5
    assert tolerance.value == 2 * (0.5 * 0.5 + 0.5 * 0.25)


def digest(tolerance: Tolerance, predictor: Any = "coast") -> int:
    return Options(4, as_predictor(predictor), None, 0, "raise").digest(tolerance, "auto")


def test_the_digest_asks_the_tolerance() -> None:
    """What a tolerance of one's own keeps in a list or behind slots decides too."""

    class Hidden(Halving):
        def __init__(self, value: float) -> None:
            self.levels = [value]

        value = property(lambda self: self.levels[0])  # type: ignore[assignment]

    assert digest(Hidden(1.0)) != digest(Hidden(2.0))
    assert digest(Hidden(1.0)) == digest(Hidden(1.0))
    seen = {digest(tolerance) for tolerance in BUILT_IN}
    assert len(seen) == len(BUILT_IN)
    learned = AdaptiveTolerance(1e-3)
    learned.update(MEASURES, 1)
    assert digest(learned) != digest(AdaptiveTolerance(1e-3))


class Backwards:
    """A predictor of one's own: the tail, a little towards zero."""

    def fill(self, tail: Row, rows: Sequence[Row], coast: Coast) -> None:
        for row in rows:
            row.copy_(tail)
            for segment in row.segments:
                segment.mul_(0.999)

    def fingerprint(self) -> tuple[object, ...]:
        return ("backwards", 0.999)


def test_a_predictor_of_ones_own_changes_no_bit_at_tolerance_0() -> None:
    weights = []
    for predictor in (Backwards(), "hold", "coast"):
        optimizer, closure = make(tolerance=0, predictor=predictor)
        for _ in range(8):
            optimizer.step(closure)
        weights.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_predictors_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="predictor='secant': give one of 'hold', 'coast'"):
        make(predictor="secant")
    for name in members(Predictor):
        kept = {k: v for k, v in vars(Backwards).items() if k in members(Predictor) and k != name}
        with pytest.raises(TypeError, match=f"it lacks {name}"):
            make(predictor=type("Incomplete", (), kept)())
    assert digest(FixedTolerance(0), "hold") != digest(FixedTolerance(0), "coast")
    assert set(PREDICTORS) == {"hold", "coast"}


def test_as_tolerance_of_something_else() -> None:
    for value in (True, "0", None, object()):
        with pytest.raises(TypeError, match="tolerance="):
            as_tolerance(value)  # type: ignore[arg-type]


def test_a_long_runs_figures_are_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sweeps than are kept one by one: nothing that is counted may be cut with them."""
    assert picardopt.stats.HISTORY == 10_000
    monkeypatch.setattr(picardopt.stats, "HISTORY", 100)
    parameter = nn.Parameter(torch.ones(1))
    base = torch.optim.SGD([parameter], lr=1e-5)
    optimizer = ParallelPicardOptimizer(base, window=1, audit="never")
    gradient = torch.ones(1)

    def closure() -> float:
        parameter.grad = gradient
        return 1.0

    steps = 250
    for _ in range(steps):
        optimizer.step(closure)
    stats = optimizer.stats
    assert stats.steps == stats.sweeps == stats.final == stats.drift_evaluations == steps
    assert stats.mean_stride == 1
    assert stats.wasted_evaluations == 0
    assert len(stats.records) == 100
    assert stats.records[-1].step == steps - 1


@pytest.mark.parametrize("kind", [StepRelativeTolerance(2.0, 0.2), DriftTolerance()], ids=repr)
def test_records_suffice_to_try_another_tolerance(kind: Tolerance) -> None:
    """What each sweep would have accepted at another number follows from its record alone."""
    from picardopt.sweep import choose_stride

    optimizer, closure = make(tolerance=kind)
    for _ in range(12):
        optimizer.step(closure)
    for record in optimizer.stats.records:
        measures = record.measures
        assert measures is not None
        again = choose_stride(measures, record.thresholds, exact=False)
        assert again == choose_stride(measures, record.accepts, exact=False)
        assert again == record.stride
        for value in (0.0, 1e-6, float("inf")):
            thresholds = FixedTolerance(value).thresholds(measures)
            stride = choose_stride(measures, thresholds, exact=value == 0)
            assert 1 <= stride <= record.slots
        assert stride == len(record.residuals)
    phases = optimizer.stats.seconds
    assert sum(r.seconds["drift"] for r in optimizer.stats.records) == pytest.approx(
        phases["drift"]
    )
