"""Lists the wrapped optimizers of this process: two that train each other's networks should be joined."""

from __future__ import annotations

import weakref

_LIVE: weakref.WeakSet[object] = weakref.WeakSet()


def register(wrapper: object) -> None:
    """Adds a wrapper, by a weak reference."""
    _LIVE.add(wrapper)


def advice(owner: int) -> str:
    """Returns the advice to add when the surroundings of a closure have changed; empty with a single wrapper.

    Args:
        owner: Id of the closure's wrapper.
    """
    if all(id(wrapper) == owner for wrapper in list(_LIVE)):
        return ""
    return (
        ". If another ParallelPicardOptimizer trains it, give both base optimizers to one wrapper, "
        "ParallelPicardOptimizer([a, b], ...), with one closure for the pair of steps"
    )
