"""Fills the slots that slide into the window behind its tail.

The residual decides what is kept, never the predictor: a bad guess costs a stride, not a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from picardopt.layout import Row
from picardopt.protocols import members, missing_members

Coast = Callable[[Row], bool]
"""Steps the base on from where it stands with zero gradients and writes the iterate into a row.

Returns False if the base refused; its row is then undefined. Only to be called in order of steps.
"""


class Predictor(Protocol):
    """What a predictor must offer; your own object may be one."""

    def fill(self, tail: Row, rows: Sequence[Row], coast: Coast) -> None:
        """Guesses the iterates behind the tail.

        Args:
            tail: The last iterate of the window.
            rows: Rows to fill, in order of steps.
            coast: Steps the base on from the tail with zero gradients.
        """
        ...

    def fingerprint(self) -> tuple[object, ...]:
        """Returns all that decides what is guessed, as plain values: the ranks compare it."""
        ...


class Hold:
    """Copies the tail (Algorithm 2: ``theta[tau+j] <- theta[tau+p]`` for j in [p, skip+p])."""

    def fill(self, tail: Row, rows: Sequence[Row], coast: Coast) -> None:
        """See `Predictor.fill`."""
        for row in rows:
            row.copy_(tail)

    def fingerprint(self) -> tuple[object, ...]:
        """Nothing but the name decides."""
        return ("hold",)


class Coasting:
    """Steps the base on with zero gradients: its momentum carries the trajectory on.

    A guess that is not finite becomes the iterate before it; so does everything behind a step that the base refuses.
    """

    def fill(self, tail: Row, rows: Sequence[Row], coast: Coast) -> None:
        """See `Predictor.fill`."""
        before = tail
        for index, row in enumerate(rows):
            if not coast(row):
                return Hold().fill(before, rows[index:], coast)
            _hold_if_not_finite(row, before)
            before = row
        return None

    def fingerprint(self) -> tuple[object, ...]:
        """Nothing but the name decides."""
        return ("coast",)


PREDICTORS: dict[str, Predictor] = {"hold": Hold(), "coast": Coasting()}


def as_predictor(value: str | Predictor) -> Predictor:
    """Turns the optimizer's `predictor` argument into a predictor.

    Raises:
        ValueError: If it is an unknown name.
        TypeError: If it is no object with every member of `Predictor`.
    """
    if isinstance(value, str):
        if value not in PREDICTORS:
            names = ", ".join(map(repr, PREDICTORS))
            raise ValueError(f"predictor={value!r}: give one of {names}, or an object of your own")
        return PREDICTORS[value]
    missing = missing_members(value, Predictor)
    if missing:
        raise TypeError(
            f"predictor={value!r}: give 'coast', 'hold' or an object with {', '.join(members(Predictor))}; "
            f"it lacks {', '.join(missing)}"
        )
    return value


def _hold_if_not_finite(row: Row, before: Row) -> None:
    """Replaces the row by the one before it if any element is not finite, without a host sync."""
    finite = torch.stack([torch.isfinite(segment).all() for segment in row.segments]).all()
    torch.where(finite, row.buffer, before.buffer, out=row.buffer)
