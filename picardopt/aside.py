"""What a closure has in the live tensors, put aside while it waits for a shared call and other slots run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from picardopt.layout import ParameterLayout, Row
from picardopt.rng import RngState
from picardopt.rows import traverse


class LiveState:
    """The parameters, ``.grad``, the carry and the generators' states of one evaluation.

    The live tensors hold an evaluation's own values whenever it runs, also in its backward pass: what autograd saved of
    them is right then. Their version counters are put back with the values, so that autograd sees no write.

    Args:
        layout: The live tensors.
        guess: The parameters of this evaluation.
        out: Its row, which has room for the carry.
    """

    def __init__(self, layout: ParameterLayout, guess: Row, out: Row) -> None:
        self._layout, self._guess, self._out = layout, guess, out

    def leave(self) -> None:
        """Puts the state aside; the next evaluation finds no gradients."""
        layout = self._layout
        self._rng = RngState.capture()
        # One by one: before torch 2.7 it takes no more than one tensor.
        self._versions = [_unsafe_preserve_version_counter(tensor) for tensor in layout.tensors]
        self._grads = [parameter.grad for parameter in layout.parameters]
        for parameter in layout.parameters:
            parameter.grad = None
        if layout.carry:
            with torch.no_grad():
                torch._foreach_copy_(self._out.carry, layout.carry)

    def kept(self, tree: Any) -> Any:
        """Returns a tree with copies of the tensors that share memory with the live ones."""
        live = {storage_of(tensor) for tensor in self._layout.tensors} - {-1}
        with torch.no_grad():
            return traverse(lambda t: t.clone() if storage_of(t) in live else t, tree)

    def enter(self) -> None:
        """Puts the state back."""
        layout = self._layout
        with torch.no_grad():
            torch._foreach_copy_(layout.tensors, [*self._guess.tensors, *self._out.carry])
        for version in self._versions:
            version.__exit__(None, None, None)
        for parameter, grad in zip(layout.parameters, self._grads, strict=True):
            parameter.grad = grad
        self._grads = []
        self._rng.restore()


def storage_of(tensor: Tensor) -> int:
    """Returns where a tensor's memory begins; -1 if it has none of its own."""
    try:
        return int(tensor.untyped_storage().data_ptr()) or -1
    except (RuntimeError, NotImplementedError):  # sparse tensors, some subclasses
        return -1


@torch.no_grad()
def spoil(tensors: list[Tensor]) -> None:
    """Gives every number of the live tensors another finite value: what reads them now shows it.

    Finite, because a function may read a parameter and multiply it by 0.
    """
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.copy_(torch.where(tensor == 0, torch.ones_like(tensor), -2 * tensor))
