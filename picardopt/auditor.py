"""Decides at each step whether a queued drift is still valid, and checks now and then that the closure is pure."""

from __future__ import annotations

from collections.abc import Sequence

from picardopt.audit import Audit
from picardopt.audit.recheck import bits_float, differs, float_bits, impure, is_noise
from picardopt.audit.sharing import WHILE_IT_WAITS
from picardopt.audit.surroundings import OFTEN, Drop, Keep, Recheck, Surroundings
from picardopt.audit.wrappers import advice
from picardopt.closure import StepClosure
from picardopt.compat import add_note
from picardopt.correction import Secants
from picardopt.drift import Accepted, Calls, Drift, Outcome
from picardopt.engines import Engine
from picardopt.evaluation import Evaluator
from picardopt.layout import ParameterLayout, Row
from picardopt.options import Options
from picardopt.stats import Stats, phase
from picardopt.sweep import same_bits, squared_distances, squared_moves, within
from picardopt.warn import warn_user
from picardopt.window import Window

_KEEP, _RECHECK, _DROP = range(3)  # a rank's opinion on a queued drift
_RETRY = 16  # sweeps
_OPINIONS = {Keep: _KEEP, Recheck: _RECHECK, Drop: _DROP}


class Auditor:
    """Checks queued drifts before they are committed.

    Args:
        layout: The live tensors.
        window: The iterates; its head is the guess of the next queued drift.
        evaluator: Evaluates drifts again.
        engine: Averages them over a data row, and lets the ranks agree.
        audit: The schedule of checks.
        options: The optimizer's options.
        stats: Counts the checks.
        exact: Whether the tolerance is 0.
        correction: What drifts are corrected with, if anything.
        own: The wrapper, its bases and their groups: a closure may see these change.
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
        correction: Secants | None,
        own: Sequence[object],
    ) -> None:
        self._layout, self._window, self._evaluator = layout, window, evaluator
        self._engine, self._audit, self._stats = engine, audit, stats
        self._exact, self._seed, self._stride = exact, options.seed, 0
        self._speculates = options.window > 1 or engine.size > 1
        self._owner, self._correction = id(own[0]), correction
        # At tolerance 0 even with audit="never": the run must be the sequential one.
        self._watches = self._speculates and (exact or audit.mode != "never")
        self._surroundings = Surroundings([*layout.tensors, *own])

    def end_sweep(self, closure: StepClosure, stride: int) -> None:
        """Records the length of a new queue, and the surroundings of its closure."""
        self._stride = stride
        self._audit.changes.ignored.clear()
        if self._watches and stride > 1:
            self._surroundings.add_modules(self._audit.ran)
            self._note(closure)

    def _note(self, closure: StepClosure) -> None:
        """Records the surroundings anew, so that changes by an evaluation are not taken for the loop's."""
        self._surroundings.changed(closure.source)

    def valid(self, closure: StepClosure, accepted: Accepted) -> bool:
        """Returns whether the next queued drift is valid for the present parameters and surroundings of the closure.

        The ranks decide together: a progress bar, for instance, may change on one of them only.
        """
        if not self._watches:
            return not self._moved(accepted)
        verdict = self._audit.changes.look(
            self._surroundings.changed(closure.source), exact=self._exact, queued=True
        )
        opinion, moved = _OPINIONS[type(verdict)], self._moved(accepted)
        if moved or (opinion and accepted.remapped):
            opinion = _DROP
        opinions = [each for (each,) in self._engine.share_numbers([opinion])]
        valid = max(opinions) == _KEEP
        if max(opinions) == _RECHECK and self._audit.sharing.comparable(accepted.drift):
            differences, *_ = self._evaluate_again(closure, accepted.drift)
            valid = not any(differences)
            if isinstance(verdict, Recheck):
                changes = self._audit.changes
                (changes.harmless if valid else changes.harmful)(verdict.names)
        if valid:
            self._audit.drops_in_a_row = 0
        elif not moved:
            self._count_drop()
        self._warn(opinions)
        return valid

    def _count_drop(self) -> None:
        self._audit.drops_in_a_row += 1
        self._stats.outer_changes += 1

    @property
    def futile(self) -> bool:
        """Whether a window would probably be dropped after its head, as the last ones were; retried now and then."""
        often = self._audit.drops_in_a_row >= OFTEN
        return often and self._stats.sweeps % _RETRY != 0

    def _warn(self, opinions: Sequence[float]) -> None:
        """Warns about a change, on the first rank that saw it."""
        text = self._audit.changes.message()
        first = next((rank for rank, opinion in enumerate(opinions) if opinion), None)
        if text and self._engine.rank == first:
            warn_user(text + advice(self._owner))

    def _moved(self, accepted: Accepted) -> bool:
        """Returns whether the live parameters have left the point at which the drift was evaluated."""
        head, numels = self._window.head, self._layout.numels
        by_bits = self._exact or accepted.slot == 0
        moves = None if by_bits else squared_moves(self._layout, head)
        if moves is None:
            live = self._window.spare()
            live.store(self._layout.tensors)
            self._window.release([live])
            if by_bits:
                return not bool(same_bits(live, head))
            moves = squared_distances([(live, head)], numels)[:, 0]
        return not within(moves.tolist(), accepted.threshold, numels)

    def check(self, closure: StepClosure, accepted: Accepted) -> bool:
        """Refuses gradients left over from before the closure, and evaluates a drift again if the schedule asks for it.

        Returns:
            Whether to commit it; not if the loop changed something that had done no harm before.

        Raises:
            ImpureClosureError: If the closure is not a function of (parameters, step).
        """
        self._audit.clearing.check(closure, self._layout.parameters)
        ahead, sweep = accepted.slot > 0, accepted.sweep
        if not self._speculates or accepted.remapped or not self._audit.due(sweep, ahead=ahead):
            return True
        if not self._audit.draws(accepted.slot, self._stride, self._seed, sweep):
            return True
        if not self._audit.sharing.comparable(accepted.drift):
            return True
        differences, excused, again = self._evaluate_again(closure, accepted.drift)
        if excused:
            if self._audit.changes.ignored:
                self._audit.changes.harmful_after_all()
            self._count_drop()
            self._warn(differences)
            return False
        if any(differences):
            error = impure(accepted.drift.step, differences)
            if accepted.drift.calls is not Calls.NONE:
                add_note(error, f"It makes batched calls: {WHILE_IT_WAITS}.")
            raise error from again.error
        self._audit.passed(sweep, ahead=ahead)
        return True

    def _evaluate_again(
        self, closure: StepClosure, queued: Drift
    ) -> tuple[list[float], bool, Drift]:
        """Evaluates a queued drift at its guess, with the closure of its own call.

        Returns:
            The relative squared difference on each rank, 0 for none; whether there is one that changes of the closure's
            surroundings explain; and this rank's new drift.
        """
        live, out = self._window.spare(), self._layout.row()
        with phase(self._stats, "audit"):
            self._stats.audits += 1
            live.store(self._layout.tensors)
            with self._evaluator.swapped_parameters(live):
                again = last = self._evaluate(closure, queued, out)
                difference, repeats = differs(queued, again), False
                if difference and again.outcome < Outcome.FAILED:
                    last = self._evaluate(closure, queued, self._layout.row())
                    noise = differs(again, last)
                    near = self._layout.device, self._engine.data_size
                    repeats = noise == 0 or is_noise(noise, noise, *near)
                    if is_noise(difference, noise, *near):
                        difference = 0.0
            self._window.release([live])
            if self._watches:
                self._note(closure)
            interrupted = last.outcome is Outcome.INTERRUPTED
            error = last.error if interrupted else None
            explained = repeats and bool(self._audit.changes.ignored)
            numbers = [int(interrupted), float_bits(difference), int(explained)]
            table = self._engine.share_numbers(numbers, error)
        if any(flag for flag, *_ in table):
            raise error or KeyboardInterrupt
        differences = [bits_float(bits) for _, bits, _ in table]
        reasons = [
            reason
            for difference, (*_, reason) in zip(differences, table, strict=True)
            if difference
        ]
        return differences, any(reasons) and all(reasons), again

    def _evaluate(self, closure: StepClosure, queued: Drift, out: Row) -> Drift:
        head = self._window.head
        alone = self._engine.data_size == 1  # a row tests at the head only
        drift = self._evaluator.evaluate(closure, queued.step, head, out, test_clearing=alone)
        drift = self._engine.average(self._layout, drift)
        if queued.correction is not None and self._correction is not None:
            self._correction.add(drift.row, queued.correction)
        self._audit.clearing.learn(closure, self._stats.sweeps, [drift.uncleared])
        return drift
