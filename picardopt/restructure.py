"""Steps that change the number of parameters: densify, prune.

A window cannot guess what such a step does, so by default it ends there ("exact"). The paper's window runs across:
what was evaluated in the old structure is carried over through the parents' index map and kept where the new
iterate lies within tolerance of the unprojected earlier one (supplement C: ``||theta - unproj(theta)||^2``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt.layout import ParameterLayout, Row


@dataclass(frozen=True)
class Restructure:
    """When and how a step changes the number of parameters.

    The sequential run is ``closure(t); base.step(); if due(t): function(t)``, all under step t's randomness. The
    function works on the live objects as Gaussian-splatting codebases do: it replaces parameters in the optimizer's
    groups, re-keys its state and resizes statistics. It is only ever called for steps that are committed.

    Attributes:
        function: Called with the step. Returns the parents: for each new row (of dimension 0) of the tensors that it
            changed, the index of the old row that it stems from, int64 [rows]; or None to forget all guesses.
        due: Whether it is called after a step; must depend on the step alone.
        across: Whether windows run across such a step, as in the paper; at tolerance 0 they never do.
    """

    function: Callable[[int], Tensor | None]
    due: Callable[[int], bool]
    across: bool = False

    def __post_init__(self) -> None:
        for name in ("function", "due"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}={getattr(self, name)!r}: give a function of the step")

    def window(self, step: int, most: int) -> int:
        """How many steps there are from `step` up to and with the next one that is due, at most `most`."""
        for ahead in range(most):
            if self.due(step + ahead):
                return ahead + 1
        return most


def check_restructure(restructure: object) -> None:
    """Refuses what is no `Restructure`.

    Raises:
        TypeError: If it is neither a `Restructure` nor None.
    """
    if not isinstance(restructure, Restructure | None):
        raise TypeError(
            f"restructure={restructure!r}: give picardopt.Restructure(function, due) or None"
        )


class Unprojection:
    """Carries rows of the old structure over to the new one: the paper's ``unproj``.

    Args:
        old: Layout before.
        new: Layout after, with the same number of tensors in the same order.
        parents: The old row of each new row, int64 [rows].

    Raises:
        ValueError: If the parents do not fit the tensors.
    """

    def __init__(self, old: ParameterLayout, new: ParameterLayout, parents: Tensor) -> None:
        if not isinstance(parents, Tensor) or parents.dtype != torch.int64 or parents.ndim != 1:
            raise ValueError(
                "restructure's function returned something other than the parents: an int64 tensor [rows], or None"
            )
        if (len(old.parameters), len(old.carry)) != (len(new.parameters), len(new.carry)):
            raise ValueError(
                "restructure's function returned parents but changed the number of tensors: return None, which "
                "forgets all guesses"
            )
        rows, most = len(parents), int(parents.max()) + 1 if len(parents) else 0
        if rows and int(parents.min()) < 0:
            raise ValueError("restructure's parents hold a negative index")
        self._new, self._parents = new, parents.to(new.device)
        self._copied: list[bool] = []  # what is no list of rows, or has the rows that it had
        for index, (before, after) in enumerate(zip(old.shapes, new.shapes, strict=True)):
            kept = before == after and old.tensors[index] is new.tensors[index]
            by_row = before[1:] == after[1:] and after[:1] == (rows,) and before[0] >= most
            if not by_row and before != after:
                raise ValueError(
                    f"restructure's parents ({rows} rows, up to {most - 1}) do not lead from shape {tuple(before)} "
                    f"to {tuple(after)} of tensor {index}"
                )
            self._copied.append(kept or not by_row)

    @torch.no_grad()
    def __call__(self, row: Row) -> Row:
        """A row in the new structure with what each of its parameters' parents had."""
        out = self._new.row()
        sources: Sequence[Tensor] = [*row.tensors, *row.carry]
        targets = [*out.tensors, *out.carry]
        for target, source, copied in zip(targets, sources, self._copied, strict=True):
            target.copy_(source if copied else source[self._parents])
        return out
