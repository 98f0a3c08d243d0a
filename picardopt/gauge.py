"""The drift error: how much a drift changes between the guess at which it was evaluated and the iterate.

The first drift that a sweep does not keep is evaluated again by the next sweep, as its head: for the same step, with
the same random numbers, at the iterate itself. The comparison costs no evaluation. A sweep that could keep all of its
drifts holds the last one back now and then, so that there is something to compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt.drift import Drift
from picardopt.layout import ParameterLayout, Row
from picardopt.measures import DriftMeasures, DriftPair
from picardopt.sweep import squared_distances, squared_lengths

_MEASURES = 5  # rows of `Gauge.measure`
RARELY = 64
"""One in so many drifts is held back to be evaluated twice, where sweeps could keep all of theirs."""


def sweeps_between(slots: int) -> int:
    """Returns how many sweeps that could keep all of their drifts there are to each that holds its last one back."""
    return max(1, RARELY // slots)


class Gauge:
    """Keeps a guess and its drift until the same step is evaluated at the iterate.

    Args:
        layout: Makes the two rows that are kept.

    Attributes:
        guess: Where the kept drift was evaluated; see `has`.
        drift: The kept drift, as it would have been committed.
        coefficients: What it was corrected with (`Drift.correction`).
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self.guess, self.drift = layout.row(), layout.row()
        self.coefficients: list[Tensor] | None = None
        self._step: int | None = None
        self._slot, self._accepted = 0, False
        self._full, self._compared = 0, False

    def holds_back(self, stride: int, slots: int) -> bool:
        """Returns whether a sweep must not keep its last drift, though it could; call it once a sweep.

        Args:
            stride: Number of drifts that the tolerance accepts.
            slots: Number of drifts.
        """
        if stride < slots or slots == 1:
            return False
        self._full += 1
        sweeps = sweeps_between(slots)
        return self._full >= (sweeps if self._compared else min(2, sweeps))

    def keep(self, step: int, slot: int, guess: Row, drift: Drift, *, accepted: bool) -> None:
        """Keeps a drift that the sweep did not.

        Args:
            step: Its step: the head of the next sweep.
            slot: Its slot.
            guess: Where it was evaluated.
            drift: As it would have been committed, that is corrected.
            accepted: Whether the tolerance accepted its guess.
        """
        self.guess.copy_(guess)
        self.drift.copy_(drift.row)
        self.coefficients = drift.correction
        self._step, self._slot, self._accepted, self._full = step, slot, accepted, 0

    def has(self, step: int) -> bool:
        """Returns whether a drift of this step is kept."""
        return self._step == step

    def forget(self) -> None:
        """Forgets the kept drift, as where the closure may have changed since."""
        self._step = None

    def measure(self, head: Row, drifts: Sequence[Drift], changes: Tensor | None = None) -> Tensor:
        """Measures the head's drift, its noise and the kept pair.

        Args:
            head: The head.
            drifts: The window's drifts.
            changes: `DriftPair.changes`, where the kept drift was corrected.

        Returns:
            float64 tensor [5 groups], no host sync: for each group the mean squared length of the first two drifts,
            half their squared difference, the squared distance from the kept guess to the head, that of their drifts,
            and the changes. NaN where there is nothing to compare.
        """
        numels, first = self._layout.numels, drifts[0].row
        shape = (_MEASURES, len(numels))
        rows = torch.full(shape, math.nan, dtype=torch.float64, device=self._layout.device)
        lengths = [squared_lengths(drift.row, numels) for drift in drifts[:2]]
        rows[0] = torch.stack(lengths).mean(0)
        if len(drifts) > 1:
            rows[1] = squared_distances([(drifts[1].row, first)], numels)[:, 0] / 2
        if self.has(drifts[0].step):
            pairs = [(head, self.guess), (first, self.drift)]
            rows[2:4] = squared_distances(pairs, numels).T
            rows[4] = rows[3] if changes is None else changes
        return rows.flatten()

    def read(self, numbers: Sequence[float], step: int) -> DriftMeasures:
        """Returns what `measure` measured, once on the host and agreed; forgets the kept drift.

        Args:
            numbers: Its numbers.
            step: The head's step.
        """
        count = len(self._layout.numels)
        drifts, noises, distances, errors, changes = (
            tuple(numbers[at : at + count]) for at in range(0, _MEASURES * count, count)
        )
        pair = None
        if self.has(step):
            pair = DriftPair(self._slot, self._accepted, distances, errors, changes, drifts)
            self._compared = True
        self._step = None
        return DriftMeasures(drifts, noises, pair)
