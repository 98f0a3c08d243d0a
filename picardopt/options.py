"""The options that stay fixed over a run."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from picardopt.predictor import Predictor
from picardopt.restructure import Restructure, holders_of, steps_until_due
from picardopt.tolerance import Tolerance


@dataclass(frozen=True)
class Options:
    """The constructor's options; see `ParallelPicardOptimizer`."""

    window: int
    predictor: Predictor
    total_steps: int | None
    seed: int
    nonfinite: str
    restructure: Restructure | None = None
    secants: int | None = None

    def slots(self, step: int, *, exact: bool) -> int:
        """Returns the number of drifts to evaluate at a step: ``p <- min(p, T - tau)``, at least 1."""
        slots = self.window
        if self.total_steps is not None:
            slots = max(1, min(slots, self.total_steps - step))
        restructure = self.restructure
        if restructure is not None and (exact or not restructure.across):
            slots = steps_until_due(restructure, step, slots)
        return slots

    def digest(self, tolerance: Tolerance, audit: str) -> int:
        """Returns a hash of the options that decide which steps are accepted, to be compared across ranks."""
        deciding = (
            (type(tolerance).__name__, tolerance.fingerprint()),
            (type(self.predictor).__name__, self.predictor.fingerprint()),
            (self.total_steps, self.nonfinite, self.secants, audit),
        )
        return zlib.crc32(repr(deciding).encode())

    def change_at(
        self, step: int, carry: object
    ) -> tuple[Callable[[], Tensor | None] | None, list[object]]:
        """Returns the function to restructure with after a step, if it is due, and the objects that it may change."""
        if self.restructure is None or not self.restructure.due(step):
            return None, []
        return partial(self.restructure.function, step), [*holders_of(self.restructure), carry]
