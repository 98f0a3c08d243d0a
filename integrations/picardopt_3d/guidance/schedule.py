"""How the range of noise levels moves over a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TimestepSchedule:
    """A range of noise levels whose ends move linearly; all levels are fractions of the model's schedule.

    `TimestepSchedule()` stays at 0.02 to 0.98 (DreamFusion); ProlificDreamer switches its upper end with
    `high=(0.98, 0.5), between=(5000, 5000)`; Zero123 has `low=(0.4, 0.2), high=(0.85, 0.5), between=(0, 600)`;
    DreamGaussian's single level, `1 - step / steps` clipped, is `low=(1.0, 0.0), high=(1.0, 0.0), clip=(0.02, 0.98)`.

    Attributes:
        low: Smallest noise level, first and last.
        high: Largest noise level, first and last.
        between: The steps between which they move, before and after which they stay; None: 0 and the run's length.
        clip: What the moved levels are clipped to.
    """

    low: tuple[float, float] = (0.02, 0.02)
    high: tuple[float, float] = (0.98, 0.98)
    between: tuple[int, int] | None = None
    clip: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A level is no fraction, a range is empty, or the steps go backwards.
        """
        for name in ("low", "high", "clip"):
            if not all(0 <= level <= 1 for level in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: give fractions from 0 to 1")
        if self.clip[0] > self.clip[1] or any(
            a > b for a, b in zip(self.low, self.high, strict=True)
        ):
            raise ValueError(
                f"low={self.low}, high={self.high}, clip={self.clip}: nothing may be above its upper end"
            )
        if self.between is not None and not 0 <= self.between[0] <= self.between[1]:
            raise ValueError(f"between={self.between}: give (first step, last step), in this order")

    def at(self, step: int, steps: int) -> tuple[float, float]:
        """The range of one step.

        Args:
            step: The step, from 0.
            steps: Steps of the run.

        Returns:
            Smallest and largest noise level, as a guidance takes them.
        """
        begin, end = self.between or (0, steps)
        progress = float(step >= end) if begin == end else (step - begin) / (end - begin)
        progress = min(1.0, max(0.0, progress))
        levels = (first + progress * (last - first) for first, last in (self.low, self.high))
        low, high = (min(self.clip[1], max(self.clip[0], level)) for level in levels)
        return low, high
