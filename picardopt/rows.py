"""Arguments and results of calls that several slots share, as rows along dim 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from picardopt.drift import replaced, map_tensors
from picardopt.errors import BatchedCallError


def traverse(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies a function to every tensor in nested tuples, lists, dicts and dataclasses; other objects stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    leaves, spec = tree_flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        if not is_dataclass(tree) or isinstance(tree, type):
            return tree
        names = [item.name for item in fields(tree) if hasattr(tree, item.name)]
        return replaced(tree, {name: traverse(function, getattr(tree, name)) for name in names})
    return tree_unflatten([traverse(function, leaf) for leaf in leaves], spec)


def shared_tensors(tree: Any) -> list[Tensor]:
    """Returns every tensor in nested tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    traverse(add, tree)
    return found


def count_rows(name: str, args: Any) -> int:
    """Returns the number of rows of a call.

    Args:
        name: What the function is called.
        args: Its positional arguments.

    Raises:
        BatchedCallError: If there are none, or different numbers of them.
    """
    lengths = sorted({len(tensor) for tensor in shared_tensors(args) if tensor.ndim})
    if len(lengths) != 1:
        raise BatchedCallError(
            f"{name} was called with tensors of {' and '.join(map(str, lengths)) or 'no'} rows: give every positional "
            "tensor one row for each of the batch along dim 0, and by keyword what all rows share"
        )
    return lengths[0]


def check_result(name: str, result: Any, rows: int) -> None:
    """Checks that a result has one row for each row of the arguments.

    Raises:
        BatchedCallError: If a tensor in it has another length along dim 0.
    """

    def check(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != rows:
            raise BatchedCallError(
                f"{name} returned a tensor of shape {tuple(tensor.shape)} for {rows} rows: return one row along dim 0 "
                "for each row of the arguments, and sum or average in the closure"
            )
        return tensor

    map_tensors(check, result)
