"""Refuses a GradScaler that unscales inside a closure which is evaluated ahead of time.

A scaler unscales once between two calls of ``update()``: further evaluations would fail, and the scalers of several
ranks would each see another step's gradient.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch.amp.grad_scaler import GradScaler, OptState

from picardopt.errors import ImpureClosureError

_TWICE = "unscale_() has already been called"  # torch's error at a second call before update()


def scalers_of(closure: Callable[..., Any]) -> list[GradScaler]:
    """Returns the scalers that a closure can see."""
    # isinstance may run a proxy's own code
    found = [value for value in seen_by(closure) if issubclass(type(value), GradScaler)]
    return list({id(scaler): scaler for scaler in found}.values())


def seen_by(closure: Callable[..., Any]) -> Iterator[Any]:
    """Yields what a closure can see: its variables, the globals it names, and their attributes."""
    function = inspect.unwrap(getattr(closure, "func", closure))
    values = [getattr(function, "__self__", None)]
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        values += [*variables.nonlocals.values(), *variables.globals.values()]
    for value in values:
        kind = type(value)
        attributes = {} if kind is types.ModuleType else getattr(value, "__dict__", {})
        yield from (value, *attributes.values())


def refuse_unscaling(scalers: Collection[GradScaler], optimizers: Collection[int]) -> None:
    """Raises if a scaler has unscaled the gradients of one of our optimizers.

    Args:
        scalers: From `scalers_of`.
        optimizers: Ids of the wrapper and of its base.

    Raises:
        ImpureClosureError: With the remedies.
    """
    for scaler in scalers:
        for optimizer, state in scaler._per_optimizer_states.items():
            if optimizer in optimizers and state["stage"] is OptState.UNSCALED:
                raise _refusal()


def explain(error: BaseException) -> BaseException:
    """Returns picardopt's error for torch's at a second ``unscale_``; any other error unchanged."""
    if isinstance(error, RuntimeError) and _TWICE in str(error):
        return _refusal()
    return error


def _refusal() -> ImpureClosureError:
    return ImpureClosureError(
        "the closure called GradScaler.unscale_: a scaler takes one gradient a step, but a closure is evaluated "
        "for several steps ahead. Use bfloat16 autocast, which needs no scaler; or multiply the loss by a constant "
        'in the closure, divide the gradients by it after backward(), and pass nonfinite="skip"; or keep the '
        "scaler, run backward() in your loop and call scaler.step(optimizer): nothing runs ahead then"
    )
