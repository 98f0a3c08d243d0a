"""Evaluates the slots of a rank in turns, so that calls of batched functions are made once for all of them.

Every slot's evaluation runs in a thread of its own, up to its next call of a function that `picardopt.batched` marked;
its graph stays alive while it waits. One thread runs at a time, in order of slots. The functions run in the thread that
called the optimizer.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial

from picardopt.audit.recheck import differs
from picardopt.audit.sharing import WHILE_IT_WAITS, SharedBy
from picardopt.drift import Calls, Drift, EvaluateSlot, Outcome
from picardopt.errors import BatchedCallError
from picardopt.interrupts import raised_by_signal
from picardopt.layout import Row
from picardopt.shared_calls import SharedCalls
from picardopt.turns import Turn, turns
from picardopt.warn import warn_user

_LARGEST_DIFFERENCE = (
    1e-2  # of gradients, relative: sums by atomics in half precision differ by run
)


class JointEvaluation:
    """Evaluates a rank's slots of one sweep.

    Args:
        known: What is known of the closure's batched calls.
        calls: Makes them.
        spare: Makes a row, for an evaluation to be compared.
        lockstep: Whether the ranks of a data row evaluate the same slots, and must do the same.
    """

    def __init__(
        self, known: SharedBy, calls: SharedCalls, spare: Callable[[], Row], lockstep: bool
    ) -> None:
        self._known, self._calls, self._spare, self._lockstep = known, calls, spare, lockstep

    def evaluate_many(
        self, evaluate: EvaluateSlot, slots: Sequence[int], rows: Sequence[Row], until: Outcome
    ) -> list[Drift]:
        """Evaluates slots as `Engine.evaluate_many` does.

        Returns:
            The first drifts, at least one: up to one whose outcome is `until` or worse, or that was evaluated again on
            the main thread. Of an interrupted sweep the drift that was.
        """
        pairs = zip(slots, rows, strict=False)
        evaluations = [partial(evaluate, slot, row) for slot, row in pairs]
        try:
            with turns(evaluations) as found:
                drifts = self._take_turns(found, until)
        except BaseException as error:
            if isinstance(error, Exception) and not raised_by_signal(error):
                raise
            trace = "".join(traceback.format_exception(error))
            return [Drift(-1, rows[0], outcome=Outcome.INTERRUPTED, error=error, trace=trace)]
        last = drifts[-1]
        if last.outcome is Outcome.INTERRUPTED:
            return drifts
        if not self._known.compared:
            self._compare(evaluate, slots, drifts)
        if last.outcome is Outcome.FAILED and not self._lockstep:
            drifts[-1] = self._alone_again(last, evaluations[len(drifts) - 1])
        return drifts

    def _take_turns(self, found: list[Turn], until: Outcome) -> list[Drift]:
        """Runs all slots to their ends, those behind a bad one excepted."""
        live = list(found)
        while live:
            for turn in list(live):
                if turn not in live:
                    continue
                turn.proceed()
                if not turn.ended:
                    continue
                if turn.error is not None:
                    raise turn.error
                drift: Drift = turn.result
                if drift.outcome is Outcome.INTERRUPTED:
                    return [drift]
                later = live[live.index(turn) + 1 :]
                live.remove(turn)
                if drift.outcome >= until:
                    for unwanted in later:
                        unwanted.cancel()
                        live.remove(unwanted)
                    found = found[: found.index(turn) + 1]
            self._calls.answer(live)
        for turn in found:
            if turn in self._calls.joined:
                turn.result.calls = Calls.JOINED
        return [turn.result for turn in found]

    def _compare(self, evaluate: EvaluateSlot, slots: Sequence[int], drifts: list[Drift]) -> None:
        """Compares two slots' gradients with those of the slots alone, in the first sweep; it joins no calls.

        So a closure is found that leaves something changed while it waits: the last slot sees what the first has left,
        and the first alone what the sweep has left.
        """
        waited = [i for i, drift in enumerate(drifts) if drift.calls is not Calls.NONE]
        if self._lockstep:  # whatever became of them on this rank
            waited = list(range(len(drifts)))
        if not waited:
            return
        self._known.compared, row = True, self._spare()
        for index in (waited[-1], waited[0]):
            drift, alone = drifts[index], evaluate(slots[index], row)
            both_finite = max(drift.outcome, alone.outcome) is Outcome.FINITE
            if both_finite and not differs(drift, alone) <= _LARGEST_DIFFERENCE**2:
                drifts[0].outcome = Outcome.FAILED
                text = f"the closure gives another gradient when {WHILE_IT_WAITS}"
                drifts[0].error = BatchedCallError(text)

    def _alone_again(self, failed: Drift, evaluate: Callable[[], Drift]) -> Drift:
        """Evaluates a slot again whose closure raised: it may need the main thread."""
        error = failed.error
        if error is None or isinstance(error, BatchedCallError):
            return failed
        error.__traceback__ = None  # its frames hold the activations
        again = evaluate()
        if again.outcome < Outcome.FAILED:
            self._known.given_up = True
            warn_user(
                f"the closure raised {type(error).__name__} ({error}) in a thread of its own, where batched calls are "
                "joined, but not on the main thread: its calls are made for each slot from now on (warned once)"
            )
        return again
