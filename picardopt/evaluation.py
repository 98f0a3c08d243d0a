"""Evaluate a closure at a row's values, watch what it leaves behind, and put the live tensors back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch.optim import Optimizer

from picardopt.audit import Audit, options_of, refuse_changed_options
from picardopt.carry import Carry
from picardopt.drift import Closure, Drift, evaluate_drift
from picardopt.layout import ParameterLayout, Row, parameters_of


class Evaluator:
    """Lends the live tensors to closures.

    Args:
        layout: The live tensors.
        carry: What besides parameters a closure may rewrite.
        base: The optimizer, whose options a closure must leave alone.
        audit: Who watches buffers.
        seed: The run's seed.
        speculates: Whether anything is ever evaluated at a guess or on another rank.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        carry: Carry,
        base: Optimizer,
        audit: Audit,
        seed: int,
        speculates: bool,
    ) -> None:
        self._layout, self._carry, self._base = layout, carry, base
        self._audit, self._seed, self._speculates = audit, seed, speculates

    def evaluate(
        self, closure: Closure, step: int, guess: Row, out: Row, watched: bool = False
    ) -> Drift:
        """One drift at a guess; only inside `borrowed`.

        Args:
            closure: The user's closure.
            step: Step index t.
            guess: Values of the parameters and the carry.
            out: Where the gradients are written, and the carry as the closure left it.
            watched: Whether module buffers are watched too.
        """
        guess.load(self._layout.tensors)
        around = self._around(watched)
        return evaluate_drift(closure, self._layout, out, step, self._seed, around)

    @contextmanager
    def borrowed(self, row: Row) -> Iterator[None]:
        """Lends the live tensors out; afterwards they hold `row` and have their gradients back."""
        parameters = self._layout.parameters
        grads = [p.grad for p in parameters]
        try:
            yield
        finally:
            row.load(self._layout.tensors)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad

    @contextmanager
    def _around(self, watched: bool) -> Iterator[None]:
        """Stands around a closure and raises, as if the closure did, if it changed what it must not."""
        groups = self._base.param_groups
        before = options_of(groups) if self._speculates else []
        rewritten = self._layout.carry if self._carry.update is None else []
        with self._audit.guard(self._layout, rewritten) if watched else nullcontext():
            yield
        refuse_changed_options(groups, before)
        if not self._layout.describes(parameters_of(self._base), self._carry.present()):
            raise RuntimeError(
                "the closure changed the optimizer's parameter list or the carry's (other tensors, shapes or "
                "groups): do that between two calls of step(), where the window is rebuilt, or with restructure=; "
                "and write into the carry's tensors in place"
            )
