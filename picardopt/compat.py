"""What older versions of torch and Python lack, each with the version that makes it unnecessary.

The package runs on torch 2.4 and later and on Python 3.10 and later. Nothing else looks at a version.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = [
    "accelerator",
    "accelerator_module",
    "add_note",
    "broadcast",
    "counted_step",
    "gives_in_order",
    "irecv",
    "isend",
    "select_accelerator",
]


class _Note(Exception):
    """A note to an error, shown with it as its cause."""


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an error, as ``error.add_note`` does from Python 3.11 on.

    Before, tracebacks print no notes: the note is also the cause of the error, or of its first cause.
    """
    if sys.version_info >= (3, 11):
        error.add_note(note)
        return
    vars(error).setdefault("__notes__", []).append(note)
    first, seen = error, {id(error)}
    while first.__cause__ is not None and id(first.__cause__) not in seen:
        first = first.__cause__
        seen.add(id(first))
    if first.__cause__ is None:
        first.__cause__ = _Note(note)


# torch.accelerator came with torch 2.6, its `set_device_index` with 2.7.


def accelerator() -> torch.device | None:
    """Returns the kind of accelerator that is available, or None."""
    if hasattr(torch, "accelerator"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        if module.is_available():
            return torch.device(kind)
    return None


def accelerator_module() -> Any | None:
    """Returns torch's module of the accelerator (``torch.cuda``, ...), or None if none is available."""
    device = accelerator()
    return None if device is None else torch.get_device_module(device)


def select_accelerator(index: int) -> None:
    """Makes one of several accelerators the current one."""
    if hasattr(torch, "accelerator") and hasattr(torch.accelerator, "set_device_index"):
        torch.accelerator.set_device_index(index)
    elif (module := accelerator_module()) is not None:
        module.set_device(index)


def gives_in_order(loader: DataLoader[Any]) -> bool:
    """Returns whether a loader's batches come in the sampler's order: its `in_order` came with torch 2.6."""
    return bool(getattr(loader, "in_order", True))


def counted_step(wrapper: Callable[..., Any]) -> Any:
    """Returns the function whose calls an LR scheduler's wrapper counts: its `__wrapped__` came after torch 2.4."""
    if hasattr(wrapper, "__wrapped__"):
        return wrapper.__wrapped__
    return inspect.getclosurevars(wrapper).nonlocals.get("func")


# Ranks of a group (`group_src`, `group_dst`) came with torch 2.6; before, they were ranks of the default group.
_GROUP_RANKS = "group_dst" in (dist.isend.__annotations__ if dist.is_available() else ())


def isend(tensor: Tensor, group: dist.ProcessGroup, peer: int, tag: int) -> Any:
    """Begins to send a tensor to a rank of a group."""
    if _GROUP_RANKS:
        return dist.isend(tensor, group=group, group_dst=peer, tag=tag)
    return dist.isend(tensor, dist.get_global_rank(group, peer), group=group, tag=tag)


def irecv(tensor: Tensor, group: dist.ProcessGroup, peer: int, tag: int) -> Any:
    """Begins to receive a tensor from a rank of a group."""
    if _GROUP_RANKS:
        return dist.irecv(tensor, group=group, group_src=peer, tag=tag)
    return dist.irecv(tensor, dist.get_global_rank(group, peer), group=group, tag=tag)


def broadcast(tensor: Tensor, group: dist.ProcessGroup, source: int) -> None:
    """Broadcasts a tensor from a rank of a group."""
    if _GROUP_RANKS:
        dist.broadcast(tensor, group=group, group_src=source)
    else:
        dist.broadcast(tensor, dist.get_global_rank(group, source), group=group)
