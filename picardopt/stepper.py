"""Steps the base optimizer in place, with its own code (the paper's ``h``), ahead of time or to commit.

Everything that a step may change besides the parameters (state, group values, attributes, nested optimizers,
generators, the LR scheduler) is captured before the base steps ahead, and restored afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from picardopt.drift import Drift, Outcome, set_gradients
from picardopt.layout import Row, parameters_of
from picardopt.lending import Lending
from picardopt.rng import preserved_rng
from picardopt.snapshot import Snapshot


class BaseStepper:
    """Steps a base optimizer over drifts.

    Args:
        base: The wrapped optimizer.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.lr_scheduler: LRScheduler | None = None
        self._ahead = Snapshot([base])
        self._before = Snapshot([base])

    def follow(self, lr_scheduler: LRScheduler | None, wrapper: object) -> None:
        """Sets the scheduler that gives future learning rates; with None they stay constant.

        Args:
            lr_scheduler: The scheduler that the user's loop steps.
            wrapper: The optimizer that a snapshot must not enter through the scheduler.
        """
        self.lr_scheduler = lr_scheduler
        self._ahead = Snapshot([self.base, lr_scheduler], skip=[wrapper])

    @contextmanager
    def speculation(self, tensors: Sequence[Tensor], head: Row) -> Iterator[None]:
        """Allows steps of the base inside the block; on exit parameters, state and generators are the head's again.

        Args:
            tensors: The live parameters, then the carry, with the head's values.
            head: The head's row.
        """
        grads = [tensor.grad for tensor in tensors]
        with preserved_rng(), hooks_disabled(self.base, own=True):
            self._ahead.capture(tensors)
            try:
                yield
            finally:
                self.rewind(tensors, head)
                for tensor, grad in zip(tensors, grads, strict=True):
                    tensor.grad = grad

    def rewind(self, tensors: Sequence[Tensor], head: Row) -> None:
        """Goes back to the head, to roll out again. Only inside `speculation`."""
        self._ahead.restore()
        head.load(tensors)

    def advance(self, drift: Drift, lending: Lending) -> None:
        """Steps the base and then the scheduler ahead. Only inside `speculation`."""
        lending.set_gradients(drift)
        self._step(drift)
        scheduler = self.lr_scheduler
        if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
            return
        try:
            # The class's own step: the instance's may be wrapped for the user's loop.
            type(scheduler).step(scheduler)
        except ValueError:
            # OneCycleLR past its last step: the rates stay.
            return

    def apply(self, parameters: Sequence[Tensor], drift: Drift) -> None:
        """Steps the base with one drift, from the generator states that the drift's closure left.

        A drift that is not finite leaves the base untouched (``nonfinite="skip"``).
        """
        set_gradients(parameters, drift)
        self._step(drift)

    def _step(self, drift: Drift) -> None:
        if drift.rng is not None:
            drift.rng.restore()
        if drift.outcome is Outcome.FINITE:
            self.base.step()

    def plain_step(
        self, carry: Sequence[Tensor], then: Sequence[Callable[[], Any]], holders: Sequence[object]
    ) -> None:
        """Steps the base with the present gradients and the caller's generators; completely or not at all.

        Args:
            carry: The live carry.
            then: The user's functions to call after the step.
            holders: Objects whose attributes they may replace.
        """
        with self.transaction(carry, holders, user_code=bool(then)):
            self.base.step()
            for function in then:
                function()

    def draws(self, lending: Lending) -> bool:
        """Returns whether a step of the base, its hooks or its scheduler may draw random numbers."""
        known = lending.only_reads and self.lr_scheduler is None
        return not known or any(_own_hooks(self.base))

    @contextmanager
    def commit(
        self, carry: Sequence[Tensor], holders: Sequence[object], *, user_code: bool, draws: bool
    ) -> Iterator[None]:
        """Commits the step taken inside the block, or undoes it; preserves the caller's generators.

        Its arguments are those of `transaction`, and whether the block may draw random numbers.
        """
        with (
            preserved_rng() if draws else nullcontext(),
            self.transaction(carry, holders, user_code=user_code),
        ):
            yield

    @contextmanager
    def transaction(
        self, carry: Sequence[Tensor], holders: Sequence[object], *, user_code: bool
    ) -> Iterator[None]:
        """Undoes the block if it raises: parameters, ``.grad``, the base's state and groups, the carry.

        The base's own hooks run inside; torch's global hooks run for the wrapper instead.

        Args:
            carry: The live carry.
            holders: Objects whose attributes a restructuring step may replace.
            user_code: Whether more than the base's own step runs inside (its hooks are noticed anyway). Only then is
                everything captured first, which costs a copy of parameters and state.
        """
        with hooks_disabled(self.base, own=False):
            if not user_code and not any(_own_hooks(self.base)):
                yield
                return
            parameters = parameters_of(self.base)
            grads = [parameter.grad for parameter in parameters]
            self._before.capture(extra=carry, holders=holders)
            try:
                yield
            except BaseException:
                self._before.restore()
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
                raise
            finally:
                # Restructuring steps are rare, and change shapes: their backups cannot be reused.
                self._before.release(backups=bool(holders))


@contextmanager
def hooks_disabled(base: Optimizer, *, own: bool) -> Iterator[None]:
    """Disables torch's global step hooks inside the block, and with `own` the base's too."""
    registries: list[OrderedDict[Any, Any] | dict[Any, Any]] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    registries += _own_hooks(base) if own else []
    saved = [list(registry.items()) for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, items in zip(registries, saved, strict=True):
            registry.clear()
            registry.update(items)


def _own_hooks(base: Optimizer) -> list[OrderedDict[Any, Any]]:
    """Returns the step hooks of an optimizer and of those that it drives."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    # Not every subclass calls Optimizer.__init__.
    return [
        getattr(optimizer, name)
        for optimizer in _with_nested(base)
        for name in names
        if hasattr(optimizer, name)
    ]


def _with_nested(base: Optimizer) -> list[Optimizer]:
    """Returns an optimizer and those that it drives (a joined list, Lookahead's inner one)."""
    found = [base]
    for value in vars(base).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Optimizer):
                found += _with_nested(item)
    return found
