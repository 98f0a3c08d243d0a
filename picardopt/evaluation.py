"""Evaluates closures at guesses, checks their side effects, and restores the live tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.optim import Optimizer

from picardopt.adapters import amp
from picardopt.aside import LiveState, spoil
from picardopt.audit import Audit
from picardopt.audit.modules import any_ddp
from picardopt.audit.options import options_of, refuse_changed_options
from picardopt.batched import Batched
from picardopt.carry import Carry
from picardopt.closure import StepClosure, seen_by
from picardopt.drift import Calls, Drift, Outcome, evaluate_drift
from picardopt.engines import Engine, SweepHeader
from picardopt.joint import JointEvaluation
from picardopt.layout import ParameterLayout, Row, parameters_of
from picardopt.options import Options
from picardopt.rng import preserved_rng, step_seed
from picardopt.shared_calls import SharedCalls
from picardopt.stats import Stats
from picardopt.tolerance import Tolerance
from picardopt.turns import put_aside_by
from picardopt.window import Window


class Evaluator:
    """Evaluates closures in the live tensors.

    Args:
        layout: The live tensors.
        carry: The tensors besides parameters that a closure may rewrite.
        base: The wrapped optimizer, whose options a closure must not change.
        owner: Id of the wrapper, which a GradScaler may have registered.
        engine: Spreads the slots over the ranks.
        options: The optimizer's options.
        tolerance: Decides what is accepted; must be the same on all ranks.
        audit: Watches buffers and knows the gradients that a closure clears.
        stats: Counts evaluations.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        carry: Carry,
        base: Optimizer,
        owner: int,
        engine: Engine,
        options: Options,
        tolerance: Tolerance,
        audit: Audit,
        stats: Stats,
    ) -> None:
        self._layout, self._carry, self._base = layout, carry, base
        self._optimizers = (owner, id(base))
        self._engine, self._options, self._tolerance = engine, options, tolerance
        self._audit, self._stats = audit, stats
        self._speculates = options.window > 1 or engine.size > 1
        self.keeps_rng: Callable[[], bool] = lambda: True
        """Whether a step after a drift may draw from the generators as its closure left them."""

    def start(self, window: Window, step: int) -> None:
        """Checks that the ranks agree and broadcasts rank 0's parameters.

        Raises:
            RankMismatchError: If the ranks have different models or options.
        """
        head = window.head
        head.store(self._layout.tensors)
        self._engine.start(self._layout, head, self._header(head, step, 0))
        head.load(self._layout.tensors)

    def evaluate_window(
        self, closure: StepClosure, window: Window, step: int, slots: int
    ) -> tuple[list[Drift], int]:
        """Evaluates slots 0 .. slots-1 of the window on all ranks.

        Returns:
            The drifts in order of slots, the same on every rank, ending at the first that is not finite; and the
            number of evaluations over all ranks.
        """
        watched = self._speculates and self._audit.watches(self._stats.sweeps)
        clearing, sweep = self._audit.clearing, self._stats.sweeps
        due, alone = clearing.due(closure, sweep), self._engine.data_size == 1
        joint = self._joint(closure, sweep)

        def evaluate(slot: int, out: Row) -> Drift:
            guess, test_clearing = window.rows[slot], due and (alone or slot == 0)
            return self.evaluate(closure, step + slot, guess, out, watched, test_clearing)

        with self.swapped_parameters(window.head):
            header = self._header(window.head, step, slots)
            drifts, evaluations = self._engine.evaluate(self._layout, evaluate, header, joint)
        self._stats.drift_evaluations += evaluations
        clearing.learn(closure, sweep, [drift.uncleared for drift in drifts])
        self._audit.sharing.learn(closure, drifts)
        return drifts, evaluations

    def _joint(self, closure: StepClosure, sweep: int) -> JointEvaluation | None:
        """Returns what joins the closure's batched calls in this sweep; None where bits count, or there are none.

        In a closure's first such sweep, and where the audit will evaluate a drift again, slots take turns, but no call
        is joined: that changes nothing but for closures that lose something while they wait, and so these are found.
        """
        known = self._audit.sharing.allowed(closure)
        if known is None or self._tolerance.exact or not self._speculates:
            return None
        lockstep = self._engine.data_size > 1
        if lockstep and not known.compared and any_ddp():
            # It averages one backward after each forward; here several forwards would come first.
            known.given_up = True
            return None
        known.compared |= self._audit.mode == "never"  # nothing is to be checked
        join = known.compared and not self._audit.due(sweep, ahead=True)
        calls = SharedCalls(partial(spoil, self._layout.tensors), self._stats, join=join)
        return JointEvaluation(known, calls, self._layout.row, lockstep)

    def _header(self, head: Row, step: int, slots: int) -> SweepHeader:
        return SweepHeader(
            step=step,
            sweep=self._stats.sweeps,
            slots=slots,
            window=self._options.window,
            seed=step_seed(self._options.seed, 0) >> 1,
            options=self._options.digest(self._tolerance, self._audit.mode),
            layout=self._layout.digest,
            parameters=head.fingerprint() if self._engine.size > 1 else 0,
        )

    def evaluate(
        self,
        closure: StepClosure,
        step: int,
        guess: Row,
        out: Row,
        watched: bool = False,
        test_clearing: bool = False,
    ) -> Drift:
        """Evaluates one drift at a guess; only inside `swapped_parameters`.

        Args:
            closure: The user's closure.
            step: Step index t.
            guess: Values of the parameters and the carry.
            out: Receives the gradients, and the carry as the closure left it.
            watched: Whether to watch module buffers too.
            test_clearing: Whether to find the gradients that the closure does not clear (`Drift.uncleared`). A closure
                that leaves a test gradient in place, or sets it to zero in place, is evaluated twice; on a data axis
                every closure, so that the ranks of a row stay in lockstep.
        """
        drift = self._evaluate(closure, step, guess, out, watched, test_clearing)
        lockstep = test_clearing and self._engine.data_size > 1
        if not (drift.tainted or lockstep) or drift.outcome is Outcome.INTERRUPTED:
            return drift
        # The error's frames hold the activations: free them before the second evaluation.
        if drift.error is not None:
            drift.error.__traceback__ = None
        again = self._evaluate(closure, step, guess, out, watched, False)
        # A closure that raised only in the test may add to any of the earlier gradients.
        all_indices = range(len(self._layout.parameters)) if again.error is None else ()
        unknown = drift.tainted and drift.uncleared is None
        suspects = all_indices if unknown else drift.uncleared or ()
        # A gradient that is NaN without the test proves nothing.
        again.uncleared = tuple(
            index
            for index in suspects
            if not (again.present and again.present[index] and out.tensors[index].isnan().all())
        )
        return again

    def _evaluate(
        self,
        closure: StepClosure,
        step: int,
        guess: Row,
        out: Row,
        watched: bool,
        test_clearing: bool,
    ) -> Drift:
        guess.load(self._layout.tensors)
        around, made, call = self._around(closure, guess, watched), Batched.made, closure.call
        if watched:
            call = self._audit.outside.finding(call, self._layout.parameters, self._audit.modules)
        torch.clear_autocast_cache()  # keyed by tensor: around `step`, it would outlive the values
        with put_aside_by(LiveState(self._layout, guess, out)):
            drift = evaluate_drift(
                call,
                self._layout,
                out,
                step,
                self._options.seed,
                around,
                test_clearing=test_clearing,
                keep_rng=self.keeps_rng(),
            )
        torch.clear_autocast_cache()
        if Batched.made != made:
            drift.calls = Calls.ALONE
        return drift

    @contextmanager
    def swapped_parameters(self, row: Row) -> Iterator[None]:
        """Allows guesses in the live tensors; on exit these hold `row` again, as gradients and generators do theirs."""
        parameters = self._layout.parameters
        grads = [p.grad for p in parameters]
        marked = self._audit.outside.marked() if self._speculates else nullcontext()
        with preserved_rng(), marked:
            try:
                yield
            finally:
                row.load(self._layout.tensors)
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad

    @contextmanager
    def _around(self, closure: StepClosure, guess: Row, watched: bool) -> Iterator[None]:
        """Raises on the closure's behalf if it changed something that it must not change."""
        groups = self._base.param_groups
        before = options_of(groups) if self._speculates else []
        rewritten = self._layout.carry if self._carry.update is None else []
        seen = seen_by(closure.source) if watched else ()
        with self._audit.guard(self._layout, guess, rewritten, seen) if watched else nullcontext():
            try:
                yield
            except RuntimeError as error:
                explained = amp.explain(error) if self._speculates else error
                if explained is error:
                    raise
                raise explained from error
        if watched:
            amp.refuse_unscaling(amp.scalers_of(seen_by(closure.source)), self._optimizers)
        refuse_changed_options(groups, before)
        if not self._layout.describes(parameters_of(self._base), self._carry.present()):
            raise RuntimeError(
                "the closure changed the optimizer's parameter list or the carry's (other tensors, shapes, "
                "groups or requires_grad): do that between two calls of step(), which rebuild the window, or with "
                "restructure=; and write into the carry's tensors in place"
            )
