"""What has happened in a stage so far: running totals, and the most recent sweeps one by one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from picardopt import CheckpointError, ParallelPicardOptimizer, load_checkpoint
from picardopt.stats import Stats
from picardopt_3d.io import replacing
from picardopt_3d.problem import Losses, Problem
from picardopt_3d.run.drifts import Drifts, drifts_of, group_names, joined
from picardopt_3d.run.folder import StageFolder

RECORD_KEY = "trained"
"""Where a checkpoint holds the record: the name that earlier versions gave it."""

HISTORY = 10_000
"""Most recent sweeps that are kept one by one; totals count all of them."""

_TOTALS = ("sweeps", "drift_evaluations", "wasted_evaluations", "joined_calls", "calls_saved")
_HISTORIES = ("strides", "residuals", "tolerances")


@dataclass
class RunRecord:
    """The record of a stage; a resumed run adds to it.

    Attributes:
        figures: Entries of the report that do not change while the run goes on.
        step: Steps that are final.
        losses: Loss of every step.
        sweeps: Sweeps in all.
        drift_evaluations: Slots evaluated, over all workers.
        wasted_evaluations: Those that never became a step.
        strides: Steps made final by each of the last `HISTORY` sweeps.
        residuals: Of the same sweeps, the squared distance per parameter of every slot.
        tolerances: Of the same sweeps, the thresholds that those were compared with.
        drifts: Of the same sweeps, how far drifts were off, by parameter group.
        counts: By kind of part ("Gaussians"), each time that their number changed, and at the beginning: steps and
            sweeps until then, and the number from then on.
        restructured: For each step after which the number of parameters could change, the numbers of steps and sweeps
            taken by then.
        seconds: Of the optimization, without start-up.
        startup_seconds: From the command to the first step.
        phase_seconds: Of the first worker, by phase of the optimizer.
        joined_calls: Calls of the guidance that the first worker made for several slots at once.
        calls_saved: Calls that this saved, compared with one for each slot.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    sweeps: int = 0
    drift_evaluations: int = 0
    wasted_evaluations: int = 0
    strides: list[int] = field(default_factory=list)
    residuals: list[list[float]] = field(default_factory=list)
    tolerances: list[list[float]] = field(default_factory=list)
    drifts: Drifts = field(default_factory=dict)
    counts: dict[str, list[list[int]]] = field(default_factory=dict)
    restructured: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    startup_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    joined_calls: int = 0
    calls_saved: int = 0

    @property
    def mean_stride(self) -> float:
        """Mean number of steps that a sweep made final."""
        return self.step / self.sweeps if self.sweeps else 0.0

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> RunRecord:
        """Reads what a checkpoint holds; earlier versions counted the sweeps by their list."""
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in state.items() if name in known}
        return cls(**{"sweeps": len(values.get("strides", ()))} | values)

    def take_over(self, earlier: RunRecord) -> None:
        """Goes on from an earlier record, under the figures of this run."""
        for item in fields(self):
            if item.name != "figures":
                setattr(self, item.name, getattr(earlier, item.name))

    def save(self, folder: StageFolder) -> None:
        """Writes the record as JSON of its own, so that reports need not load the checkpoint."""
        with replacing(folder.record) as temporary:
            temporary.write_text(json.dumps(_finite(asdict(self)), allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: StageFolder) -> RunRecord:
        """Reads the record of a stage, from its checkpoint where an earlier version wrote no other file.

        Raises:
            CheckpointError: There is none, or it cannot be used.
        """
        if not folder.record.exists():
            return record_in(folder, load_checkpoint(folder.checkpoint))
        state = json.loads(folder.record.read_text())
        for name in ("losses", "residuals", "tolerances", "drifts"):
            if name in state:  # earlier versions measured no drifts
                state[name] = _numbers(state[name])
        return cls.of_state(state)

    @classmethod
    def of_stages(cls, records: Sequence[RunRecord]) -> RunRecord:
        """Returns the record of a run: sums and joined lists over its stages, the figures of the last one."""
        total = cls(dict(records[-1].figures))
        for record in records:
            total._join_changes(record)
            sizes = len(total.strides), len(record.strides)
            total.drifts = joined(total.drifts, sizes[0], record.drifts, sizes[1])
            for name in ("step", *_TOTALS, "seconds", "startup_seconds", "losses", *_HISTORIES):
                setattr(total, name, getattr(total, name) + getattr(record, name))
            total.phase_seconds = _sums(total.phase_seconds, record.phase_seconds)
        if len(records) > 1 and all("steps" in record.figures for record in records):
            total.figures["steps"] = sum(record.figures["steps"] for record in records)
        return total

    def _join_changes(self, record: RunRecord) -> None:
        """Adds the changes of the next stage to those so far, each kind up to the stage's end."""
        for name, history in record.counts.items():
            joined = self.counts.setdefault(name, [])
            for steps, sweeps, count in [*history, [record.step, record.sweeps, history[-1][-1]]]:
                joined.append([steps + self.step, sweeps + self.sweeps, count])
        for steps, sweeps in record.restructured:
            self.restructured.append([steps + self.step, sweeps + self.sweeps])


def record_in(folder: StageFolder, state: Mapping[str, Any]) -> RunRecord:
    """Returns the record that a checkpoint's state holds.

    Raises:
        CheckpointError: If it holds none.
    """
    if RECORD_KEY not in state:
        raise CheckpointError(f"{folder.checkpoint} holds no record of a run: give a run's folder")
    return RunRecord.of_state(state[RECORD_KEY])


class Recorder:
    """Keeps a record up to date while its stage runs.

    Args:
        record: Goes on from where it stands.
        problem: What is trained.
        optimizer: Counts steps, sweeps and evaluations.
        started: `time.time()` when the command began.
    """

    def __init__(
        self,
        record: RunRecord,
        problem: Problem,
        optimizer: ParallelPicardOptimizer,
        started: float,
    ) -> None:
        self.record, self.problem, self.optimizer = record, problem, optimizer
        self._begun, self._before = time.time(), RunRecord.of_state(asdict(record))
        self._restructure = problem.restructure()
        record.startup_seconds += self._begun - started
        self._note_counts(record.step)

    @property
    def stats(self) -> Stats:
        """What the optimizer has counted since the run began or went on."""
        return self.optimizer.stats

    def took(self, step: int, losses: Losses) -> None:
        """Adds a step that is final."""
        self.record.step = step + 1
        self.record.losses.append(float(losses.total))
        self._note_change(step + 1)

    @property
    def _sweeps(self) -> int:
        """Sweeps until now, which the record learns of in `count`."""
        return self._before.sweeps + self.stats.sweeps

    def _note_change(self, steps: int) -> None:
        """Adds what the last of some steps did to the number of parameters; no tensor is read."""
        if self._restructure is not None and self._restructure.due(steps - 1):
            self.record.restructured.append([steps, self._sweeps])
        self._note_counts(steps)

    def _note_counts(self, steps: int) -> None:
        """Adds the numbers of parts that have changed."""
        for name, count in self.problem.counts().items():
            history = self.record.counts.setdefault(name, [])
            if not history or history[-1][-1] != count:
                history.append([steps, self._sweeps, count])

    def leave_out(self, seconds: float) -> None:
        """Leaves out seconds in which the run stood still."""
        self._begun += seconds

    def count(self) -> None:
        """Adds what the optimizer has counted since the run began or went on."""
        record, before, stats = self.record, self._before, self.stats
        record.seconds = before.seconds + time.time() - self._begun
        # An error between a commit and its record leaves the loss unknown.
        record.step = self.optimizer.step_index
        for steps in range(len(record.losses), record.step):
            record.losses.append(math.nan)
            self._note_change(steps + 1)
        for name in _TOTALS:
            setattr(record, name, getattr(before, name) + getattr(stats, name))
        for name in _HISTORIES:
            together = getattr(before, name) + list(getattr(stats, name))
            setattr(record, name, together[-HISTORY:])
        self._count_drifts()
        record.phase_seconds = _sums(before.phase_seconds, stats.seconds)

    def _count_drifts(self) -> None:
        """Adds what the optimizer has measured of drifts."""
        before, sweeps = self._before, list(self.stats.records)
        own = drifts_of(sweeps, group_names(self.problem.measured()))
        drifts = joined(before.drifts, len(before.strides), own, len(sweeps))
        self.record.drifts = {name: entries[-HISTORY:] for name, entries in drifts.items()}


def _sums(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Sums by key, in the order in which keys appear."""
    return {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {**first, **second}}


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """Replaces None by NaN."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return math.nan if value is None else value
