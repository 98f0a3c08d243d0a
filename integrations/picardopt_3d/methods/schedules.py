"""Values that change during a run, as functions of the step without state."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, fields

Points = float | tuple[tuple[int, float], ...]
"""A number, or (step, value) pairs with linear interpolation between them and constant values outside them."""

Milestones = int | tuple[tuple[int, int], ...]
"""A whole number, or (first step, value) pairs, each valid until the next one; the first step is 0."""


def value_at(points: Points, step: int, geometric: bool = False) -> float:
    """Returns the value of a schedule at a step; of two pairs with the same step (a jump), the later one counts.

    Args:
        points: The schedule.
        step: The step.
        geometric: Whether the value changes by equal factors between two pairs, which then must be positive, instead
            of equal differences.
    """
    if isinstance(points, float | int):
        return float(points)
    after = bisect_right([point[0] for point in points], step)
    if after == 0 or after == len(points):
        return float(points[max(0, after - 1)][1])
    (begin, first), (end, last) = points[after - 1], points[after]
    if geometric:
        return float(first * (last / first) ** ((step - begin) / (end - begin)))
    return first + (last - first) * (step - begin) / (end - begin)


def current(milestones: Milestones, step: int) -> int:
    """Returns the number that is valid at a step."""
    if isinstance(milestones, int):
        return milestones
    return milestones[bisect_right([first for first, _ in milestones], step) - 1][1]


@dataclass(frozen=True)
class Weights:
    """Weights of a recipe's losses, each a number or (step, value) pairs.

    Attributes:
        sds: Weight of score distillation.
    """

    sds: Points = 1.0

    def __post_init__(self) -> None:
        """Checks the weights.

        Raises:
            ValueError: A weight is negative, its steps are not in order, or all weights are 0 at every step.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, points in given.items():
            check_points(f"weights.{name}", points)
        if not any(value > 0 for points in given.values() for _, value in _pairs(points)):
            raise ValueError("weights: all are 0 at every step; give one that is not")

    def at(self, step: int) -> dict[str, float]:
        """Returns the weights of one step, by name; those of 0 are left out."""
        values = {item.name: value_at(getattr(self, item.name), step) for item in fields(self)}
        return {name: value for name, value in values.items() if value > 0}


def check_points(name: str, points: Points) -> None:
    """Checks that values are not negative and that steps are in order.

    Args:
        name: Name of the option, for the message.
        points: Its value.

    Raises:
        ValueError: A value is negative, or the steps are not in order.
    """
    pairs = _pairs(points)
    steps = [step for step, _ in pairs]
    if not pairs or steps != sorted(steps) or not all(value >= 0 for _, value in pairs):
        raise ValueError(
            f"{name}={points!r}: give a number that is not negative, or (step, value) pairs in order of their steps"
        )


def _pairs(points: Points) -> tuple[tuple[int, float], ...]:
    """Returns a schedule as (step, value) pairs."""
    return ((0, points),) if isinstance(points, float | int) else points


def check_milestones(name: str, milestones: Milestones) -> None:
    """Checks that numbers are at least 1 and that the steps start at 0 and increase.

    Args:
        name: Name of the option, for the message.
        milestones: Its value.

    Raises:
        ValueError: A number is below 1, or the steps do not start at 0 or do not increase.
    """
    pairs = ((0, milestones),) if isinstance(milestones, int) else milestones
    steps = [step for step, _ in pairs]
    in_order = bool(pairs) and steps[0] == 0 and steps == sorted(set(steps))
    if not in_order or not all(value >= 1 for _, value in pairs):
        raise ValueError(
            f"{name}={milestones!r}: give a whole number of at least 1, or (first step, number) pairs from step 0 on"
        )
