"""Finds closures that add to gradients left in ``.grad`` before the call.

Torch accumulates gradients: over micro-batches in the loop, or over steps if nothing clears them. Such a gradient is
not a function of the parameters and the step, and running ahead starts every evaluation without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from picardopt.closure import StepClosure
from picardopt.errors import ImpureClosureError

_MOST_CLOSURES = 64  # remembered at once
_FIRST_SWEEPS = 8


@dataclass
class _Known:
    """What the tests of one closure's code found since its first sweep."""

    first: int
    uncleared: set[int] = field(default_factory=set)


class GradientClearing:
    """Remembers the gradients that a closure adds to without clearing them first."""

    def __init__(self) -> None:
        self._known: dict[object, _Known] = {}  # by the closure's code

    def due(self, closure: StepClosure, sweep: int) -> bool:
        """Returns whether to test the closure in this sweep: in its first ones, then ever more rarely.

        A closure may clear at some steps only. Once it was found not to, no further test is needed.
        """
        known = self._known.get(closure.code)
        if known is None:
            return True
        age = sweep - known.first
        return not known.uncleared and (age < _FIRST_SWEEPS or age & (age - 1) == 0)

    def learn(
        self, closure: StepClosure, sweep: int, found: Iterable[tuple[int, ...] | None]
    ) -> None:
        """Stores what tests found: the indices of the parameters whose gradients are not cleared; None for no test."""
        tested = [indices for indices in found if indices is not None]
        if not tested:
            return
        if closure.code not in self._known and len(self._known) >= _MOST_CLOSURES:
            self._known.clear()
        known = self._known.setdefault(closure.code, _Known(sweep))
        known.uncleared.update(*tested)

    def check(self, closure: StepClosure, parameters: Sequence[Tensor]) -> None:
        """Refuses a closure that would add to a gradient.

        Raises:
            ImpureClosureError: If a parameter has a gradient that the closure does not clear.
        """
        known = self._known.get(closure.code)
        if known is None:
            return
        standing = [
            index
            for index in sorted(known.uncleared)
            if index < len(parameters) and parameters[index].grad is not None
        ]
        if standing:
            raise ImpureClosureError(
                f"parameter {standing[0]} has a gradient in .grad before step(closure), and the closure adds to it "
                "instead of clearing it: evaluated ahead of time, a step starts without that gradient, so the result "
                "would differ. Call optimizer.zero_grad() first in the closure and run all of the step's backward() "
                "calls (every micro-batch) in it; or run them in your loop and call step() without a closure"
            )
