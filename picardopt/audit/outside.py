"""Refuses that another optimizer steps on a gradient that a closure left outside its own optimizer's parameters.

A closure's backward reaches a discriminator's parameters too, or a loss weight's. As the closure runs ahead, what it
leaves there belongs to whatever step was evaluated last. That does no harm if the other optimizer clears it first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from picardopt.errors import ImpureClosureError

_left = WeakTensorKeyDictionary()
"""The gradients that closures left, with their numbers of writes: one that was cleared in place is another one."""


class OutsideGradients:
    """Marks the gradients that closures leave on parameters that are not their optimizer's."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()
        self._hooked = False

    def finding(
        self,
        call: Callable[[int], Any],
        own: Iterable[Tensor],
        modules: Iterable[torch.nn.Module],
    ) -> Callable[[int], Any]:
        """Returns the closure, with a search for such parameters after it: in the graph of its loss and in modules.

        Args:
            call: The closure as a function of the step.
            own: The optimizer's parameters.
            modules: Those that ran.
        """
        ids = {id(parameter) for parameter in own}

        def and_find(step: int) -> Any:
            returned = call(step)
            for leaf in (*_leaves(returned), *(p for m in modules for p in m.parameters())):
                if id(leaf) not in ids and leaf.grad is not None:
                    self._known[leaf] = None
            return returned

        return and_find

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Marks what the closures that run inside the block leave."""
        before = WeakTensorKeyDictionary({grad: grad._version for grad in self._present()})
        try:
            yield
        finally:
            for grad in self._present():
                if before.get(grad) != grad._version:
                    _left[grad] = grad._version
                    self._hook()

    def _hook(self) -> None:
        """Lets every optimizer's step ask, for as long as this object lives."""
        if not self._hooked:
            self._hooked = True
            weakref.finalize(self, register_optimizer_step_pre_hook(_refuse).remove)

    def _present(self) -> list[Tensor]:
        return [leaf.grad for leaf in self._known if leaf.grad is not None]


def _leaves(tree: Any) -> Iterator[Tensor]:
    """Yields the leaves of the graph of every tensor in a tree."""
    nodes: list[Any] = [leaf.grad_fn for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def _refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Runs before every step of every optimizer; one that is given a closure makes gradients of its own."""
    if not _left or any(callable(value) for value in (*args[1:], *kwargs.values())):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        grad = parameter.grad
        if grad is not None and grad in _left and _left[grad] == grad._version:
            raise ImpureClosureError(
                f"{type(optimizer).__name__}.step(): parameter {index} of shape {tuple(parameter.shape)} has the "
                "gradient that the closure of a ParallelPicardOptimizer left there. That closure is evaluated ahead of "
                "time, so this gradient may belong to another step. Give both optimizers to one wrapper, "
                "ParallelPicardOptimizer([a, b], ...); or call this one's zero_grad() and a backward() of its own "
                "after the wrapper's step"
            )
