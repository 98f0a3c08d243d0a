"""Statistics of a run: running totals, and records of the last sweeps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from picardopt.measures import DriftMeans, Measures, Threshold, weighted

HISTORY = 10_000
"""Number of most recent sweeps whose records are kept; older ones are dropped to bound memory."""
PHASES = ("drift", "exchange", "rollout", "commit", "audit")


@dataclass(frozen=True)
class SweepRecord:
    """One sweep's measures: enough to compute later which stride another tolerance or a smaller window would have had.

    Attributes:
        step: Step of the head.
        slots: Number of drifts to evaluate, p.
        stride: Number of steps that became final, 1..p.
        evaluations: Number of drifts evaluated, over all ranks.
        measures: What was measured; None where nothing was compared (a window of 1, a step skipped for its non-finite
            gradient).
        accepts: Entry j-1: what residual slot j accepts, j = 1..p.
        seconds: Wall seconds on this rank by phase, since the end of the sweep before.
    """

    step: int
    slots: int
    stride: int
    evaluations: int
    measures: Measures | None = None
    accepts: tuple[Threshold, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def residuals(self) -> tuple[float, ...]:
        """The residuals; empty where nothing was compared."""
        return self.measures.residuals if self.measures is not None else ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The largest accepted residuals; of a tolerance that weighs groups, for those in the same proportion."""
        if self.measures is None:
            return ()
        return tuple(
            _as_number(threshold, [group.residuals[j] for group in self.measures.groups], residual)
            for j, (threshold, residual) in enumerate(
                zip(self.accepts, self.residuals, strict=True)
            )
        )


def _as_number(threshold: Threshold, residuals: Sequence[float], together: float) -> float:
    if not isinstance(threshold, tuple):
        return threshold
    share = weighted(threshold, residuals)
    return together / share if share else float("inf")


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
        joined_calls: Calls of batched functions (`picardopt.batched`) that this rank made for several slots at once.
        calls_saved: Calls that this saved, compared with one for each slot.
        failed_speculations: Evaluations beyond the head that raised or were not finite.
        drift_error: By parameter group, how far a drift is off that was evaluated at a guess: |error| / |drift|, the
            root of running means. Measured at the first drift that a sweep does not keep, so that those kept are off by
            less. Empty before the first one, at tolerance 0 and with a window of 1.
        drift_noise: By parameter group, how far drifts of neighbouring steps lie apart, in the same units: the noise
            that a drift error may hide in.
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
    joined_calls: int = 0
    calls_saved: int = 0
    failed_speculations: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    records: deque[SweepRecord] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _drift_means: DriftMeans = field(default_factory=lambda: DriftMeans(), repr=False)
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

    @property
    def drift_error(self) -> tuple[float, ...]:
        """See the attributes."""
        return self._drift_means.error

    @property
    def drift_noise(self) -> tuple[float, ...]:
        """See the attributes."""
        return self._drift_means.noise


def end_sweep(stats: Stats, record: SweepRecord) -> None:
    """Counts a sweep whose stride was chosen, and adds the seconds to its record."""
    stats.sweeps += 1
    stats.final += record.stride
    for name, seconds in stats.seconds.items():
        record.seconds[name] = seconds - stats._seconds_before[name]
    stats._seconds_before = dict(stats.seconds)
    stats.records.append(record)
    if record.measures is not None:
        stats._drift_means.learn(record.measures)


@contextmanager
def phase(stats: Stats, name: str) -> Iterator[None]:
    """Times a block and labels it for torch's profiler; the time of an inner phase counts for that phase only."""
    start, inner_before = time.perf_counter(), stats._inner
    stats._inner = 0.0
    try:
        with torch.profiler.record_function(f"picardopt.{name}"):
            yield
    finally:
        elapsed = time.perf_counter() - start
        stats.seconds[name] += elapsed - stats._inner
        stats._inner = inner_before + elapsed
