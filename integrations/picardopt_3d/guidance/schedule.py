"""The range of noise levels during a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TimestepSchedule:
    """A range of noise levels whose ends change linearly; all levels are fractions of the model's schedule.

    `TimestepSchedule()` is constant, 0.02 to 0.98 (DreamFusion). ProlificDreamer switches the upper end with
    `high=(0.98, 0.5), between=(5000, 5000)`. Zero123 has `low=(0.4, 0.2), high=(0.85, 0.5), between=(0, 600)`.
    DreamGaussian's single level, `1 - step / steps` clipped, is `low=(1.0, 0.0), high=(1.0, 0.0), clip=(0.02, 0.98)`.

    Attributes:
        low: Smallest noise level, at the start and at the end.
        high: Largest noise level, at the start and at the end.
        between: First and last step of the change, outside of which the levels are constant; None: the whole run.
        clip: Limits that the levels are clipped to.
    """

    low: tuple[float, float] = (0.02, 0.02)
    high: tuple[float, float] = (0.98, 0.98)
    between: tuple[int, int] | None = None
    clip: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A level is not a fraction, a range is empty, or the steps are not in order.
        """
        for name in ("low", "high", "clip"):
            if not all(0 <= level <= 1 for level in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: give fractions from 0 to 1")
        if self.clip[0] > self.clip[1] or any(
            a > b for a, b in zip(self.low, self.high, strict=True)
        ):
            raise ValueError(
                f"low={self.low}, high={self.high}, clip={self.clip}: give low <= high, and a clip in ascending order"
            )
        if self.between is not None and not 0 <= self.between[0] <= self.between[1]:
            raise ValueError(f"between={self.between}: give (first step, last step), in this order")

    def at(self, step: int, steps: int) -> tuple[float, float]:
        """Returns the range of noise levels of one step.

        Args:
            step: The step, from 0.
            steps: Number of steps of the run.

        Returns:
            Smallest and largest noise level, as fractions of the model's schedule.
        """
        begin, end = self.between or (0, steps)
        progress = float(step >= end) if begin == end else (step - begin) / (end - begin)
        progress = min(1.0, max(0.0, progress))
        levels = (first + progress * (last - first) for first, last in (self.low, self.high))
        low, high = (min(self.clip[1], max(self.clip[0], level)) for level in levels)
        return low, high
