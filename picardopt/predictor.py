"""What fills the slots that slide into the window behind its tail.

The residual decides what is kept, never the predictor: a bad guess costs a stride, not a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from picardopt.drift import Drift
from picardopt.layout import ParameterLayout, Row
from picardopt.rollout import Rollout

Predictor = Callable[[Rollout, ParameterLayout, Drift, Row, Sequence[Row]], None]


def hold(
    rollout: Rollout, layout: ParameterLayout, still: Drift, tail: Row, out: Sequence[Row]
) -> None:
    """Copies the tail (Algorithm 2: ``theta[tau+j] <- theta[tau+p]`` for j in [p, skip+p]).

    Args:
        rollout: The rollout, standing at the tail, inside its `speculation`.
        layout: The live tensors, holding the tail's values.
        still: A drift of zeros, None where the tail's own drift had None.
        tail: The tail's row.
        out: Rows to fill, in order of steps.
    """
    for row in out:
        row.copy_(tail)


def coast(
    rollout: Rollout, layout: ParameterLayout, still: Drift, tail: Row, out: Sequence[Row]
) -> None:
    """Steps the base on with zero drifts: its momentum carries the trajectory on.

    A guess that is not finite becomes hold; so does everything behind a step that the base refuses.
    Arguments as in `hold`.
    """
    before = tail
    for index, row in enumerate(out):
        try:
            rollout.advance(layout.parameters, still)
        except Exception:
            return hold(rollout, layout, still, before, out[index:])
        row.store(layout.tensors)
        _hold_if_not_finite(row, before)
        before = row
    return None


def _hold_if_not_finite(row: Row, before: Row) -> None:
    """Replaces the row by the one before it if any element is not finite, without a host sync."""
    finite = torch.stack([torch.isfinite(segment).all() for segment in row.segments]).all()
    torch.where(finite, row.buffer, before.buffer, out=row.buffer)


PREDICTORS: dict[str, Predictor] = {"hold": hold, "coast": coast}
