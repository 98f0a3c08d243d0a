"""Carry: tensors besides parameters that a step reads and rewrites.

An occupancy grid, BatchNorm's statistics, a teacher's moving average. A slot evaluates with its guess of
the carry; the rollout and the commits apply the steps' changes in order, so that accepting seven steps
keeps seven updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt.layout import Row

Carry = torch.nn.Module | Sequence[Tensor] | None


def carried_tensors(carry: Carry) -> list[Tensor]:
    """The tensors that are carried now: a module's buffers, or the tensors themselves."""
    if carry is None:
        return []
    return list(carry.buffers()) if isinstance(carry, torch.nn.Module) else list(carry)


def check_carry(carry: Carry, parameters: Sequence[Tensor]) -> None:
    """Refuses what cannot be carried.

    Raises:
        TypeError: If it is not a module or a sequence of tensors.
        ValueError: If a tensor is a parameter of the optimizer, requires a gradient, or is listed twice.
    """
    if isinstance(carry, Tensor) or not isinstance(carry, torch.nn.Module | Sequence | None):
        raise TypeError(
            f"carry={type(carry).__name__}: give a module (its buffers are carried) or a list of tensors"
        )
    seen = {id(p) for p in parameters}
    for index, tensor in enumerate(carried_tensors(carry)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"carry[{index}]={tensor!r}: give tensors")
        if tensor.requires_grad:
            raise ValueError(
                f"carry[{index}] requires a gradient: carry is what no optimizer steps"
            )
        if id(tensor) in seen:
            raise ValueError(f"carry[{index}] is a parameter of the optimizer, or listed twice")
        seen.add(id(tensor))


@torch.no_grad()
def apply_change(live: Sequence[Tensor], guess: Row, after: Row) -> None:
    """Applies one step's change of the carry to its present values, in place.

    Elements whose guess was right become what the step left there, so that the result is bitwise the
    sequential one; the others receive the step's increment (booleans: its value).

    Args:
        live: The carry as the steps before left it.
        guess: The row that the step was evaluated at.
        after: The step's drift: its carry is what the step left behind.
    """
    for now, before, left in zip(live, guess.carry, after.carry, strict=True):
        if now.dtype == torch.bool:
            now.copy_(left)
        else:
            now.copy_(torch.where(now == before, left, now + (left - before)))
