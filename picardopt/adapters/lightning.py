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
        own: The wrapped closure: automatic optimization's, the user's in manual optimization, or one that does nothing.
        automatic: Whether Lightning optimizes automatically: `own` must then run in this call.
    """

    call: Callable[[Callable[[], Any]], Any]
    own: Callable[..., Any]
    automatic: bool

    @property
    def does_nothing(self) -> bool:
        """Whether the user gave no closure in manual optimization."""
        return getattr(self.own, "__name__", "") == "do_nothing_closure"


def unwrap(closure: Callable[..., Any]) -> WrappedClosure | None:
    """Returns the parts of a closure that Lightning wrapped, or None for any other closure."""
    if not isinstance(closure, functools.partial) or len(closure.args) != 3:
        return None
    package = getattr(closure.func, "__module__", "").split(".")[0]
    name = getattr(closure.func, "__name__", "")
    if name != "_wrap_closure" or package not in ("lightning", "pytorch_lightning"):
        return None
    model, optimizer, own = closure.args
    call = functools.partial(closure.func, model, optimizer)
    return WrappedClosure(call, own, bool(model.automatic_optimization))
