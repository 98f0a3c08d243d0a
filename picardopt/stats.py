"""Statistics of a run: running totals, and records of the last sweeps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

HISTORY = 10_000
"""Number of most recent sweeps whose records are kept; older ones are dropped to bound memory."""
PHASES = ("drift", "exchange", "rollout", "commit", "audit")


@dataclass(frozen=True)
class SweepRecord:
    """One sweep's measures: enough to compute later which stride another tolerance or a smaller window would have had.

    All squared distances are per parameter. Where nothing was compared (a window of 1, a step skipped for its
    non-finite gradient) the tuples are empty.

    Attributes:
        step: Step of the head.
        slots: Number of drifts to evaluate, p.
        stride: Number of steps that became final, 1..p.
        evaluations: Number of drifts evaluated, over all ranks.
        residuals: Entry j-1: between iterate step+j before and after the sweep, j = 1..p.
        thresholds: Entry j-1: the largest residual that is accepted.
        step_lengths: Entry j: between the new iterates step+j and step+j+1; NaN if the tolerance does not need them.
        distances: Entry j-1: between the head and the new iterate step+j; NaN if the tolerance does not need them.
        same_bits: Entry j-1: whether iterate step+j kept its bits; False if the tolerance does not need it.
        seconds: Wall seconds on this rank by phase, since the end of the sweep before.
    """

    step: int
    slots: int
    stride: int
    evaluations: int
    residuals: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    step_lengths: tuple[float, ...] = ()
    distances: tuple[float, ...] = ()
    same_bits: tuple[bool, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Stats:
    """Totals of one `ParallelPicardOptimizer`, and its last sweeps.

    Attributes:
        steps: Committed steps.
        sweeps: Sweeps whose stride was chosen.
        final: Steps that sweeps made final: committed, queued or dropped.
        dropped: Steps dropped from the queue before they were committed.
        drift_evaluations: Slots evaluated, over all ranks, without the audit's.
        audits: Queued drifts that were evaluated again to check the closure.
        outer_changes: Number of times that the queue was dropped because the loop changed what the closure sees.
        failed_speculations: Evaluations beyond the head that raised or were not finite.
        seconds: Wall seconds on this rank by phase: drift, exchange, rollout, commit, audit.
        records: The last `HISTORY` sweeps, oldest first.
    """

    steps: int = 0
    sweeps: int = 0
    final: int = 0
    dropped: int = 0
    drift_evaluations: int = 0
    audits: int = 0
    outer_changes: int = 0
    failed_speculations: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    records: deque[SweepRecord] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _inner: float = field(default=0.0, repr=False)
    _seconds_before: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(PHASES, 0.0), repr=False
    )

    @property
    def mean_stride(self) -> float:
        """Mean number of steps that a sweep made final (0 before the first sweep)."""
        return self.final / self.sweeps if self.sweeps else 0.0

    @property
    def wasted_evaluations(self) -> int:
        """Number of evaluations that became no step."""
        return self.drift_evaluations - self.final + self.dropped

    @property
    def strides(self) -> list[int]:
        """Number of steps that each recorded sweep made final."""
        return [record.stride for record in self.records]

    @property
    def residuals(self) -> list[list[float]]:
        """The residuals of each recorded sweep."""
        return [list(record.residuals) for record in self.records]

    @property
    def tolerances(self) -> list[list[float]]:
        """The thresholds of each recorded sweep."""
        return [list(record.thresholds) for record in self.records]

    def end_sweep(self, record: SweepRecord) -> None:
        """Counts a sweep whose stride was chosen, and adds the seconds to its record."""
        self.sweeps += 1
        self.final += record.stride
        for phase, seconds in self.seconds.items():
            record.seconds[phase] = seconds - self._seconds_before[phase]
        self._seconds_before = dict(self.seconds)
        self.records.append(record)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block and labels it for torch's profiler; the time of an inner phase counts for that phase only."""
        start, inner_before = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            with torch.profiler.record_function(f"picardopt.{name}"):
                yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inner
            self._inner = inner_before + elapsed
