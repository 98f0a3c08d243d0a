"""What a sweep measures: the numbers that tolerances decide by, the same on every rank.

All are squared and per parameter: the sum over the elements of a parameter group, divided by their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Threshold = float | tuple[float, ...]
"""What residual a slot accepts: up to a number, of all groups together; or, with a weight for each group, while the
weighted sum of the groups' residuals is at most 1."""


@dataclass(frozen=True)
class GroupMeasures:
    """One parameter group's part of `Measures`, with the same entries.

    Attributes:
        residuals: Entry j-1: between iterate t+j before and after the sweep, j = 1..p.
        step_lengths: Entry j: between the new iterates t+j and t+j+1, j = 0..p-1.
        distances: Entry j-1: between the head and the new iterate t+j, j = 1..p.
        drift: Mean squared length of the drifts of slots 0 and 1.
        noise: Half the squared difference between the drifts of slots 0 and 1: about the variance of one drift. NaN if
            only one was evaluated.
    """

    residuals: tuple[float, ...]
    step_lengths: tuple[float, ...]
    distances: tuple[float, ...]
    drift: float
    noise: float


@dataclass(frozen=True)
class DriftPair:
    """A drift that was evaluated at a guess and, one sweep later, at the iterate: same step, same randomness.

    It is the first drift that the earlier sweep did not keep, which is the head of the next one. Each entry is a
    parameter group's.

    Attributes:
        slot: The slot of the guess in the earlier window.
        accepted: Whether the guess was within the tolerance, and only held back to be measured.
        distances: Between the guess and the iterate.
        errors: Between the drift that the earlier sweep would have committed and the drift at the iterate.
        changes: Between the drift as it was evaluated at the guess and the drift at the iterate; the errors, unless the
            first was corrected (`picardopt.correction`).
        drifts: `GroupMeasures.drift` of the later sweep.
    """

    slot: int
    accepted: bool
    distances: tuple[float, ...]
    errors: tuple[float, ...]
    changes: tuple[float, ...]
    drifts: tuple[float, ...]


@dataclass(frozen=True)
class DriftMeasures:
    """What is known of the head's drift; by parameter group.

    Attributes:
        drifts: `GroupMeasures.drift`.
        noises: `GroupMeasures.noise`.
        pair: The head's drift against that of an earlier guess, if the sweep before evaluated one.
    """

    drifts: tuple[float, ...]
    noises: tuple[float, ...]
    pair: DriftPair | None = None


@dataclass(frozen=True)
class Measures:
    """The measures of one sweep, as host numbers; all squared distances are per parameter.

    Attributes:
        residuals: Entry j-1: between iterate t+j before and after the sweep, j = 1..p.
        step_lengths: Entry j: between the new iterates t+j and t+j+1, j = 0..p-1.
        distances: Entry j-1: between the head and the new iterate t+j, j = 1..p.
        same_bits: Entry j-1: whether iterate t+j kept its bits.
        groups: The same by parameter group, of those that count in residuals.
        numels: Number of parameters of each group.
        pair: The head's drift against that of an earlier guess, if the sweep before evaluated one.
    """

    residuals: tuple[float, ...]
    step_lengths: tuple[float, ...]
    distances: tuple[float, ...]
    same_bits: tuple[bool, ...]
    groups: tuple[GroupMeasures, ...] = ()
    numels: tuple[int, ...] = ()
    pair: DriftPair | None = None


def pooled(values: Sequence[float], numels: Sequence[int]) -> float:
    """Returns the squared distance per parameter of all groups together.

    Args:
        values: Each group's squared distance per parameter.
        numels: Each group's number of parameters.
    """
    if len(values) == 1:
        return values[0]
    total = sum(numels)
    return sum(n * x for n, x in zip(numels, values, strict=True)) / max(1, total)


def weighted(weights: Sequence[float], residuals: Sequence[float]) -> float:
    """Returns the sum that a threshold of weights compares with 1; a group that did not move adds nothing to it."""
    return sum(w * r for w, r in zip(weights, residuals, strict=True) if r != 0)


def mixed(before: Sequence[float] | None, values: Sequence[float], decay: float) -> list[float]:
    """Returns running means with new values, which they begin with; `decay` is the weight of the past."""
    if before is None:
        return list(values)
    return [decay * a + (1 - decay) * b for a, b in zip(before, values, strict=True)]


class DriftMeans:
    """Running means, by parameter group, of what drifts are and of how far they are off.

    Args:
        decay: Weight of the past, per sweep for drifts and per pair for errors.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._drifts: list[float] = []
        self._noises: list[float] = []
        self._errors: list[float] = []
        self._compared: list[float] = []  # squared lengths of the drifts that the errors are of

    def learn(self, measures: Measures) -> None:
        """Takes in a sweep."""
        groups = measures.groups
        self._mix("_drifts", [group.drift for group in groups])
        self._mix("_noises", [group.noise for group in groups])
        if measures.pair is not None:
            self._mix("_errors", measures.pair.errors)
            self._mix("_compared", measures.pair.drifts)

    def _mix(self, name: str, values: Sequence[float]) -> None:
        old: list[float] = getattr(self, name)
        if all(map(math.isfinite, values)):
            same_groups = len(old) == len(values)
            setattr(self, name, mixed(old if same_groups else None, values, self._decay))

    @property
    def error(self) -> tuple[float, ...]:
        """|error| / |drift| by group; empty before the first pair."""
        return _roots(self._errors, self._compared)

    @property
    def noise(self) -> tuple[float, ...]:
        """|noise| / |drift| by group; empty before the first sweep of two drifts."""
        return _roots(self._noises, self._drifts)


def _roots(values: Sequence[float], drifts: Sequence[float]) -> tuple[float, ...]:
    """Returns the roots of squared lengths as shares of the drifts'; empty where a group lacks one of both."""
    if len(values) != len(drifts):
        return ()
    pairs = zip(values, drifts, strict=True)
    return tuple(math.sqrt(x / drift) if drift > 0 else 0.0 for x, drift in pairs)
