"""Numbers that move over a run, as plain functions of the step: nothing is kept between steps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, fields

Points = float | tuple[tuple[int, float], ...]
"""A number, or (step, value) pairs between which it moves linearly and outside of which it stays."""

Milestones = int | tuple[tuple[int, int], ...]
"""A whole number, or (first step, value) pairs, each in force until the next; the first step is 0."""


def value_at(points: Points, step: int) -> float:
    """The value of a schedule at a step; a jump is two pairs of the same step, the later one from there on."""
    if isinstance(points, float | int):
        return float(points)
    after = bisect_right([point[0] for point in points], step)
    if after == 0 or after == len(points):
        return float(points[max(0, after - 1)][1])
    (begin, first), (end, last) = points[after - 1], points[after]
    return first + (last - first) * (step - begin) / (end - begin)


def current(milestones: Milestones, step: int) -> int:
    """The number that is in force at a step."""
    if isinstance(milestones, int):
        return milestones
    return milestones[bisect_right([first for first, _ in milestones], step) - 1][1]


@dataclass(frozen=True)
class Weights:
    """Weights of a recipe's losses by name, each a number or (step, value) pairs that it moves between."""

    sds: Points = 1.0

    def __post_init__(self) -> None:
        """Checks the weights.

        Raises:
            ValueError: One is negative or goes backwards in time.
        """
        for item in fields(self):
            check_points(f"weights.{item.name}", getattr(self, item.name))

    def at(self, step: int) -> dict[str, float]:
        """Returns the weights of one step, by name; those of 0 are left out."""
        values = {item.name: value_at(getattr(self, item.name), step) for item in fields(self)}
        return {name: value for name, value in values.items() if value > 0}


def check_points(name: str, points: Points) -> None:
    """Refuse a weight that is negative, or points that go backwards.

    Raises:
        ValueError: With the name and the remedy.
    """
    pairs = ((0, points),) if isinstance(points, float | int) else points
    steps = [step for step, _ in pairs]
    if not pairs or steps != sorted(steps) or not all(value >= 0 for _, value in pairs):
        raise ValueError(
            f"{name}={points!r}: give a number that is not negative, or (step, value) pairs in order of their steps"
        )


def check_milestones(name: str, milestones: Milestones) -> None:
    """Refuse numbers below 1, and milestones that do not begin at step 0 or go backwards.

    Raises:
        ValueError: With the name and the remedy.
    """
    pairs = ((0, milestones),) if isinstance(milestones, int) else milestones
    steps = [step for step, _ in pairs]
    in_order = bool(pairs) and steps[0] == 0 and steps == sorted(set(steps))
    if not in_order or not all(value >= 1 for _, value in pairs):
        raise ValueError(
            f"{name}={milestones!r}: give a whole number of at least 1, or (first step, number) pairs from step 0 on"
        )
