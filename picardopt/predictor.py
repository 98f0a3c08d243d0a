"""Fills the slots that slide into the window after its tail.

The residuals decide which guesses are kept: a bad predictor shortens strides but never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from picardopt.layout import Row
from picardopt.protocols import members, missing_members

Coast = Callable[[Row], bool]
"""Steps the base once more with zero gradients and writes the iterate into a row.

Returns False if the base's step failed; the row is then undefined. Call it in the order of steps.
"""


class Predictor(Protocol):
    """The interface of predictors; an object of your own may implement it."""

    def fill(self, tail: Row, rows: Sequence[Row], coast: Coast) -> None:
        """Guesses the iterates after the tail.

        Args:
            tail: The last iterate of the window.
            rows: Rows to fill, in order of steps.
            coast: Steps the base on from the tail with zero gradients.
        """
        ...

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the values that determine the guesses, as plain values; compared across ranks."""
        ...


class Hold:
    """Copies the tail (Algorithm 2: ``theta[tau+j] <- theta[tau+p]`` for j in [p, skip+p])."""

    def fill(self, tail: Row, rows: Sequence[Row], coast: Coast) -> None:
        """See `Predictor.fill`."""
        for row in rows:
            row.copy_(tail)

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the name: there are no options."""
        return ("hold",)


class Coasting:
    """Steps the base with zero gradients, so that its momentum continues the trajectory.

    A guess that is not finite is replaced by the iterate before it, and so is every guess after a step that failed.
    """

    def fill(self, tail: Row, rows: Sequence[Row], coast: Coast) -> None:
        """See `Predictor.fill`."""
        before = tail
        for index, row in enumerate(rows):
            if not coast(row):
                return Hold().fill(before, rows[index:], coast)
            before = row
        if not rows or rows[-1].is_finite():  # what is not finite stays so
            return None
        for before, row in zip([tail, *rows], rows, strict=False):
            if not row.is_finite():
                row.copy_(before)
        return None

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the name: there are no options."""
        return ("coast",)


PREDICTORS: dict[str, Predictor] = {"hold": Hold(), "coast": Coasting()}


def as_predictor(value: str | Predictor) -> Predictor:
    """Returns the predictor for the optimizer's `predictor` argument.

    Raises:
        ValueError: If it is an unknown name.
        TypeError: If an object lacks a member of `Predictor`.
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
