"""Knows the wrapped optimizers of this process: two that train each other's networks want to be one."""

from __future__ import annotations

import weakref

_LIVE: weakref.WeakSet[object] = weakref.WeakSet()


def register(wrapper: object) -> None:
    """Adds a wrapper; it is forgotten when it is freed."""
    _LIVE.add(wrapper)


def advice(owner: int) -> str:
    """Returns what to say besides when something that a closure sees has changed.

    Args:
        owner: Id of the wrapper whose closure it is.
    """
    if all(id(wrapper) == owner for wrapper in list(_LIVE)):
        return ""
    return (
        ". If it is a network that another ParallelPicardOptimizer trains, give both base optimizers to one, "
        "ParallelPicardOptimizer([a, b], ...), with one closure for the pair of steps"
    )
