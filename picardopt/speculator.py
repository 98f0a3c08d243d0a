"""The window, the queue of accepted drifts and the sweep that refills it.

This is Algorithm 2's loop body between two commits: evaluate the window's drifts, roll the base out over
them, measure residuals, choose the stride, slide. What it accepts waits in a queue until the optimizer
takes the steps for real, one a call.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from picardopt import rehearsal
from picardopt.audit import Audit, bits_float, differs, float_bits, impure, is_noise
from picardopt.carry import Carry
from picardopt.drift import Closure, Drift, Outcome
from picardopt.engines import Claim, Engine
from picardopt.errors import (
    ImpureClosureError,
    NonFiniteGradientError,
    PicardError,
)
from picardopt.evaluation import Evaluator
from picardopt.frameworks import warn_user
from picardopt.layout import ParameterLayout, Row
from picardopt.options import Options
from picardopt.restructure import Unprojection
from picardopt.rng import seed_all, step_seed
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

Swept = tuple[int, list[float], list[float]]
"""What a sweep tells the statistics: its stride, residuals and thresholds."""


@dataclass(frozen=True)
class Accepted:
    """A drift that a sweep accepted, waiting to be committed.

    Attributes:
        drift: The drift.
        sweep: The sweep it came from.
        slot: Its place in that sweep's window; 0 is the head.
        threshold: Largest accepted distance between its guess and the live parameters.
        inherited: Whether it was evaluated before the number of parameters changed, and cannot be again.
    """

    drift: Drift
    sweep: int
    slot: int
    threshold: float
    inherited: bool = False


class Speculator:
    """Runs ahead over one list of parameters.

    Args:
        layout: The live parameters and the live carry.
        carry: How the carry changes.
        engine: Who evaluates.
        rollout: The base, to be driven.
        tolerance: What is accepted.
        audit: When the closure is checked.
        options: The rest.
        stats: What happened.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        carry: Carry,
        engine: Engine,
        rollout: Rollout,
        tolerance: Tolerance,
        audit: Audit,
        options: Options,
        stats: Stats,
    ) -> None:
        self.layout, self._carry = layout, carry
        self.window = Window(layout)
        self.queue: deque[Accepted] = deque()
        self._engine, self._rollout, self._tolerance = engine, rollout, tolerance
        self._audit, self._options, self._stats = audit, options, stats
        self._live, self._scratch, self._zeros = layout.row(), layout.scratch(), layout.row()
        self._evaluator = Evaluator(
            layout, carry, rollout.base, audit, options.seed, self._speculates
        )
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
        if self._speculates and not accepted.inherited:
            last = self._stats.strides[-1] - 1 if self._stats.strides else 0
            due = self._audit.due(accepted.sweep, ahead=accepted.slot > 0)
            if due and accepted.slot == min(1, last):
                self._check(closure, accepted)
        return accepted

    def settle(self) -> None:
        """Applies the carry's change of the step that the base is just taking for real."""
        self._carry.apply(self.layout.carry, self.window.head, self.queue[0].drift)

    def pop(self) -> None:
        """Moves on by the step that was just committed."""
        self.queue.popleft()
        self.window.release([self.window.shift()])

    def inherit(self, other: Speculator, parents: Tensor | None) -> None:
        """Takes over, across a step that changed the number of parameters, what was evaluated before it.

        At tolerance 0 there is nothing: windows end at such a step, since a drift in the old structure is none in
        the new one, even where the parameters' bits agree.

        Args:
            other: The speculator over the old structure, standing behind that step.
            parents: The old row of each new one, int64 [rows]; None keeps nothing.

        Raises:
            ValueError: If the parents do not fit the tensors.
        """
        if parents is None:
            other.drop()
            return
        unproject = Unprojection(other.layout, self.layout, parents)
        # Only where accepted drifts wait: other guesses are better made anew, from where the new points lie.
        self.window.rows = [unproject(row) for row in other.window.rows[: max(1, len(other.queue))]]
        self.queue = deque(
            replace(kept, drift=replace(kept.drift, row=unproject(kept.drift.row)), inherited=True)
            for kept in other.queue
        )

    @property
    def _speculates(self) -> bool:
        """Whether anything is ever evaluated at a guess or on another rank."""
        return self._options.window > 1 or self._engine.size > 1

    def _slots(self, step: int) -> int:
        """How many drifts to evaluate at a step: ``p <- min(p, T - tau)``, at least 1."""
        most, total = self._options.window, self._options.total_steps
        if total is not None:
            most = max(1, min(most, total - step))
        restructure = self._options.restructure
        if restructure is not None and (self._tolerance.exact or not restructure.across):
            most = restructure.window(step, most)
        return most

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
        if len(self.window.rows) == 1 and step > 0 and self._options.window > 1:
            self._guess(step, slots)
        self.window.resize(slots + 1)
        watched = self._speculates and all(
            self._audit.due(self._stats.sweeps, ahead=ahead) for ahead in (False, True)
        )

        def evaluate(slot: int, out: Row) -> Drift:
            guess = self.window.rows[slot]
            return self._evaluator.evaluate(closure, step + slot, guess, out, watched)

        with self._evaluator.borrowed(self.window.head):
            drifts, evaluations = self._engine.evaluate(
                self.layout, evaluate, self._claim(step, slots)
            )
        self._stats.drift_evaluations += evaluations
        self._stats.wasted_evaluations += evaluations
        self._raise_bad_present(drifts)
        if len(drifts) > 1 and drifts[-1].outcome is not Outcome.FINITE:
            self._bad_future(drifts.pop())
        if self._options.window == 1 or drifts[0].outcome is not Outcome.FINITE:
            swept = self._take_head(drifts[0])
        else:
            with self._stats.phase("rollout"):
                swept = self._roll_out(drifts, step)
        self._stats.swept(*swept)
        if self._to_tell:  # now that all is in place: a filter may turn a warning into an error
            text, self._to_tell = self._to_tell, ""
            warn_user(text)

    def _take_head(self, head: Drift) -> Swept:
        """Queues the head's drift alone: a window of 1, or a step to be skipped. Nothing is compared."""
        self.window.resize(1)
        self.queue.append(Accepted(head, self._stats.sweeps, 0, float("inf")))
        return 1, [], []

    def _roll_out(self, drifts: list[Drift], step: int) -> Swept:
        """Rolls the base out, measures, chooses the stride, queues and slides."""
        with self._rollout.speculation(self.layout.tensors, self.window.head):
            after, error = self._iterates(drifts)
            if error is None and rehearsal.due(self._stats.sweeps):
                after, error = self._rehearsed(after, drifts)
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
        for slot, drift in enumerate(drifts[:stride]):
            threshold = thresholds[slot - 1] if slot else float("inf")
            self.queue.append(Accepted(drift, self._stats.sweeps, slot, threshold))
        return stride, list(measures.residuals), thresholds

    def _iterates(self, drifts: list[Drift]) -> tuple[list[Row], Exception | None]:
        """The head and the new iterates, as far as the base (and the carry's update) goes without an error."""
        after = [self.window.head]
        for guess, drift in zip(self.window.rows, drifts, strict=False):
            try:
                self._rollout.advance(self.layout.parameters, drift)
                self._carry.apply(self.layout.carry, guess, drift)
            except Exception as error:
                return after, error
            after.append(self.window.spare())
            after[-1].store(self.layout.tensors)
        return after, None

    def _rehearsed(
        self, first: list[Row], drifts: list[Drift]
    ) -> tuple[list[Row], Exception | None]:
        """The same rollout once more; an error at the head if it does not end where the first did."""
        self._rollout.rewind(self.layout.tensors, self.window.head)
        again, error = self._iterates(drifts)
        self.window.release(first[1:])
        ends = first[-1], again[-1]
        if error is None and not rehearsal.repeats(*ends, self.window.head, self._scratch):
            return again[:1], rehearsal.hidden_state(self._rollout.base, drifts[0].step)
        return again, error

    def _extend(self, last: Drift, step: int, stride: int) -> None:
        """Fills the slots behind the tail; the rollout stands there."""
        wanted = stride + self._slots(step + stride) + 1
        rows = [self.window.spare() for _ in range(wanted - len(self.window.rows))]
        still = Drift(last.step, self._zeros, last.present)
        self._options.predictor(self._rollout, self.layout, still, self.window.rows[-1], rows)
        self.window.rows.extend(rows)

    def _guess(self, step: int, slots: int) -> None:
        """Fills a window that has only its head: after a restructuring step, an edit, a resume."""
        parameters = self.layout.parameters
        still = Drift(step, self._zeros, tuple(p.requires_grad for p in parameters))
        rows = [self.window.spare() for _ in range(slots)]
        with self._rollout.speculation(self.layout.tensors, self.window.head):
            seed_all(step_seed(self._options.seed, step))
            self._options.predictor(self._rollout, self.layout, still, self.window.head, rows)
        self.window.rows.extend(rows)

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
            with self._evaluator.borrowed(self._live):
                again = once_more = self._evaluate_at_head(closure, queued.step, rows[0])
                difference = self._difference(queued, again)
                if 0 < difference < math.inf:
                    once_more = self._evaluate_at_head(closure, queued.step, rows[1])
                    noise = self._difference(again, once_more)
                    parts = self._engine.data_size
                    if is_noise(difference, noise, self.layout.device, parts):
                        difference = 0.0
            self.window.release(rows)
            interrupted = once_more.outcome is Outcome.INTERRUPTED
            error = once_more.error if interrupted else None
            told = self._engine.share_numbers([int(interrupted), float_bits(difference)], error)
        if any(flag for flag, _ in told):
            raise error or KeyboardInterrupt
        differences = [bits_float(bits) for _, bits in told]
        if any(differences):
            raise impure(queued.step, differences) from again.error
        self._audit.passed(accepted.sweep, ahead=accepted.slot > 0)

    def _evaluate_at_head(self, closure: Closure, step: int, out: Row) -> Drift:
        drift = self._evaluator.evaluate(closure, step, self.window.head, out)
        return self._engine.average(self.layout, drift)

    def _difference(self, drift: Drift, again: Drift) -> float:
        return differs(drift, again, self._scratch)

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
