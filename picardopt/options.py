"""What does not change over a run."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from picardopt.predictor import Predictor
from picardopt.restructure import Restructure
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

    def digest(self, tolerance: Tolerance, audit: str) -> int:
        """Hash of all that decides which steps are accepted: ranks that differ in it would part."""
        plain = {
            k: v for k, v in vars(tolerance).items() if isinstance(v, int | float | str | None)
        }
        deciding = (type(tolerance).__name__, plain, audit, self.predictor.__name__)
        return zlib.crc32(repr((*deciding, self.total_steps, self.nonfinite)).encode())
