"""Refuses a GradScaler that unscales inside a closure which is evaluated ahead of time.

A scaler unscales once between two calls of ``update()``: further evaluations would fail, and the scalers of several
ranks would each see another step's gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch.amp.grad_scaler import GradScaler, OptState

from picardopt.errors import ImpureClosureError

_TWICE = "unscale_() has already been called"  # torch's error at a second call before update()


def scalers_of(seen: Iterable[object]) -> list[GradScaler]:
    """Returns the scalers among what a closure can see (`picardopt.closure.seen_by`)."""
    # isinstance may run a proxy's own code
    found: list[Any] = [value for value in seen if issubclass(type(value), GradScaler)]
    return list({id(scaler): scaler for scaler in found}.values())


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
