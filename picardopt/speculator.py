"""The window, the queue of accepted drifts and the sweep that refills it.

This is Algorithm 2's loop body between two commits: evaluate the window's drifts, roll the base out over
them, measure residuals, choose the stride, slide. What it accepts waits in a queue until the optimizer
takes the steps for real, one a call.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from picardopt.audit import (
    Audit,
    bits_float,
    differs,
    float_bits,
    impure,
    is_noise,
    options_of,
    refuse_changed_options,
)
from picardopt.carry import Carry, apply_change, carried_tensors
from picardopt.drift import Closure, Drift, Outcome, evaluate_drift
from picardopt.engines import Claim, Engine
from picardopt.errors import (
    ImpureClosureError,
    NonFiniteGradientError,
    PicardError,
    PicardWarning,
)
from picardopt.layout import ParameterLayout, Row, parameters_of
from picardopt.options import Options
from picardopt.rng import step_seed
from picardopt.rollout import Rollout
from picardopt.stats import Stats
from picardopt.sweep import (
    accepts,
    as_measures,
    choose_stride,
    measure,
    same_bits,
    squared_distance,
)
from picardopt.tolerance import Tolerance
from picardopt.window import Window


@dataclass(frozen=True)
class Accepted:
    """A drift that a sweep accepted, waiting to be committed.

    Attributes:
        drift: The drift.
        sweep: The sweep it came from.
        slot: Its place in that sweep's window; 0 is the head.
        threshold: Largest accepted distance between its guess and the live parameters.
    """

    drift: Drift
    sweep: int
    slot: int
    threshold: float


class Speculator:
    """Runs ahead over one list of parameters.

    Args:
        parameters: The live parameters.
        carry: What besides them a step reads and rewrites.
        engine: Who evaluates.
        rollout: The base, to be driven.
        tolerance: What is accepted.
        audit: When the closure is checked.
        options: The rest.
        stats: What happened.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        carry: Carry,
        engine: Engine,
        rollout: Rollout,
        tolerance: Tolerance,
        audit: Audit,
        options: Options,
        stats: Stats,
    ) -> None:
        self.parameters = list(parameters)
        self.layout = ParameterLayout(parameters, carried_tensors(carry))
        self._carry = carry
        self.window = Window(self.layout)
        self.queue: deque[Accepted] = deque()
        self._engine, self._rollout, self._tolerance = engine, rollout, tolerance
        self._audit, self._options, self._stats = audit, options, stats
        self._live, self._scratch = self.layout.row(), self.layout.scratch()
        self._zeros = self.layout.row()
        self._warned, self._to_tell = False, ""

    def start(self, step: int) -> None:
        """Makes the ranks agree, on rank 0's parameters."""
        head = self.window.head
        head.store(self.layout.tensors)
        self._engine.start(self.layout, head, self._claim(step, 0))
        head.load(self.layout.tensors)

    def drop(self) -> None:
        """Forgets the queue; the window's iterates stay as guesses."""
        self._stats.wasted_evaluations += len(self.queue)
        self.queue.clear()

    def next(self, closure: Closure, step: int) -> Accepted:
        """The accepted drift of a step, from the queue or from a new sweep.

        Raises:
            Exception: What the closure raised at the head.
            NonFiniteGradientError: If the head's gradient is not finite and that is to be raised.
            ImpureClosureError: If the audit found the closure out.
        """
        try:
            return self._next(closure, step)
        except BaseException:
            self.drop()
            raise

    def _next(self, closure: Closure, step: int) -> Accepted:
        if self.queue and self._moved():
            self.drop()
        if not self.queue:
            self._sweep(closure, step)
        accepted = self.queue[0]
        if self._speculates and self._audit.due(accepted.sweep):
            last = self._stats.strides[-1] - 1 if self._stats.strides else 0
            if accepted.slot == min(1, last):
                self._check(closure, accepted)
        return accepted

    def pop(self) -> None:
        """Moves on by the step whose parameters were just committed: its carry follows."""
        apply_change(self.layout.carry, self.window.head, self.queue.popleft().drift.row)
        self.window.release([self.window.shift()])

    @property
    def _speculates(self) -> bool:
        """Whether anything is ever evaluated at a guess or on another rank."""
        return self._options.window > 1 or self._engine.size > 1

    def _slots(self, step: int) -> int:
        """How many drifts to evaluate at a step: ``p <- min(p, T - tau)``, at least 1."""
        total = self._options.total_steps
        return (
            self._options.window
            if total is None
            else max(1, min(self._options.window, total - step))
        )

    def _claim(self, step: int, slots: int) -> Claim:
        return Claim(
            step=step,
            sweep=self._stats.sweeps,
            slots=slots,
            window=self._options.window,
            seed=step_seed(self._options.seed, 0) >> 1,
            options=self._options.digest(self._tolerance, self._audit.mode),
            layout=self.layout.digest,
            parameters=self.window.head.fingerprint() if self._engine.size > 1 else 0,
        )

    def _sweep(self, closure: Closure, step: int) -> None:
        slots = self._slots(step)
        self.window.head.store(self.layout.tensors)
        self.window.resize(slots + 1)
        watched = self._speculates and self._audit.due(self._stats.sweeps)

        def evaluate(slot: int, out: Row) -> Drift:
            self.window.rows[slot].load(self.layout.tensors)
            return self._evaluate(closure, step + slot, out, watched)

        with self._borrowed(self.window.head):
            drifts, evaluations = self._engine.evaluate(
                self.layout, evaluate, self._claim(step, slots)
            )
        self._stats.drift_evaluations += evaluations
        self._stats.wasted_evaluations += evaluations
        self._raise_bad_present(drifts)
        if len(drifts) > 1 and drifts[-1].outcome is not Outcome.FINITE:
            self._bad_future(drifts.pop())
        if self._options.window == 1 or drifts[0].outcome is not Outcome.FINITE:
            stride = self._take_head(drifts[0])
        else:
            with self._stats.phase("rollout"):
                stride = self._roll_out(drifts, step)
        self._stats.wasted_evaluations -= stride
        self._stats.strides.append(stride)
        self._stats.sweeps += 1
        if self._to_tell:  # now that all is in place: a filter may turn a warning into an error
            text, self._to_tell = self._to_tell, ""
            warnings.warn(text, PicardWarning, stacklevel=2)

    def _take_head(self, head: Drift) -> int:
        """Queues the head's drift alone: a window of 1, or a step to be skipped. Nothing is compared."""
        self.window.resize(1)
        self.queue.append(Accepted(head, self._stats.sweeps, 0, float("inf")))
        self._stats.residuals.append([])
        self._stats.tolerances.append([])
        return 1

    def _roll_out(self, drifts: list[Drift], step: int) -> int:
        """Rolls the base out, measures, chooses the stride, queues and slides."""
        with self._rollout.speculation(self.layout.tensors, self.window.head):
            after, error = self._iterates(drifts)
            whole = len(after) == len(drifts) + 1
            count = len(after) - 1
            table = measure(
                self.window.rows[: count + 1],
                after,
                self._scratch,
                self.layout.numel,
                lengths=self._tolerance.needs_lengths,
                distances=self._tolerance.needs_distances,
                bits=self._tolerance.exact,
            )
            told = self._engine.agree(table, len(drifts))
            if not told[0]:
                raise error or PicardError(
                    f"the base optimizer's step failed at step {step} on another rank, which tells why"
                )
            if error is not None:
                self._bad_future(Drift(step + count, self._zeros, error=error))
            measures = as_measures(told)
            thresholds = self._tolerance.thresholds(measures)
            stride = choose_stride(measures, thresholds, exact=self._tolerance.exact)
            self._tolerance.update(measures, stride)
            self.window.refine(after[1:], stride)
            if whole:
                self._extend(drifts[-1], step, stride)
        if math.isnan(measures.residuals[0]):
            self._warn_once(
                "residuals are NaN: a parameter holds a NaN or an infinity, so no guess can be accepted and every "
                "sweep makes one step final"
            )
        self._stats.residuals.append(list(measures.residuals))
        self._stats.tolerances.append(thresholds)
        for slot, drift in enumerate(drifts[:stride]):
            threshold = thresholds[slot - 1] if slot else float("inf")
            self.queue.append(Accepted(drift, self._stats.sweeps, slot, threshold))
        return stride

    def _iterates(self, drifts: list[Drift]) -> tuple[list[Row], Exception | None]:
        """The head and the new iterates, as far as the base steps without an error."""
        after = [self.window.head]
        for guess, drift in zip(self.window.rows, drifts, strict=False):
            try:
                self._rollout.advance(self.parameters, drift)
            except Exception as error:
                return after, error
            apply_change(self.layout.carry, guess, drift.row)
            after.append(self.window.spare())
            after[-1].store(self.layout.tensors)
        return after, None

    def _extend(self, last: Drift, step: int, stride: int) -> None:
        """Fills the slots behind the tail; the rollout stands there."""
        wanted = stride + self._slots(step + stride) + 1
        rows = [self.window.spare() for _ in range(wanted - len(self.window.rows))]
        still = Drift(last.step, self._zeros, last.present)
        self._options.predictor(self._rollout, self.layout, still, self.window.rows[-1], rows)
        self.window.rows.extend(rows)

    def _evaluate(self, closure: Closure, step: int, out: Row, watched: bool = False) -> Drift:
        """One drift at the live parameters' values."""
        around = self._around(watched)
        return evaluate_drift(closure, self.layout, out, step, self._options.seed, around)

    @contextmanager
    def _around(self, watched: bool) -> Iterator[None]:
        """Stands around a closure and raises, as if the closure did, if it changed what it must not."""
        groups = self._rollout.base.param_groups
        before = options_of(groups) if self._speculates else []
        with self._audit.guard(self.layout) if watched else nullcontext():
            yield
        refuse_changed_options(groups, before)
        if not self.layout.describes(
            parameters_of(self._rollout.base), carried_tensors(self._carry)
        ):
            raise RuntimeError(
                "the closure changed the optimizer's parameter list or the carry's (other tensors, shapes or "
                "groups): do that between two calls of step(), where the window is rebuilt, and write into the "
                "carry's tensors in place"
            )

    def _moved(self) -> bool:
        """Whether the live parameters have left the point at which the next queued drift was evaluated."""
        accepted = self.queue[0]
        self._live.store(self.layout.tensors)
        if self._tolerance.exact or accepted.slot == 0:
            return not bool(same_bits(self._live, self.window.head))
        distance = squared_distance(self._live, self.window.head, self._scratch, self.layout.numel)
        return not accepts(float(distance), accepted.threshold, False, exact=False)

    def _check(self, closure: Closure, accepted: Accepted) -> None:
        """Evaluates a queued drift again, with the closure of its own call, at the guess it was made at."""
        queued, rows = accepted.drift, [self.window.spare(), self.window.spare()]
        with self._stats.phase("audit"):
            self._stats.audits += 1
            self._live.store(self.layout.tensors)
            with self._borrowed(self._live):
                again = self._evaluate_at_head(closure, queued.step, rows[0])
                difference = self._difference(queued, again)
                if 0 < difference < math.inf:
                    once_more = self._evaluate_at_head(closure, queued.step, rows[1])
                    noise = self._difference(again, once_more)
                    if is_noise(difference, noise, self.layout.device):
                        difference = 0.0
            self.window.release(rows)
            interrupted = again.outcome is Outcome.INTERRUPTED
            told = self._engine.share_numbers([int(interrupted), float_bits(difference)])
        if any(flag for flag, _ in told):
            raise (again.error if interrupted else None) or KeyboardInterrupt
        differences = [bits_float(bits) for _, bits in told]
        if any(differences):
            raise impure(queued.step, differences) from again.error
        self._audit.passed(accepted.sweep)

    def _evaluate_at_head(self, closure: Closure, step: int, out: Row) -> Drift:
        self.window.head.load(self.layout.tensors)
        return self._evaluate(closure, step, out)

    def _difference(self, drift: Drift, again: Drift) -> float:
        return differs(drift, again, self._scratch, self.layout.numel)

    def _raise_bad_present(self, drifts: Sequence[Drift]) -> None:
        """The user's own trajectory went wrong, or the closure is no function of it: that is an error."""
        head, last = drifts[0], drifts[-1]
        if isinstance(last.error, ImpureClosureError):
            raise last.error
        if head.error is not None:
            raise head.error
        if head.outcome is Outcome.NONFINITE and self._options.nonfinite == "raise":
            raise NonFiniteGradientError(
                f"the gradient of step {head.step} has a NaN or an infinity at the committed parameters; nothing "
                'was changed (nonfinite="skip" leaves such steps out)'
            )

    def _bad_future(self, drift: Drift) -> None:
        """Speculation went wrong beyond the head: it shortens the stride, no more."""
        self._stats.failed_speculations += 1
        what = drift.trace or drift.error or "its gradient has a NaN or an infinity"
        self._warn_once(
            f"running ahead failed at step {drift.step}, evaluated at a guess; this shortens the stride and changes "
            f"no result (told once, counted in stats.failed_speculations): {what}"
        )

    def _warn_once(self, text: str) -> None:
        if not self._warned and self._engine.rank == 0:
            self._warned, self._to_tell = True, text

    @contextmanager
    def _borrowed(self, row: Row) -> Iterator[None]:
        """Lends the live parameters out; afterwards they hold `row` and have their gradients back."""
        grads = [p.grad for p in self.parameters]
        try:
            yield
        finally:
            row.load(self.layout.tensors)
            for parameter, grad in zip(self.parameters, grads, strict=True):
                parameter.grad = grad
