"""Rolls the base out over a window's drifts, fills the window's new slots, and commits steps.

`refine` and `extend` step the base ahead of time, inside `speculation`; `commit` takes a final step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from picardopt import replay_check
from picardopt.carry import Carry, apply_carry
from picardopt.correction import Secants
from picardopt.drift import Drift
from picardopt.gauge import Gauge
from picardopt.layout import ParameterLayout, Row
from picardopt.lending import Lending
from picardopt.memory import Memory, memory
from picardopt.predictor import Predictor
from picardopt.rng import seed_all, step_seed
from picardopt.state_size import state_bytes
from picardopt.stepper import BaseStepper
from picardopt.sweep import measure
from picardopt.tolerance import Tolerance
from picardopt.window import Window

T = TypeVar("T")


class Rollout:
    """The base's steps over one list of parameters.

    Args:
        stepper: Steps the base.
        layout: The live parameters and the live carry.
        carry: Applies the carry's changes.
        predictor: Fills the window's new slots.
        window: The iterates.
        lending: Sets the gradients of steps ahead.
        correction: Corrects drifts that were evaluated at a wrong guess, if anything does.
    """

    def __init__(
        self,
        stepper: BaseStepper,
        layout: ParameterLayout,
        carry: Carry,
        predictor: Predictor,
        window: Window,
        lending: Lending,
        correction: Secants | None = None,
    ) -> None:
        self._stepper, self._layout, self._carry = stepper, layout, carry
        self._predictor, self._window, self._correction = predictor, window, correction
        self._lending = lending
        self._zeros = layout.zeros()

    @contextmanager
    def speculation(self) -> Iterator[None]:
        """Allows steps ahead inside the block; on exit everything is as at the head again."""
        with self._stepper.speculation(self._layout.tensors, self._window.head):
            yield

    def memory(self, window: int, *, exact: bool, data: int) -> Memory:
        """Returns what a window takes besides the plain loop's own memory; an unknown state counts as none.

        Args:
            window: Steps evaluated per sweep.
            exact: Whether the tolerance is 0.
            data: Ranks that share a step.
        """
        return memory(
            window,
            self._layout.row_bytes,
            state_bytes(self._stepper.base) or 0,
            exact=exact,
            secants=0 if self._correction is None else self._correction.pairs,
            secant_bytes=self._layout.measured_bytes,
            data=data,
        )

    def forget(self) -> None:
        """Forgets the secants, which are those of another closure now."""
        if self._correction is not None:
            self._correction.clear()

    def draws(self) -> bool:
        """Returns whether a step after a drift may draw from the generators as its closure left them."""
        return self._carry.update is not None or self._stepper.draws(self._lending)

    def learn(self, gauge: Gauge, drifts: Sequence[Drift]) -> Tensor:
        """Learns a secant from the gauge's pair, if there is one; returns what the gauge measures."""
        head, changes = self._window.head, None
        if self._correction is not None and gauge.has(drifts[0].step):
            pair = gauge.guess, drifts[0].row, gauge.drift, gauge.coefficients
            changes = self._correction.observe(head, *pair)
        return gauge.measure(head, drifts, changes)

    def refine(
        self, drifts: Sequence[Drift], *, check_replay: bool
    ) -> tuple[list[Row], Exception | None]:
        """Rolls the base out from the head: ``theta[t+j+1] = h(s(theta[t+j]), theta[t+j])``.

        Args:
            drifts: The window's drifts in order of slots.
            check_replay: Whether to roll out twice and compare, to find state outside the snapshot's reach.

        Returns:
            The head and the new iterates, and the error that ended the rollout early, if one did.
        """
        after, error = self._iterates(drifts)
        if error is not None or not check_replay:
            return after, error
        self._stepper.rewind(self._layout.tensors, self._window.head)
        taken, error = self._replay(drifts)
        if error is None and not self._repeats(after[-1]):
            taken, error = 0, replay_check.hidden_state(self._stepper.base, drifts[0].step)
        self._window.release(after[taken + 1 :])
        return after[: taken + 1], error

    def _iterates(self, drifts: Sequence[Drift]) -> tuple[list[Row], Exception | None]:
        after = [self._window.head]
        for guess, drift in zip(self._window.rows, drifts, strict=False):
            if self._correction is not None and len(after) > 1:  # the head is never wrong
                self._correction.correct(drift, guess, after[-1])
            try:
                self._advance(guess, drift)
            except Exception as error:
                return after, error
            after.append(self._window.spare())
            after[-1].store(self._layout.tensors)
        return after, None

    def _replay(self, drifts: Sequence[Drift]) -> tuple[int, Exception | None]:
        """Rolls out once more, without keeping the iterates; returns the number of steps, and what ended them early."""
        for taken, (guess, drift) in enumerate(zip(self._window.rows, drifts, strict=False)):
            try:
                self._advance(guess, drift)
            except Exception as error:
                return taken, error
        return len(drifts), None

    def _repeats(self, end: Row) -> bool:
        """Returns whether the live tensors are where an earlier rollout ended, to rounding."""
        if all(map(torch.equal, self._layout.tensors, [*end.tensors, *end.carry])):
            return True
        again = self._layout.row()
        again.store(self._layout.tensors)
        return replay_check.repeats(end, again, self._window.head)

    def _advance(self, guess: Row, drift: Drift) -> None:
        self._stepper.advance(drift, self._lending)
        apply_carry(self._carry, self._layout.carry, guess, drift)

    def measure(self, after: Sequence[Row], tolerance: Tolerance) -> Tensor:
        """Compares the window with the new iterates; see `picardopt.sweep.measure`."""
        return measure(
            self._window.rows[: len(after)],
            after,
            self._layout.numels,
            lengths=tolerance.needs_lengths,
            distances=tolerance.needs_distances,
            bits=tolerance.exact,
        )

    def extend(self, last: Drift, count: int) -> None:
        """Fills slots after the tail, up to `count` iterates; the base must be at the tail."""
        self._fill(last.step, last.present, count - len(self._window.rows))

    def guess(self, step: int, count: int, seed: int) -> None:
        """Fills a window that has only its head, as after a restructuring step, an edit or a resume."""
        trained = tuple(parameter.requires_grad for parameter in self._layout.parameters)
        with self.speculation():
            seed_all(step_seed(seed, step))
            self._fill(step, trained, count)

    def _fill(self, step: int, present: tuple[bool, ...], count: int) -> None:
        zero_drift = Drift(step, self._zeros, present)

        def coast(row: Row) -> bool:
            try:
                self._stepper.advance(zero_drift, self._lending)
            except Exception:
                return False
            row.store(self._layout.tensors)
            return True

        rows = [self._window.spare() for _ in range(count)]
        self._predictor.fill(self._window.rows[-1], rows, coast)
        self._window.rows.extend(rows)

    def commit(
        self,
        drift: Drift,
        restructure: Callable[[], T] | None = None,
        holders: Sequence[object] = (),
    ) -> T | None:
        """Commits the head's step: the base, the carry and the restructuring, all of them or none.

        Args:
            drift: The accepted drift of the step.
            restructure: Changes the number of parameters, if that is due.
            holders: Objects whose attributes it may replace.

        Returns:
            The result of `restructure`.
        """
        user_code = restructure is not None or self._carry.update is not None
        draws = drift.rng is not None
        carry = self._layout.carry
        with self._stepper.commit(carry, holders, user_code=user_code, draws=draws):
            self._stepper.apply(self._layout.parameters, drift)
            apply_carry(self._carry, self._layout.carry, self._window.head, drift)
            return None if restructure is None else restructure()
