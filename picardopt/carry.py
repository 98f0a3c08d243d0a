"""Carry: tensors besides parameters that a step reads and rewrites.

An occupancy grid, BatchNorm's statistics, a teacher's moving average. A slot evaluates with its guess of
the carry; the rollout and the commits apply the steps' changes in order, so that accepting seven steps
keeps seven updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from picardopt.drift import Drift
from picardopt.layout import Row


@dataclass(frozen=True)
class Carry:
    """What a step rewrites besides parameters, and how.

    Without `update` the closure writes into the tensors itself, and a step that was evaluated at a guess of them
    contributes its increment (after - before). With `update` the closure leaves them alone and returns what is
    needed; sequentially that is ``returned = closure(step); base.step(); update(returned)``. It may read the
    parameters, which are then the step's, and draw from the global generators.

    Attributes:
        tensors: The tensors, or a module, whose buffers are meant.
        update: Rewrites the tensors in place from what the closure returned (its tensors detached).
    """

    tensors: torch.nn.Module | Sequence[Tensor] = ()
    update: Callable[[Any], None] | None = None

    def present(self) -> list[Tensor]:
        """The tensors that are carried now."""
        if isinstance(self.tensors, torch.nn.Module):
            return list(self.tensors.buffers())
        return list(self.tensors)

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Refuses what cannot be carried.

        Raises:
            TypeError: If it is not a module or a sequence of tensors, or the update cannot be called.
            ValueError: If a tensor is a parameter of the optimizer, requires a gradient, or is listed twice.
        """
        if isinstance(self.tensors, Tensor) or not isinstance(
            self.tensors, torch.nn.Module | Sequence
        ):
            raise TypeError(
                f"carry={type(self.tensors).__name__}: give a module (its buffers are carried), a list of tensors, "
                "or picardopt.Carry"
            )
        if self.update is not None and not callable(self.update):
            raise TypeError(
                f"carry has update={self.update!r}: give a function of what the closure returns"
            )
        seen = {id(p) for p in parameters}
        for index, tensor in enumerate(self.present()):
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
    def apply(self, live: Sequence[Tensor], guess: Row, drift: Drift) -> None:
        """Applies one step's change to the carry's present values, in place, after the base's step.

        Args:
            live: The carry as the steps before left it.
            guess: The row that the step was evaluated at.
            drift: The step's drift: its row holds the carry as the closure left it.
        """
        if self.update is None:
            add_changes(live, guess, drift.row)
            return
        self.update(drift.returned)
        now = self.present()
        if len(now) != len(live) or any(a is not b for a, b in zip(now, live, strict=True)):
            raise RuntimeError(
                "carry's update put other tensors in place of the carried ones: write into them (copy_, add_, ...)"
            )


def as_carry(value: Carry | torch.nn.Module | Sequence[Tensor] | None) -> Carry:
    """Turns the optimizer's `carry` argument into a `Carry`."""
    if isinstance(value, Carry):
        return value
    return Carry() if value is None else Carry(value)


@torch.no_grad()
def add_changes(live: Sequence[Tensor], guess: Row, after: Row) -> None:
    """Adds what a step changed at its guess of the carry.

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
