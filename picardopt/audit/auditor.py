"""Decides at each step whether a queued drift still stands, and checks now and then that the closure is pure."""

from __future__ import annotations

import math

from picardopt.audit import Audit
from picardopt.audit.recheck import bits_float, differs, float_bits, impure, is_noise
from picardopt.audit.surroundings import Drop, Keep, Recheck, Surroundings
from picardopt.closure import StepClosure
from picardopt.drift import Accepted, Drift, Outcome
from picardopt.engines import Engine
from picardopt.evaluation import Evaluator
from picardopt.layout import ParameterLayout, Row
from picardopt.options import Options
from picardopt.stats import Stats
from picardopt.sweep import accepts, same_bits, squared_distance
from picardopt.warn import warn_user
from picardopt.window import Window

_VERDICTS = (Keep, Recheck, Drop)  # from the mildest on


class Auditor:
    """Looks at queued drifts before they are committed.

    Args:
        layout: The live tensors.
        window: The iterates; its head is the guess of the next queued drift.
        evaluator: Evaluates drifts again.
        engine: Averages them over a data row, and lets the ranks agree.
        audit: When to check.
        options: The optimizer's options.
        stats: Counts the checks.
        exact: Whether the tolerance is 0.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        window: Window,
        evaluator: Evaluator,
        engine: Engine,
        audit: Audit,
        options: Options,
        stats: Stats,
        exact: bool,
    ) -> None:
        self._layout, self._window, self._evaluator = layout, window, evaluator
        self._engine, self._audit, self._stats = engine, audit, stats
        self._exact, self._seed, self._stride = exact, options.seed, 0
        self._speculates = options.window > 1 or engine.size > 1
        self._live, self._scratch = layout.row(), layout.scratch()
        self._surroundings = Surroundings(layout.tensors)
        self._outer, self._message = audit.outer, ""
        self._looks = self._speculates and (exact or audit.mode != "never")

    def end_sweep(self, closure: StepClosure, stride: int) -> None:
        """Notes a new queue, and what its closure can see."""
        self._stride = stride
        if self._looks:
            self._surroundings.add_modules(self._audit.ran)
            self._note(closure)
        if self._message:
            text, self._message = self._message, ""
            warn_user(text)

    def _note(self, closure: StepClosure) -> None:
        """Takes what the closure sees now as it is: what it changed itself, `check` finds out."""
        self._surroundings.changed(closure.source)

    def stands(self, closure: StepClosure, accepted: Accepted) -> bool:
        """Whether the next queued drift is still that of the present parameters and closure."""
        if self._moved(accepted):
            return False
        return not self._looks or self._sees_the_same(closure, accepted)

    def _sees_the_same(self, closure: StepClosure, accepted: Accepted) -> bool:
        """Whether the closure sees what it saw when the queue was evaluated, or what changed does no harm.

        Ranks decide together: on rank 0 alone there may be a progress bar.
        """
        names = self._surroundings.changed(closure.source)
        verdict = self._outer.look(names, exact=self._exact, queued=True)
        codes = [code for (code,) in self._engine.share_numbers([_VERDICTS.index(type(verdict))])]
        if max(codes) == _VERDICTS.index(Keep):
            return True
        if max(codes) == _VERDICTS.index(Recheck):
            suspects = verdict.names if isinstance(verdict, Recheck) else ()
            # A remapped drift cannot be evaluated again.
            if not accepted.remapped and not any(self._evaluate_again(closure, accepted.drift)[0]):
                self._outer.harmless(suspects)
                return True
            if suspects:
                self._outer.harmful(suspects)
        self._stats.outer_changes += 1
        message = self._outer.message()
        if message and self._engine.rank == codes.index(max(codes)):
            self._message = message
        return False

    def _moved(self, accepted: Accepted) -> bool:
        """Whether the live parameters have left the point at which the drift was evaluated."""
        self._live.store(self._layout.tensors)
        if self._exact or accepted.slot == 0:
            return not bool(same_bits(self._live, self._window.head))
        distance = squared_distance(
            self._live, self._window.head, self._scratch, self._layout.numel
        )
        return not accepts(float(distance), accepted.threshold, False, exact=False)

    def check(self, closure: StepClosure, accepted: Accepted) -> None:
        """Refuses gradients that stand before the closure, and evaluates a drift again if the schedule says so.

        Raises:
            ImpureClosureError: If the closure is not a function of (parameters, step).
        """
        self._audit.clearing.check(closure, self._layout.parameters)
        ahead, sweep = accepted.slot > 0, accepted.sweep
        if not self._speculates or accepted.remapped or not self._audit.due(sweep, ahead=ahead):
            return
        if not self._audit.draws(accepted.slot, self._stride, self._seed, sweep):
            return
        differences, again = self._evaluate_again(closure, accepted.drift)
        if any(differences):
            raise impure(accepted.drift.step, differences) from again.error
        self._audit.passed(sweep, ahead=ahead)

    def _evaluate_again(self, closure: StepClosure, queued: Drift) -> tuple[list[float], Drift]:
        """Evaluates a queued drift at its guess, with the closure of its own call.

        Returns:
            The relative squared difference on each rank, 0 for none; and this rank's new drift.
        """
        rows = [self._window.spare(), self._window.spare()]
        with self._stats.phase("audit"):
            self._stats.audits += 1
            self._live.store(self._layout.tensors)
            with self._evaluator.swapped_parameters(self._live):
                again = last = self._evaluate(closure, queued.step, rows[0])
                difference = differs(queued, again, self._scratch)
                if 0 < difference < math.inf:
                    last = self._evaluate(closure, queued.step, rows[1])
                    noise = differs(again, last, self._scratch)
                    parts = self._engine.data_size
                    if is_noise(difference, noise, self._layout.device, parts):
                        difference = 0.0
            self._window.release(rows)
            if self._looks:
                self._note(closure)
            interrupted = last.outcome is Outcome.INTERRUPTED
            error = last.error if interrupted else None
            table = self._engine.share_numbers([int(interrupted), float_bits(difference)], error)
        if any(flag for flag, _ in table):
            raise error or KeyboardInterrupt
        return [bits_float(bits) for _, bits in table], again

    def _evaluate(self, closure: StepClosure, step: int, out: Row) -> Drift:
        drift = self._evaluator.evaluate(closure, step, self._window.head, out)
        return self._engine.average(self._layout, drift)
