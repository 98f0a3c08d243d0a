"""Predicts the strides of other windows from a short run's records.

Two things decide how far a sweep gets. A guess is *fresh* if the predictor made it after the sweep before, and
*refined* if that sweep evaluated its step already. Fresh guesses hold for a number of steps behind the last refined
one; refined ones up to a slot of their own. After a stride s in a window of W, W - s guesses are refined, so that

    stride = min(refined reach, W - s + fresh reach, W).

Each record tells one or both of these reaches. Where nothing was refused, the residual's share of what is accepted is
extended by the power of the distance with which it has grown until there; of one or two refined guesses by the third
power, with which it grows in all runs that were looked at (docs/plan.md).
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from picardopt.gauge import sweeps_between
from picardopt.measures import DriftPair, Measures, Threshold, weighted
from picardopt.stats import SweepRecord
from picardopt.sweep import accepted, choose_stride

FIRST_SWEEPS = 2
"""Sweeps at the start that tell nothing yet: tolerances learn from them."""
FEWEST = 3
"""Number of records below which nothing can be predicted."""
_SWEEPS = 64
"""Sweeps that a mean stride is taken over."""
_REFINED = 3.0
"""Power of the distance with which residuals of refined guesses grow, where there are too few to tell."""
_FARTHEST = 100.0
"""Logarithm of the factor by which a distance is extended at most."""
_FLATTEST = 0.25
"""Power of the distance below which a residual does not grow: it is never refused."""


class Forecast:
    """What the records of some sweeps tell of the strides of other windows.

    Args:
        records: Sweeps of one window, in order, from the first one on (`Stats.records`).
        exact: Whether acceptance compared bits (`Tolerance.exact`).
        holds_back: Whether a full sweep now and then holds its last drift back (`Tolerance.needs_pairs`).

    Attributes:
        records: The sweeps that count: those of a whole window, without the first ones.

    Raises:
        ValueError: If these are too few.
    """

    def __init__(
        self, records: Iterable[SweepRecord], *, exact: bool = False, holds_back: bool = False
    ) -> None:
        compared = [record for record in records if record.measures is not None]
        self._slots = max((record.slots for record in compared), default=0)
        whole = [record for record in compared if record.slots == self._slots]
        self.records = whole[FIRST_SWEEPS:]
        if self._slots < 2 or len(self.records) < FEWEST:
            raise ValueError(
                f"{len(self.records)} usable sweeps: a forecast needs at least {FEWEST}; take a few dozen steps "
                "first, with a window of at least 2"
            )
        self._exact, self._holds_back = exact, holds_back
        self._full = 0
        for record in whole[:FIRST_SWEEPS]:
            self._full = self._full + 1 if record.stride == self._slots else 0
        self._refined: list[int] = []
        fresh: list[float | None] = []
        again: list[float | None] = []
        least = []
        before = whole[FIRST_SWEEPS - 1]
        for record in self.records:
            known = before.step + before.slots - record.step
            self._refined.append(min(max(known, 0), self._slots - 1))
            refused = self._refused(record)
            least.append(min(refused, self._slots + 1.0))
            reach = self._reaches(record, refused, self._refined[-1])
            fresh.append(reach[0])
            again.append(reach[1])
            before = record
        first = next((reach for reach in again if reach is not None), math.inf)
        self._refined_reach = _filled(again, [first] * len(again), least)
        behind = [reach - count for reach, count in zip(least, self._refined, strict=True)]
        self._fresh_reach = _filled(fresh, self._refined_reach, behind)

    def _refused(self, record: SweepRecord) -> float:
        """Returns the first slot that a sweep refused, infinity if it refused none."""
        measures, accepts = record.measures, record.accepts
        if measures is None:
            raise ValueError(f"step {record.step}: nothing was compared")
        stride = choose_stride(measures, accepts, exact=self._exact)
        last = len(accepts)
        none = stride == last and accepted(measures, last, accepts[-1], exact=self._exact)
        return math.inf if none else stride

    def _reaches(
        self, record: SweepRecord, refused: float, refined: int
    ) -> tuple[float | None, float | None]:
        """Returns how many fresh guesses held behind the refined ones, and up to where those do; None if unknown."""
        if refused <= refined:
            return None, refused
        growing = [0.0] * self._slots  # of bits there is no more or less
        if not self._exact and record.measures is not None:
            growing = shares(record.measures, record.accepts)
        again = extended(growing[:refined], _REFINED) if refined else None
        if again is not None and again <= refused < math.inf and refined > 2:
            return None, refused
        if refused < math.inf:
            return refused - refined, again
        behind = growing[refined:]
        fresh = extended(behind) if len(behind) > 2 else extended(growing) - refined
        return max(fresh, self._slots + 1 - refined), again

    def strides(self, window: int, sweeps: int | None = None) -> list[int]:
        """Returns the strides that a window would have had over the same steps.

        At the records' own window they are the recorded ones.

        Args:
            window: The window, smaller or larger than the records'.
            sweeps: Number of sweeps, beginning anew at the end of the records; default: to that end.
        """
        heads = [record.step for record in self.records]
        start, end = heads[0], self.records[-1].step + self.records[-1].stride
        known, full = max(0, window - self._slots + self._refined[0]), self._full
        step = start
        found: list[int] = []
        while len(found) < sweeps if sweeps is not None else step < end:
            at = bisect_right(heads, start + (step - start) % (end - start)) - 1
            reach = min(self._refined_reach[at], known + self._fresh_reach[at], window)
            stride = max(1, int(reach))
            full = full + 1 if stride == window else 0
            if self._holds_back and full >= sweeps_between(window) and window > 1:
                stride, full = stride - 1, 0
            found.append(stride)
            known, step = window - stride, step + stride
        return found

    def mean_stride(self, window: int) -> float:
        """Returns the mean stride that a window would have had over these steps again and again."""
        return statistics.fmean(self.strides(window, _SWEEPS)) if window > 1 else 1.0

    def drift_error(self, farthest: int = 2) -> float | None:
        """Returns how far drifts at the first guesses are off, |error| / |drift| of the group that is off most.

        Args:
            farthest: Slot of the last guess that counts.

        Returns:
            None where none of these guesses was measured.
        """
        measured = [record.measures.pair for record in self.records if record.measures is not None]
        pairs = [pair for pair in measured if pair is not None and pair.slot <= farthest]
        groups = range(len(pairs[0].errors)) if pairs else ()
        return max((_ratio(pairs, group) for group in groups), default=None)


def _filled(
    values: Sequence[float | None], first: Sequence[float], least: Sequence[float]
) -> list[float]:
    """Replaces what is unknown by the last value, before that by `first`, and what is too small by `least`."""
    last, found = None, []
    for value, other, bound in zip(values, first, least, strict=True):
        last = last if value is None else value
        found.append(max(other if last is None else last, bound))
    return found


def shares(measures: Measures, accepts: Sequence[Threshold]) -> list[float]:
    """Returns each slot's residual as a share of what is accepted; above 1 it is refused.

    Args:
        measures: Of a sweep of p slots.
        accepts: What its residuals 1 .. p accept.
    """
    found = []
    for index, threshold in enumerate(accepts):
        residual = measures.residuals[index]
        if isinstance(threshold, tuple):
            share = weighted(threshold, [group.residuals[index] for group in measures.groups])
        elif threshold > 0:
            share = residual / threshold
        else:
            share = 0.0 if residual == 0 else math.inf
        found.append(share)
    return found


def growth(values: Sequence[float]) -> float | None:
    """Returns the power of the distance 1, 2, ... with which values grow, from the farther half; None if unknown."""
    half = len(values) // 2
    points = [
        (math.log(distance), math.log(value))
        for distance, value in enumerate(values, start=1)
        if distance >= half and 0 < value < math.inf
    ]
    if len(points) < 2:
        return None
    slope: float = statistics.linear_regression(*zip(*points, strict=True)).slope
    return slope


def extended(values: Sequence[float], power: float | None = None) -> float:
    """Returns the first distance at which growing values exceed 1, beyond those that are given.

    Args:
        values: At the distances 1, 2, ...; none is above 1.
        power: Of the distance, where they are too few to tell.
    """
    if power is None or len(values) > 2:
        power = growth(values)
    if power is None or power < _FLATTEST or not 0 < values[-1] <= 1:
        return math.inf
    farther = math.exp(min(-math.log(values[-1]) / power, _FARTHEST))
    return float(math.floor(len(values) * farther) + 1)


def _ratio(pairs: Sequence[DriftPair], group: int) -> float:
    drifts = sum(pair.drifts[group] for pair in pairs)
    return math.sqrt(sum(pair.errors[group] for pair in pairs) / drifts) if drifts > 0 else 0.0
