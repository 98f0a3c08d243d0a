"""Tolerances, the largest accepted residuals: fixed, adaptive (the paper's) or relative to the step length.

They are plain Python on host numbers, which are the same on every rank. NaN never enters a tolerance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from picardopt.measures import Measures, Threshold
from picardopt.protocols import members, missing_members

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,  # of an even count: the mean of the middle two
    "mean": statistics.fmean,
}


class Tolerance(Protocol):
    """The interface of tolerances; an object of your own may implement it."""

    @property
    def value(self) -> float:
        """The present tolerance: largest accepted squared distance per parameter."""
        ...

    @property
    def exact(self) -> bool:
        """Whether acceptance is a comparison of bits."""
        ...

    @property
    def needs_lengths(self) -> bool:
        """Whether `thresholds` or `update` read the step lengths (they are NaN otherwise)."""
        ...

    @property
    def needs_distances(self) -> bool:
        """Whether `thresholds` or `update` read the distances from the head (NaN otherwise)."""
        ...

    @property
    def needs_pairs(self) -> bool:
        """Whether it reads `Measures.pair`: then a sweep that accepts all holds its last drift back now and then."""
        ...

    def thresholds(self, measures: Measures) -> Sequence[Threshold]:
        """Returns what each slot accepts, j = 1..p; changes no state."""
        ...

    def update(self, measures: Measures, stride: int) -> None:
        """Learns from a sweep, after its stride was chosen."""
        ...

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the values that determine acceptance, as plain values; compared across ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to save in a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        ...


class FixedTolerance:
    """One number; 0 means exact: bitwise the sequential trajectory.

    Args:
        value: Largest accepted squared distance per parameter, 0 to infinity.

    Raises:
        ValueError: If the value is negative or NaN.
    """

    needs_lengths = False
    needs_distances = False
    needs_pairs = False

    def __init__(self, value: float) -> None:
        require(value >= 0, "tolerance", value, "give a number >= 0 (0 is exact)")
        self._value = float(value)

    def __repr__(self) -> str:
        return f"FixedTolerance({self._value:g})"

    @property
    def value(self) -> float:
        """The number."""
        return self._value

    @property
    def exact(self) -> bool:
        """True at 0."""
        return self._value == 0

    def thresholds(self, measures: Measures) -> list[float]:
        """Returns the number for every slot."""
        return [self._value] * len(measures.residuals)

    def update(self, measures: Measures, stride: int) -> None:
        """Does nothing: the number is fixed."""

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the number."""
        return (self._value,)

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignores the state: the number is the constructor's."""


class AdaptiveTolerance:
    """The paper's rule: ``e <- decay e + (1 - decay) M(error)`` after each sweep (Algorithm 2).

    Args:
        initial: The first tolerance e; 0 is legal and grows.
        decay: The paper's gamma, in [0, 1].
        statistic: The paper's M over the window's residuals, "median" or "mean"; residuals that are not
            finite are left out.

    Raises:
        ValueError: If an argument is out of range.
    """

    exact = False
    needs_lengths = False
    needs_distances = False
    needs_pairs = False

    def __init__(
        self, initial: float = 5e-6, decay: float = 0.9, statistic: str = "median"
    ) -> None:
        require(0 <= initial < math.inf, "initial", initial, "give a finite number >= 0")
        require(0 <= decay <= 1, "decay", decay, "give a number from 0 to 1 (the paper: 0.9)")
        require(statistic in STATISTICS, "statistic", statistic, "give 'median' or 'mean'")
        self._value, self.decay, self.statistic = float(initial), decay, statistic

    def __repr__(self) -> str:
        return f"AdaptiveTolerance({self._value:g}, decay={self.decay:g}, {self.statistic!r})"

    @property
    def value(self) -> float:
        """The present e."""
        return self._value

    def thresholds(self, measures: Measures) -> list[float]:
        """Returns the present e for every slot."""
        return [self._value] * len(measures.residuals)

    def update(self, measures: Measures, stride: int) -> None:
        """Updates the moving average with the window's residuals."""
        finite = [r for r in measures.residuals if math.isfinite(r)]
        if finite:
            error = STATISTICS[self.statistic](finite)
            self._value = self.decay * self._value + (1 - self.decay) * error

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the present e, the decay and the statistic."""
        return self._value, self.decay, self.statistic

    def state_dict(self) -> dict[str, Any]:
        """Returns the present e."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint's e."""
        self._value = float(state.get("value", self._value))


class StepRelativeTolerance:
    """Accepts a residual up to `factor` times the running mean of the squared step length.

    It needs no tuning for learning rates and scales, because both sides are squared distances per parameter.
    docs/tolerances.md compares it with `DriftTolerance`, which measures the errors of drifts.

    Args:
        factor: Accepted residual in units of the mean squared step length; 0 to infinity.
        distance: Accepted residual as a fraction of the iterate's squared distance from the head; the larger of both
            limits counts, and 0 disables this one.
        decay: Weight of the past in the running mean, per accepted step, in [0, 1).

    Raises:
        ValueError: If an argument is out of range.
    """

    exact = False
    needs_lengths = True
    needs_pairs = False

    def __init__(self, factor: float = 2.0, distance: float = 0.2, decay: float = 0.9) -> None:
        require(0 <= factor < math.inf, "factor", factor, "give a finite number >= 0")
        require(0 <= distance < math.inf, "distance", distance, "give a finite number >= 0")
        require(0 <= decay < 1, "decay", decay, "give a number from 0 to below 1")
        self.factor, self.distance, self.decay = factor, distance, decay
        self.needs_distances = distance > 0
        self._mean: float | None = None

    def __repr__(self) -> str:
        return f"StepRelativeTolerance({self.factor:g}, distance={self.distance:g}, decay={self.decay:g})"

    @property
    def value(self) -> float:
        """`factor` times the present mean squared step length (0 before the first sweep)."""
        return self.factor * (self._mean or 0.0)

    def thresholds(self, measures: Measures) -> list[float]:
        """Returns the larger of the step-relative and the distance-relative limit of each slot."""
        # The first mean: the head's step is always exact, and known before the stride is chosen.
        head = measures.step_lengths[0]
        mean = self._mean if self._mean is not None else (head if math.isfinite(head) else 0.0)
        floor = self.factor * mean
        return [
            max(floor, self.distance * d) if math.isfinite(d) else floor for d in measures.distances
        ]

    def update(self, measures: Measures, stride: int) -> None:
        """Updates the running mean with the accepted steps."""
        for length in measures.step_lengths[:stride]:
            if math.isfinite(length):
                before = length if self._mean is None else self._mean
                self._mean = self.decay * before + (1 - self.decay) * length

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the options and the present mean."""
        return self.factor, self.distance, self.decay, self._mean

    def state_dict(self) -> dict[str, Any]:
        """Returns the present mean squared step length."""
        return {"mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint's mean."""
        self._mean = state.get("mean", self._mean)


def as_tolerance(value: float | Tolerance) -> Tolerance:
    """Returns the tolerance for the optimizer's `tolerance` argument.

    Raises:
        TypeError: If it is neither a number nor an object with every member of `Tolerance`.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return FixedTolerance(value)
    missing = missing_members(value, Tolerance)
    if not missing:
        return cast(Tolerance, value)
    lacks = f"; it lacks {', '.join(missing)} of picardopt.tolerance.Tolerance"
    raise TypeError(
        f"tolerance={value!r}: give a number >= 0 (0 is exact), AdaptiveTolerance(...), StepRelativeTolerance(...), "
        "DriftTolerance(...) "
        f"or an object of your own{lacks if len(missing) < len(members(Tolerance)) else ''}"
    )


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises ValueError, naming an argument, its value and what to give instead, unless a condition holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: {remedy}")
