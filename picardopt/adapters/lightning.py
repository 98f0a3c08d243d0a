"""Recognizes closures that Lightning's precision plugins have wrapped, and unwraps them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WrappedClosure:
    """A closure as Lightning passes it on: ``partial(plugin._wrap_closure, model, optimizer, own)``.

    Attributes:
        call: Runs Lightning's part around a function that takes the place of `own`.
        own: The closure of automatic optimization, the user's of manual optimization, or one that does nothing.
        automatic: Whether Lightning optimizes automatically: then `own` must run in the very call.
    """

    call: Callable[[Callable[[], Any]], Any]
    own: Callable[..., Any]
    automatic: bool

    @property
    def does_nothing(self) -> bool:
        """Whether the user gave no closure in manual optimization."""
        return getattr(self.own, "__name__", "") == "do_nothing_closure"


def unwrap(closure: Callable[..., Any]) -> WrappedClosure | None:
    """Returns Lightning's parts of a closure, or None if it is not Lightning's."""
    if not isinstance(closure, functools.partial) or len(closure.args) != 3:
        return None
    package = getattr(closure.func, "__module__", "").split(".")[0]
    name = getattr(closure.func, "__name__", "")
    if name != "_wrap_closure" or package not in ("lightning", "pytorch_lightning"):
        return None
    model, optimizer, own = closure.args
    call = functools.partial(closure.func, model, optimizer)
    return WrappedClosure(call, own, bool(model.automatic_optimization))
