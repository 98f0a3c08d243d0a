"""An engine may evaluate a rank's slots in any way of its own: in another order, or joined."""

from collections.abc import Sequence

import pytest

from picardopt.drift import Drift, EvaluateSlot, Outcome
from picardopt.engines import SerialEngine
from picardopt.joint import JointEvaluation
from picardopt.layout import Row
from tests.helpers.runs import Case, assert_parallel, parallel


@pytest.mark.parametrize("problem", ["network", "clipping", "partial"])
def test_another_order_of_a_ranks_slots_changes_no_bit(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def backwards(
        self: SerialEngine,
        evaluate: EvaluateSlot,
        slots: Sequence[int],
        rows: Sequence[Row],
        until: Outcome,
        joint: JointEvaluation | None = None,
    ) -> list[Drift]:
        calls.append(len(slots))
        pairs = list(zip(slots, rows, strict=False))
        drifts = [evaluate(slot, row) for slot, row in reversed(pairs)][::-1]
        bad = [index for index, drift in enumerate(drifts) if drift.outcome >= until]
        return drifts[: bad[0] + 1] if bad else drifts

    case = Case(problem, "Adam")
    expected = parallel(case, window=4)
    monkeypatch.setattr(SerialEngine, "evaluate_many", backwards)
    got = parallel(case, window=4)
    assert_parallel(got)
    assert got.stats["strides"] == expected.stats["strides"]
    assert len(calls) == got.stats["sweeps"]
    assert max(calls) == 4
