"""Arguments and results of calls that several slots share, as rows along dim 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from picardopt.drift import map_tensors, replaced
from picardopt.errors import BatchedCallError

NUMBERS = (int, float, complex)
"""What no result may hold."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def traverse(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies a function to every tensor in nested tuples, lists, dicts and dataclasses; other objects stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    leaves, spec = tree_flatten(tree)
    if len(leaves) != 1 or leaves[0] is not tree:
        return tree_unflatten([traverse(function, leaf) for leaf in leaves], spec)
    names = _field_names(tree)
    if names is None:
        return tree
    return replaced(tree, {name: traverse(function, getattr(tree, name)) for name in names})


def leaves(tree: Any) -> Iterator[Any]:
    """Yields what nested tuples, lists, dicts and dataclasses hold, in the order of `traverse`."""
    for leaf in tree_leaves(tree):
        names = _field_names(leaf)
        if names is None:
            yield leaf
        else:
            for name in names:
                yield from leaves(getattr(leaf, name))


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns every tensor in nested tuples, lists, dicts and dataclasses."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def count_rows(name: str, args: Any) -> int:
    """Returns the number of rows of a call.

    Args:
        name: What the function is called.
        args: Its positional arguments.

    Raises:
        BatchedCallError: If there are none, or different numbers of them.
    """
    lengths = sorted({len(tensor) for tensor in tensors_in(args) if tensor.ndim})
    if len(lengths) != 1:
        raise BatchedCallError(
            f"{name} was called with tensors of {' and '.join(map(str, lengths)) or 'no'} rows: give every positional "
            "tensor as many rows (dim 0), and pass what all rows share by keyword"
        )
    return lengths[0]


def check_result(name: str, result: Any, rows: int) -> None:
    """Checks that a result has one row for each row of the arguments.

    Raises:
        BatchedCallError: If a tensor in it has another length along dim 0, or there is a number in it.
    """
    if any(type(leaf) in NUMBERS for leaf in leaves(result)):
        raise BatchedCallError(
            f"{name} returned a number, which cannot be divided among the slots: return a tensor with one row for "
            "each row of the arguments"
        )

    def check(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != rows:
            raise BatchedCallError(
                f"{name} returned a tensor of shape {tuple(tensor.shape)} for {rows} rows: return one row along dim 0 "
                "for each row of the arguments, and sum or average in the closure"
            )
        return tensor

    map_tensors(check, result)


def describe(tree: Any, *, shared: bool) -> Any:
    """Returns what must be equal (``==``) between slots for their arguments to be joined.

    Args:
        tree: Arguments.
        shared: Whether tensors must be equal; else only their shapes beyond dim 0, dtypes and devices, but for tensors
            without dimensions.
    """
    if isinstance(tree, Tensor):
        if shared or not tree.ndim:
            return _Same(tree)
        return tree.shape[1:], tree.dtype, tree.device, tree.layout
    leaves, spec = tree_flatten(tree)
    if len(leaves) != 1 or leaves[0] is not tree:
        return spec, [describe(leaf, shared=shared) for leaf in leaves]
    names = _field_names(tree)
    if names is None:
        return _Same(tree)
    return type(tree), [(name, describe(getattr(tree, name), shared=shared)) for name in names]


def join(arguments: Sequence[Any]) -> Any:
    """Joins the positional arguments of several slots, which have equal descriptions, along dim 0."""
    columns = zip(*map(tensors_in, arguments), strict=True)

    def joined(tensor: Tensor) -> Tensor:
        column = next(columns)
        return torch.cat(column) if tensor.ndim else tensor

    return traverse(joined, arguments[0])


def split(result: Any, counts: Sequence[int]) -> list[Any]:
    """Returns each slot's rows of a result, in memory of their own.

    Args:
        result: A result that `check_result` passed.
        counts: Number of rows by slot.
    """
    found, start = [], 0
    for count in counts:
        end = start + count
        found.append(map_tensors(lambda t, a=start, b=end: t[a:b].clone(), result))  # type: ignore[misc]
        start = end
    return found


def distance(one: Any, other: Any) -> float:
    """Returns how far two results lie apart: the largest |x - y| / |y| of their tensors; infinity for other shapes."""
    pairs = list(zip(_result_tensors(one), _result_tensors(other), strict=False))
    found = 0.0
    for x, y in pairs:
        if x.shape != y.shape or x.dtype != y.dtype:
            return float("inf")
        if not x.numel() or torch.equal(x, y):
            continue
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            return float("inf")
        kind = torch.complex128 if x.is_complex() else torch.float64
        x, y = x[finite].to(kind), y[finite].to(kind)
        difference, length = float((x - y).norm()), float(y.norm())
        found = max(found, difference / length if length else float(difference > 0) * float("inf"))
    return found


def _result_tensors(result: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(add, result)
    return found


def _field_names(value: Any) -> list[str] | None:
    """Returns the names of a dataclass's fields; None for other objects."""
    if not is_dataclass(value) or isinstance(value, type):
        return None
    return [item.name for item in fields(value) if hasattr(value, item.name)]


@dataclass(eq=False)
class _Same:
    """A value that is equal to itself and, if it is a tensor or plain, to one with the same content."""

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        mine, others = self.value, other.value
        if mine is others:
            return True
        if isinstance(mine, Tensor) and isinstance(others, Tensor):
            kinds = [(t.dtype, t.device, t.layout, t.shape) for t in (mine, others)]
            return kinds[0] == kinds[1] and torch.equal(mine, others)
        return type(mine) is type(others) and isinstance(mine, _PLAIN) and bool(mine == others)

    __hash__ = None  # type: ignore[assignment]
