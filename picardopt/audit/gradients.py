"""Finds closures that add to gradients left in ``.grad`` before the call.

Torch accumulates gradients: over micro-batches in the loop, or over steps if nothing clears them. Such a gradient is
not a function of the parameters and the step, and running ahead starts every evaluation without one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from picardopt.closure import StepClosure
from picardopt.errors import ImpureClosureError

_MOST_CLOSURES = 64  # remembered at once


class GradientClearing:
    """Remembers the gradients that a closure adds to without clearing them first."""

    def __init__(self) -> None:
        self._uncleared: dict[object, tuple[int, ...]] = {}  # by the closure's code

    def untested(self, closure: StepClosure) -> bool:
        """Returns whether this closure's code was not tested yet."""
        return closure.code not in self._uncleared

    def learn(self, closure: StepClosure, uncleared: tuple[int, ...]) -> None:
        """Stores a test's result: the indices of the parameters whose gradients are not cleared."""
        if len(self._uncleared) >= _MOST_CLOSURES:
            self._uncleared.clear()
        self._uncleared[closure.code] = uncleared

    def check(self, closure: StepClosure, parameters: Sequence[Tensor]) -> None:
        """Refuses a closure that would add to a gradient.

        Raises:
            ImpureClosureError: If a parameter has a gradient that the closure does not clear.
        """
        standing = [
            index
            for index in self._uncleared.get(closure.code, ())
            if index < len(parameters) and parameters[index].grad is not None
        ]
        if standing:
            raise ImpureClosureError(
                f"parameter {standing[0]} has a gradient in .grad before step(closure), and the closure adds to it "
                "instead of clearing it: evaluated ahead of time, a step starts without that gradient, so the result "
                "would differ. Call optimizer.zero_grad() first in the closure and run all of the step's backward() "
                "calls (every micro-batch) in it; or run them in your loop and call step() without a closure"
            )
