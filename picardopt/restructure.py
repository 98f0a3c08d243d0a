"""Steps that change the number of parameters: densify, prune.

A window cannot guess the result of such a step, so by default it ends there, which is exact. The paper's window runs
across it: iterates and drifts of the old structure are remapped through the parents' indices and kept where the new
iterate lies within tolerance of the remapped earlier one (supplement C: ``||theta - unproj(theta)||^2``).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from picardopt.closure import captured_by
from picardopt.drift import Accepted, map_tensors
from picardopt.layout import ParameterLayout, Row
from picardopt.snapshot import LEAVES
from picardopt.window import Window

_CONTAINERS = (nn.Module, dict, list, tuple)
_DEPTH = 5
"""Objects, each reached from the one before, that are looked at."""


@dataclass(frozen=True)
class Restructure:
    """Changes the number of parameters after certain steps (densify, prune).

    The sequential run is ``closure(t); base.step(); if due(t): function(t)``, all under step t's randomness. The
    function works on the live objects as Gaussian-splatting codebases do: it replaces parameters in the optimizer's
    groups, re-keys its state and resizes statistics. It is only ever called for steps that are committed.

    Attributes:
        function: Called with the step. Returns the parents: for each new row (dimension 0) of the tensors that it
            changed, the index of the old row that it came from, int64 [rows]; or None to drop all guesses.
        due: Returns whether to call it after a step; must depend on the step alone.
        across: Whether windows run across such a step, as in the paper; at tolerance 0 they never do. Values that a
            closure returned for `Carry.update` before the step then take the parents' rows too: each of their tensors
            that has as many rows as the changed tensors had.
    """

    function: Callable[[int], Tensor | None]
    due: Callable[[int], bool]
    across: bool = False

    def __post_init__(self) -> None:
        for name in ("function", "due"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}={getattr(self, name)!r}: give a function of the step")


def holders_of(restructure: Restructure) -> list[object]:
    """Returns what the function may write into: itself, its object, what it captures, the globals that it names.

    What dicts, lists, tuples and dataclasses hold is among it too, and what plain objects hold of these and of
    modules.
    """
    found: dict[int, object] = {}
    level: dict[int, object] = {id(restructure.function): restructure.function}
    for _ in range(_DEPTH):
        found.update(level)
        inside = (item for value in level.values() for item in _inside(value))
        level = {id(item): item for item in inside if id(item) not in found}
    return list(found.values())


def steps_until_due(restructure: Restructure, step: int, limit: int) -> int:
    """Returns the number of steps from `step` to the next one that is due, at most `limit`."""
    for ahead in range(limit):
        if restructure.due(step + ahead):
            return ahead + 1
    return limit


def _inside(value: object) -> list[object]:
    """Returns what a function uses, or what an object, dict, list or tuple holds, for `holders_of`."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        return [*captured_by(value), *_named_globals(inspect.unwrap(value))]
    if isinstance(value, (*LEAVES, nn.Module)):
        return []
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return [item for item in items if isinstance(item, _CONTAINERS)]
    call = inspect.getattr_static(type(value), "__call__", None)
    called = [call] if inspect.isfunction(call) else []
    if is_dataclass(value):
        return [*called, *(getattr(value, item.name, None) for item in fields(value))]
    attributes = getattr(value, "__dict__", {}).values()
    return [*called, *(item for item in attributes if isinstance(item, _CONTAINERS))]


def _named_globals(function: types.FunctionType) -> Iterator[object]:
    """Yields the globals that a function's code names; of functions only those of the same module."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        for name in code.co_names:
            found = function.__globals__.get(name)
            if not inspect.isfunction(found) or (
                inspect.unwrap(found).__globals__ is function.__globals__
            ):
                yield found


def check_restructure(restructure: object) -> None:
    """Refuses anything but a `Restructure` or None.

    Raises:
        TypeError: If the argument is neither a `Restructure` nor None.
    """
    if not isinstance(restructure, Restructure | None):
        raise TypeError(
            f"restructure={restructure!r}: give picardopt.Restructure(function, due) or None"
        )


class Remap:
    """Turns rows of the old structure into rows of the new one: the paper's ``unproj``.

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
                "restructure's function did not return the parents: return an int64 tensor [rows], or None"
            )
        if (len(old.parameters), len(old.carry)) != (len(new.parameters), len(new.carry)):
            raise ValueError(
                "restructure's function returned parents but changed the number of tensors: return None, which "
                "drops all guesses"
            )
        rows, old_rows = len(parents), int(parents.max()) + 1 if len(parents) else 0
        if rows and int(parents.min()) < 0:
            raise ValueError(
                "restructure's function returned parents with a negative index: count the old rows from 0"
            )
        self._new, self._parents = new, parents.to(new.device)
        self._changed: set[int] = set()  # how many rows the tensors had that are not copied whole
        self._copied: list[bool] = []  # whether one is: its rows are the old ones, or it has none
        for index, (before, after) in enumerate(zip(old.shapes, new.shapes, strict=True)):
            kept = before == after and old.tensors[index] is new.tensors[index]
            by_row = before[1:] == after[1:] and after[:1] == (rows,) and before[0] >= old_rows
            if not by_row and before != after:
                raise ValueError(
                    f"restructure's parents ({rows} rows, up to {old_rows - 1}) do not lead from shape {tuple(before)} "
                    f"to {tuple(after)} of tensor {index}"
                )
            self._copied.append(kept or not by_row)
            if not self._copied[-1]:
                self._changed.add(before[0])

    @torch.no_grad()
    def __call__(self, row: Row) -> Row:
        """Returns a row of the new structure, filled with the values of each new row's parent."""
        out = self._new.row()
        sources: Sequence[Tensor] = [*row.tensors, *row.carry]
        targets = [*out.tensors, *out.carry]
        for target, source, copied in zip(targets, sources, self._copied, strict=True):
            target.copy_(source if copied else source[self._parents])
        return out

    def returned(self, value: Any) -> Any:
        """Returns a closure's return value with the parents' rows of its tensors that have a row for each old one."""
        if len(self._changed) != 1:
            return value
        (rows,) = self._changed
        return map_tensors(
            lambda t: t[self._parents.to(t.device)] if t.shape[:1] == (rows,) else t, value
        )


class Ahead(Protocol):
    """The queue and the window of one structure: a speculator."""

    layout: ParameterLayout
    window: Window
    queue: deque[Accepted]

    def drop(self) -> None:
        """Drops the queue."""
        ...


def remap_queue(old: Ahead, new: Ahead, parents: Tensor | None, *, returned: bool = False) -> None:
    """Moves the queued drifts across a step that changed the number of parameters.

    At tolerance 0 the queue is empty: the window ends at such a step, because gradients of the old parameters are not
    gradients of the new ones.

    Args:
        old: The old structure's, after that step.
        new: The new structure's.
        parents: The old row of each new one, int64 [rows]; None keeps nothing.
        returned: Whether what the closures returned is for a carry's update, so that its rows move too.

    Raises:
        ValueError: If the parents do not fit the tensors.
    """
    if parents is None:
        old.drop()
        return
    remap = Remap(old.layout, new.layout, parents)
    # Only the guesses of queued drifts: the others are better made anew, from the new parameters.
    new.window.rows = [remap(row) for row in old.window.rows[: max(1, len(old.queue))]]
    for kept in old.queue:
        drift = replace(kept.drift, row=remap(kept.drift.row), correction=None, strides={})
        if returned:
            drift = replace(drift, returned=remap.returned(drift.returned))
        new.queue.append(replace(kept, drift=drift, remapped=True))
