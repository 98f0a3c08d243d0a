"""The carry: tensors besides parameters that a step reads and rewrites.

Examples are an occupancy grid, BatchNorm's statistics, a teacher's moving average. A slot evaluates with its guess of
the carry; the rollout and the commits apply the steps' changes in order, so that accepting seven steps applies seven
updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from picardopt.drift import Drift, map_tensors
from picardopt.layout import Row


@dataclass(frozen=True)
class Carry:
    """The tensors besides parameters that a step rewrites, and the way in which it does.

    Without `update` the closure writes into the tensors itself, and a step that was evaluated at a guess of them
    contributes its increment (after - before). With `update` the closure does not change them, and returns the data
    for the update; sequentially: ``returned = closure(step); base.step(); update(returned)``. The update runs without
    autograd. It may read the parameters, as they are after that step, and draw from the global generators.

    Attributes:
        tensors: The tensors, or a module for its buffers.
        update: Rewrites the tensors in place from the closure's return value (its tensors detached).
    """

    tensors: torch.nn.Module | Sequence[Tensor] = ()
    update: Callable[[Any], None] | None = None

    def present(self) -> list[Tensor]:
        """Returns the present tensors."""
        if isinstance(self.tensors, torch.nn.Module):
            return list(self.tensors.buffers())
        return list(self.tensors)


def as_carry(value: Carry | torch.nn.Module | Sequence[Tensor] | None) -> Carry:
    """Returns the `Carry` for the optimizer's `carry` argument."""
    if isinstance(value, Carry):
        return value
    return Carry() if value is None else Carry(value)


def check_carry(carry: Carry, parameters: Sequence[Tensor]) -> None:
    """Refuses tensors that cannot be carried.

    Raises:
        TypeError: If `tensors` is neither a module nor a sequence of tensors, or `update` cannot be called.
        ValueError: If a tensor is a parameter of the optimizer, requires a gradient, or is listed twice.
    """
    tensors, update = carry.tensors, carry.update
    if isinstance(tensors, Tensor) or not isinstance(tensors, torch.nn.Module | Sequence):
        raise TypeError(
            f"carry={type(tensors).__name__}: give a module (its buffers are carried), a list of tensors, "
            "or picardopt.Carry"
        )
    if update is not None and not callable(update):
        raise TypeError(
            f"carry has update={update!r}: give a function of the closure's return value"
        )
    seen = {id(p) for p in parameters}
    for index, tensor in enumerate(carry.present()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"carry[{index}]={tensor!r}: give a tensor")
        if tensor.requires_grad:
            raise ValueError(
                f"carry[{index}] requires a gradient, but the carry is not trained: give a detached tensor"
            )
        if id(tensor) in seen:
            raise ValueError(
                f"carry[{index}] is a parameter of the optimizer, or listed twice: leave it out"
            )
        seen.add(id(tensor))


@torch.no_grad()
def run_update(carry: Carry, returned: Any) -> None:
    """Calls the carry's update, if there is one, with a closure's return value, after a plain step."""
    if carry.update is not None:
        carry.update(map_tensors(Tensor.detach, returned))


@torch.no_grad()
def apply_carry(carry: Carry, live: Sequence[Tensor], guess: Row, drift: Drift) -> None:
    """Applies one step's change to the live carry, in place, after the base's step.

    Args:
        carry: Says how.
        live: The carry after the earlier steps.
        guess: The row at which the step was evaluated.
        drift: The step's drift; its row holds the carry after the closure.
    """
    if carry.update is None:
        add_changes(live, guess, drift.row)
        return
    carry.update(drift.returned)
    now = carry.present()
    if len(now) != len(live) or any(a is not b for a, b in zip(now, live, strict=True)):
        raise RuntimeError(
            "carry's update put other tensors in place of the carried ones: write into them (copy_, add_, ...)"
        )


@torch.no_grad()
def add_changes(live: Sequence[Tensor], guess: Row, after: Row) -> None:
    """Applies the change that a step made to its guess of the carry.

    Elements whose guess was right take the step's value, so that the result is bitwise the sequential one; the others
    receive the step's increment (booleans: its value where the step changed them, else they stay).

    Args:
        live: The carry after the earlier steps.
        guess: The row at which the step was evaluated.
        after: The step's drift row, with the carry after the closure.
    """
    for now, before, left in zip(live, guess.carry, after.carry, strict=True):
        if now.dtype == torch.bool:
            now.copy_(torch.where(left == before, now, left))
        else:
            now.copy_(torch.where(now == before, left, now + (left - before)))
