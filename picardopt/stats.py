"""What happened so far: steps, sweeps, strides, residuals, waste, seconds. Always on, and bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

HISTORY = 10_000
"""Sweeps that are at least kept one by one: a run of a million must not fill the memory with its past."""
PHASES = ("drift", "exchange", "rollout", "commit", "audit")


@dataclass
class Stats:
    """Counters of one `ParallelPicardOptimizer`.

    Attributes:
        steps: Committed steps.
        sweeps: Sweeps whose stride was chosen.
        final: Steps that sweeps made final: committed, queued, or dropped since.
        strides: How many steps each sweep made final; of a long run, the last `HISTORY` sweeps or some more.
        residuals: Per sweep, as far back, the residuals j = 1..p; empty where nothing was compared (a window of 1, a
            step skipped for its non-finite gradient).
        tolerances: Per sweep, the largest residual that each slot would have accepted; empty likewise.
        drift_evaluations: Slots evaluated, over all ranks; the audit's are counted apart.
        wasted_evaluations: Those that never became a step.
        audits: Queued drifts that were evaluated again to check the closure.
        failed_speculations: Evaluations beyond the head that raised or were not finite.
        seconds: Wall seconds on this rank by phase: drift, exchange, rollout, commit, audit.
    """

    steps: int = 0
    sweeps: int = 0
    final: int = 0
    strides: list[int] = field(default_factory=list)
    residuals: list[list[float]] = field(default_factory=list)
    tolerances: list[list[float]] = field(default_factory=list)
    drift_evaluations: int = 0
    wasted_evaluations: int = 0
    audits: int = 0
    failed_speculations: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _inner: float = field(default=0.0, repr=False)

    @property
    def mean_stride(self) -> float:
        """Mean number of steps that a sweep made final (0 before the first sweep)."""
        return self.final / self.sweeps if self.sweeps else 0.0

    def swept(self, stride: int, residuals: list[float], tolerances: list[float]) -> None:
        """Counts a sweep whose stride was chosen."""
        self.sweeps += 1
        self.final += stride
        self.wasted_evaluations -= stride  # until then all of them counted as wasted
        self.strides.append(stride)
        self.residuals.append(residuals)
        self.tolerances.append(tolerances)
        if len(self.strides) >= 2 * HISTORY:
            for kept in (self.strides, self.residuals, self.tolerances):
                del kept[:HISTORY]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block and names it for torch's profiler; a phase inside it counts for itself only."""
        start, inner_before = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            with torch.profiler.record_function(f"picardopt.{name}"):
                yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inner
            self._inner = inner_before + elapsed
