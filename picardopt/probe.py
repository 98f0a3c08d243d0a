"""Measures on one device, after some tens of steps of a run, what a plan for several devices needs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from picardopt import replay_check
from picardopt.aside import spoil
from picardopt.audit.sharing import SharedBy
from picardopt.closure import Closure, Plain, as_step_closure
from picardopt.drift import Calls, Drift, EvaluateSlot, Outcome
from picardopt.errors import NonFiniteGradientError
from picardopt.forecast import Forecast
from picardopt.joint import JointEvaluation
from picardopt.layout import Row
from picardopt.links import NVLINK, Link
from picardopt.memory import Memory, lacks_memory
from picardopt.optimizer import ParallelPicardOptimizer
from picardopt.planner import MOST_SLOTS, Measured, options
from picardopt.recommendation import Plan
from picardopt.shared_calls import SharedCalls
from picardopt.stats import Stats, SweepRecord

REPEATS = 5
"""Evaluations of each closure that are timed, after one that is not."""
JOINED = 2, 4, 8
"""Numbers of slots that are evaluated together, up to the window, where the closure makes batched calls."""


def plan(
    optimizer: ParallelPicardOptimizer,
    closure: Closure | Mapping[int, Closure],
    devices: int,
    *,
    link: Link = NVLINK,
    cores: int | None = None,
) -> Plan:
    """Predicts what a step would take on several devices, and recommends a way to use them.

    Call it after a few dozen steps of your own loop on one device, with a window of 8 or so: their records predict the
    strides of other windows. The closures are evaluated a few times to measure their seconds, which does not affect
    the run.

    Args:
        optimizer: What the loop steps.
        closure: The step's closure; or closures by batch size, of which the largest is the step's own and the others
            evaluate a part of its batch. Without these the plan leaves out data parallelism.
        devices: Number of devices to plan for.
        link: What joins them: `picardopt.links` has NVLINK, PCIE, ETHERNET (25 Gb/s) and LOOPBACK.
        cores: Processor cores that the devices' processes share, if there are fewer cores than processes.

    Raises:
        ValueError: If `devices` is not positive, or the run is too short or has a window of 1.
        Exception: A closure's own error.
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices={devices!r}: give a positive number")
    closures = closure if isinstance(closure, Mapping) else {1: closure}
    windows = {picard * slots for picard in range(1, devices + 1) for slots in _slots(picard)}
    measured = measure(optimizer, closures, windows)
    return Plan(devices, link, measured, options(measured, link, devices, cores=cores))


def needed_memory(optimizer: ParallelPicardOptimizer, window: int | None = None) -> Memory:
    """Returns what running ahead takes on every rank besides the plain loop's own memory, at most.

    Before the first step the size of the base's state is known for torch's own optimizers; for others it counts as 0.

    Args:
        optimizer: Whose parameters, tolerance and secants count.
        window: Steps evaluated per sweep; default: the optimizer's.
    """
    return optimizer._ready().memory(optimizer.window if window is None else window)


def _slots(picard: int) -> Sequence[int]:
    return range(1, MOST_SLOTS + 1) if picard > 1 else (1, *JOINED)


def measure(
    optimizer: ParallelPicardOptimizer, closures: Mapping[int, Closure], windows: Iterable[int]
) -> Measured:
    """Returns what a run of some tens of steps tells, with the seconds of closures evaluated now.

    Args:
        optimizer: What has taken these steps.
        closures: By batch size.
        windows: Those whose strides are wanted.

    Raises:
        ValueError: If the run is too short, has a window of 1, or a closure or batch size cannot be used.
        Exception: A closure's own error.
    """
    for batch in closures:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"closure has the batch size {batch!r}: give positive whole numbers")
    tolerance = optimizer.tolerance
    forecast = Forecast(
        optimizer.stats.records, exact=tolerance.exact, holds_back=tolerance.needs_pairs
    )
    windows = sorted(set(windows))
    records = _rolled_out_once(optimizer.stats, forecast.records)
    steps = sum(record.stride for record in records)
    slots = sum(record.slots for record in records)
    rollouts, commits = (
        sum(record.seconds[phase] for record in records) for phase in ("rollout", "commit")
    )
    fixed = min(_seconds_of_snapshot(optimizer), rollouts / len(records))
    return Measured(
        drifts={batch: seconds_of(optimizer, each) for batch, each in closures.items()},
        commit=commits / steps,
        ahead=(rollouts - len(records) * fixed) / (slots + steps),
        sweep=fixed,
        row_bytes=optimizer._ready().layout.row_bytes,
        strides={window: forecast.mean_stride(window) for window in windows},
        drift_error=forecast.drift_error(),
        joined=joined_seconds(
            optimizer, closures[max(closures)], [n for n in JOINED if n <= optimizer.window]
        ),
        memory={window: needed_memory(optimizer, window).total for window in windows},
    )


def _rolled_out_once(stats: Stats, records: Sequence[SweepRecord]) -> Sequence[SweepRecord]:
    """Returns those of the records whose sweeps rolled out once; all of them if none did."""
    first = stats.sweeps - len(stats.records)
    twice = {id(record) for i, record in enumerate(stats.records, first) if replay_check.due(i)}
    return [record for record in records if id(record) not in twice] or records


def seconds_of(
    optimizer: ParallelPicardOptimizer, closure: Closure, repeats: int = REPEATS
) -> tuple[float, ...]:
    """Returns the seconds of a closure's evaluations at the present parameters; the run stays as it is.

    Args:
        optimizer: What steps the closure's parameters.
        closure: As for `step`.
        repeats: Number of evaluations that are timed, at different steps, after one that is not.

    Raises:
        ValueError: If the closure cannot be evaluated for any step.
        NonFiniteGradientError: If a gradient is not finite.
        Exception: The closure's own error.
    """
    out, found = optimizer._ready().layout.row(), []
    with _evaluating(optimizer, closure) as evaluate:
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            drift = evaluate(repeat, out)
            found.append(time.perf_counter() - start)
            _require_finite(drift)
    return tuple(found[1:])


def joined_seconds(
    optimizer: ParallelPicardOptimizer,
    closure: Closure,
    slots: Sequence[int] = JOINED,
    repeats: int = 2,
) -> dict[int, tuple[float, ...]]:
    """Returns the seconds in which so many slots are evaluated together, by their number; the run stays as it is.

    Args:
        optimizer: What steps the closure's parameters.
        closure: As for `step`.
        slots: Their numbers, ascending.
        repeats: Number of evaluations of each that are timed, after one that is not.

    Returns:
        Nothing where the closure makes no batched calls (`picardopt.batched`), or the tolerance is 0; of numbers of
        slots for which there is no memory nothing either.

    Raises:
        ValueError: If the closure cannot be evaluated for any step.
        NonFiniteGradientError: If a gradient is not finite.
        Exception: The closure's own error.
    """
    layout = optimizer._ready().layout
    found: dict[int, tuple[float, ...]] = {}
    rows = [layout.row() for _ in range(max(slots, default=1))]
    with _evaluating(optimizer, closure) as evaluate:
        alone = evaluate(0, rows[0])
        _require_finite(alone)
        if alone.calls is Calls.NONE or optimizer.tolerance.exact:
            return {}
        for count in slots:
            times = []
            for _ in range(repeats + 1):
                calls = SharedCalls(partial(spoil, layout.tensors), Stats())
                joint = JointEvaluation(SharedBy(True, True), calls, layout.row, False)
                start = time.perf_counter()
                last = joint.evaluate_many(evaluate, range(count), rows, Outcome.NONFINITE)[-1]
                times.append(time.perf_counter() - start)
                if last.error is not None and lacks_memory(last.error):
                    return found
                _require_finite(last)
            found[count] = tuple(times[1:])
    return found


@contextmanager
def _evaluating(optimizer: ParallelPicardOptimizer, closure: Closure) -> Iterator[EvaluateSlot]:
    """Gives a function that evaluates a closure at the present parameters, so many steps ahead.

    Raises:
        ValueError: If the closure cannot be evaluated for any step.
    """
    given = as_step_closure(closure)
    if isinstance(given, Plain):
        raise ValueError(given.reason)
    speculator, first, total = optimizer._ready(), optimizer.step_index, optimizer.total_steps
    live, evaluator = speculator.layout.row(), speculator.evaluator
    live.store(speculator.layout.tensors)

    def evaluate(ahead: int, out: Row) -> Drift:
        step = first + ahead if total is None else max(0, min(first + ahead, total - 1))
        return evaluator.evaluate(given, step, live, out)

    with evaluator.swapped_parameters(live):
        yield evaluate


def _require_finite(drift: Drift) -> None:
    if drift.error is not None:
        raise drift.error
    if drift.outcome is not Outcome.FINITE:
        raise NonFiniteGradientError(
            f"the gradient of step {drift.step} is not finite: mend the run first, then plan it"
        )


def _seconds_of_snapshot(optimizer: ParallelPicardOptimizer) -> float:
    """Returns the seconds in which the optimizer's state is captured and put back."""
    speculator, found = optimizer._ready(), []
    live = speculator.layout.row()
    live.store(speculator.layout.tensors)
    with speculator.evaluator.swapped_parameters(live):
        for _ in range(REPEATS):
            start = time.perf_counter()
            with speculator.rollout.speculation():
                pass
            found.append(time.perf_counter() - start)
    return min(found)
