"""Algorithm 2 between two commits: evaluate a window of drifts, roll out, measure, choose the stride, slide.

Accepted drifts wait in a queue until the optimizer commits them, one per call. `picardopt.reference` is the same loop
in the paper's own names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from picardopt import replay_check
from picardopt.auditor import Auditor
from picardopt.closure import StepClosure
from picardopt.drift import Accepted, Drift, Outcome
from picardopt.engines import Engine
from picardopt.errors import WindowMemoryError
from picardopt.evaluation import Evaluator
from picardopt.gauge import Gauge
from picardopt.incidents import Incidents
from picardopt.layout import ParameterLayout
from picardopt.memory import Memory, explained
from picardopt.options import Options
from picardopt.rollouts import Rollout
from picardopt.source import needed_from
from picardopt.stats import Stats, SweepRecord, end_sweep, phase
from picardopt.sweep import as_measures, choose_stride
from picardopt.tolerance import Tolerance
from picardopt.window import Window


class Speculator:
    """Runs ahead over one list of parameters.

    Args:
        layout: The live parameters and the live carry.
        window: The iterates.
        engine: Makes the ranks agree on the measures.
        evaluator: Evaluates the window's drifts.
        rollout: Steps the base.
        gauge: Measures drift errors; None where there are none to measure.
        auditor: Checks queued drifts before they are committed.
        tolerance: Decides what is accepted.
        options: The optimizer's options.
        stats: Counters and records.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        window: Window,
        engine: Engine,
        evaluator: Evaluator,
        rollout: Rollout,
        gauge: Gauge | None,
        auditor: Auditor,
        tolerance: Tolerance,
        options: Options,
        stats: Stats,
    ) -> None:
        self.layout, self.window = layout, window
        self.evaluator, self.rollout, self._gauge = evaluator, rollout, gauge
        self.queue: deque[Accepted] = deque()
        self._engine, self._auditor = engine, auditor
        self._tolerance, self._options, self._stats = tolerance, options, stats
        self._running = False
        self._incidents = Incidents(stats, options.nonfinite, warns=engine.rank == 0)

    def next(self, closure: StepClosure, step: int) -> Accepted:
        """Returns the accepted drift of a step, from the queue or from a new sweep.

        Raises:
            Exception: The closure's own error at the head.
            NonFiniteGradientError: If the head's gradient is not finite, with ``nonfinite="raise"``.
            ImpureClosureError: If the closure is not a function of (parameters, step).
        """
        self._refuse_inside()
        self._running = True
        try:
            with needed_from(step):
                if self.queue and not self._auditor.valid(closure, self.queue[0]):
                    self.drop()
                elif self.queue and self.queue[0].drift.rng is None and self.rollout.draws():
                    self.drop()  # a hook, say, was added since
                if not self.queue:
                    self._sweep(closure, step)
                if not self._auditor.check(closure, self.queue[0]):
                    self.drop()
                    self._sweep(closure, step)
            return self.queue[0]
        except WindowMemoryError as error:
            self.drop()
            raise explained(error, self._options.window, self.memory) from error.__cause__
        except BaseException:
            self.drop()
            raise
        finally:
            self._running = False

    def _refuse_inside(self) -> None:
        """Raises in a closure that calls its own optimizer's step."""
        if self._running:
            raise RuntimeError(
                "the closure called step() or flush() of its own optimizer: it only computes the loss and its "
                "gradients (zero_grad, forward, backward, return the loss); step(closure) then takes the step itself"
            )

    def memory(self, window: int) -> Memory:
        """Returns what a window takes besides the plain loop's own memory."""
        exact, data = self._tolerance.exact, self._engine.data_size
        return self.rollout.memory(window, exact=exact, data=data)

    def drop(self) -> None:
        """Forgets the queue; the window's iterates stay as guesses."""
        self._stats.dropped += len(self.queue)
        self.queue.clear()
        if self._gauge is not None:
            self._gauge.forget()

    def forget(self) -> None:
        """Forgets the queue, and what was learned of a closure that has changed."""
        self._refuse_inside()
        self.drop()
        self.rollout.forget()

    def advance(self) -> None:
        """Moves the window past the step that was just committed."""
        self.queue.popleft()
        self.window.release([self.window.shift()])

    def _sweep(self, closure: StepClosure, step: int) -> None:
        """Runs one pass of the paper's while loop; the comments quote its lines."""
        window, stats, slots = self.window, self._stats, self._slots(step)
        window.head.store(self.layout.tensors)
        if len(window.rows) == 1 and step > 0 and self._options.window > 1:
            self.rollout.guess(step, slots, self._options.seed)
        window.resize(slots + 1)
        # Dispatch {theta[tau+j]} for j = 0..p-1 and gather {s(theta[tau+j])}
        drifts, evaluations = self.evaluator.evaluate_window(closure, window, step, slots)
        drifts = self._incidents.usable(drifts)
        if self._options.window == 1 or drifts[0].outcome is not Outcome.FINITE:
            window.resize(1)  # the head alone: nothing to compare
            record = SweepRecord(step, slots, 1, evaluations)
        else:
            with phase(stats, "rollout"), self.rollout.speculation():
                record = self._refine(drifts, step, slots, evaluations)
        # tau <- tau + skip, one step per commit
        for slot, drift in enumerate(drifts[: record.stride]):
            threshold = record.accepts[slot - 1] if slot else float("inf")
            self.queue.append(Accepted(drift, stats.sweeps, slot, threshold))
        end_sweep(stats, record)
        self._auditor.end_sweep(closure, record.stride)
        self._incidents.warn()

    def _refine(
        self, drifts: Sequence[Drift], step: int, slots: int, evaluations: int
    ) -> SweepRecord:
        """Rolls out, measures, chooses the stride and slides the window."""
        tolerance, check_replay = self._tolerance, replay_check.due(self._stats.sweeps)
        gauge, window = self._gauge, self.window
        own = self.rollout.learn(gauge, drifts) if gauge is not None else None
        # theta[tau+j+1] <- h(s(theta[tau+j]), ... h(s(theta[tau]), theta[tau]))
        after, error = self.rollout.refine(drifts, check_replay=check_replay)
        # error <- {d(new theta[tau+j], old theta[tau+j])^2 / D} for j = 1..p
        table = self.rollout.measure(after, tolerance)
        agreed, numbers = self._engine.agree(table, len(drifts), own)
        self._incidents.check_rollout(agreed, step, len(after) - 1, error)
        found = gauge.read(numbers, step) if gauge is not None else None
        measures = as_measures(agreed, self.layout.numels, found)
        # skip <- min({j : error_j > e} + {p})
        thresholds = tolerance.thresholds(measures)
        stride = choose_stride(measures, thresholds, exact=tolerance.exact)
        held = gauge is not None and tolerance.needs_pairs and gauge.holds_back(stride, len(drifts))
        stride -= held
        # e <- gamma e + (1 - gamma) M(error)
        tolerance.update(measures, stride)
        if gauge is not None and stride < len(drifts):
            guess, drift = window.rows[stride], drifts[stride]
            gauge.keep(step + stride, stride, guess, drift, accepted=held)
        # theta[tau+j] <- theta[tau+p] for j in [p, skip+p], or what the predictor says; p <- min(p, T - tau)
        window.refine(after[1:], stride)
        if error is None:
            self.rollout.extend(drifts[-1], stride + self._slots(step + stride) + 1)
        self._incidents.check_residuals(measures.residuals)
        return SweepRecord(step, slots, stride, evaluations, measures, tuple(thresholds))

    def _slots(self, step: int) -> int:
        if self._auditor.futile:
            return 1
        return self._options.slots(step, exact=self._tolerance.exact)
