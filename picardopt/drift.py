"""One closure evaluation at given parameters under one step's randomness: the paper's ``s(theta, t)``."""

from __future__ import annotations

import enum
import inspect
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from picardopt.errors import NoGradientError
from picardopt.frameworks import wrapped_by_lightning
from picardopt.interrupts import interrupts_allowed, raised_by_signal
from picardopt.layout import ParameterLayout, Row
from picardopt.rng import RngState, preserved_rng, seed_all, step_seed

Closure = Callable[..., Any]


class Outcome(enum.IntEnum):
    """What came of an evaluation, from best to worst."""

    FINITE = 0
    NONFINITE = 1  # a NaN or an infinity in a gradient
    FAILED = 2  # the closure raised
    INTERRUPTED = (
        3  # KeyboardInterrupt, SystemExit, what a signal's handler raised: never held back
    )


@dataclass
class Drift:
    """Gradient and loss of one step's objective at one point.

    Attributes:
        step: The step whose randomness and data were used.
        row: The gradients, one per parameter; meaningless where `present` is False.
        present: Which parameters received a gradient (the others keep ``.grad = None``).
        loss: What the closure returned, its tensors detached copies.
        rng: The generators as the closure left them: the base's own step draws from there.
        outcome: Whether the drift can be used.
        error: What the closure raised, if it did.
        trace: That exception's formatted traceback.
    """

    step: int
    row: Row
    present: tuple[bool, ...] = ()
    loss: Any = None
    rng: RngState | None = None
    outcome: Outcome = Outcome.FINITE
    error: BaseException | None = None
    trace: str = field(default="", repr=False)


def call_closure(closure: Closure, step: int) -> Any:
    """Calls ``closure(step)`` if it has a required parameter of that name, else ``closure()``."""
    if wrapped_by_lightning(closure):
        *before, own = closure.args  # type: ignore[attr-defined]
        return closure.func(*before, partial(call_closure, own, step))  # type: ignore[attr-defined]
    parameter = _step_parameter(closure)
    if parameter is None:
        return closure()
    by_position = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    return closure(step) if by_position else closure(step=step)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies a function to a tensor, or to every tensor in nested tuples, lists and dicts."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def evaluate_drift(
    closure: Closure,
    layout: ParameterLayout,
    row: Row,
    step: int,
    seed: int,
    around: AbstractContextManager[None],
) -> Drift:
    """Evaluates one drift at the parameters' present values; never raises what the closure raises.

    Args:
        closure: The user's closure; it computes the loss and calls ``backward``.
        layout: The live tensors; the parameters' ``.grad`` is None before and after.
        row: Where the gradients are written, and the carry as the closure left it.
        step: Step index t.
        seed: The run's seed.
        around: Entered around the closure; what it raises counts as raised by the closure.

    Returns:
        The drift; `outcome` and `error` tell what went wrong.
    """
    drift, parameters = Drift(step, row), layout.parameters
    try:
        for parameter in parameters:
            parameter.grad = None
        with preserved_rng():
            seed_all(step_seed(seed, step))
            with torch.enable_grad(), around, interrupts_allowed():
                loss = call_closure(closure, step)
            drift.rng = RngState.capture()
        drift.loss = map_tensors(lambda tensor: tensor.detach().clone(), loss)
        _collect(drift, parameters)
        if layout.carry:
            torch._foreach_copy_(row.carry, layout.carry)
    except BaseException as error:
        own = isinstance(error, Exception) and not raised_by_signal(error)
        drift.outcome = Outcome.FAILED if own else Outcome.INTERRUPTED
        drift.error = error
        drift.trace = "".join(traceback.format_exception(error))
    finally:
        for parameter in parameters:
            parameter.grad = None
    return drift


def _collect(drift: Drift, parameters: Sequence[Tensor]) -> None:
    """Moves the parameters' gradients into the drift's row and looks for non-finite ones."""
    drift.present = tuple(p.grad is not None for p in parameters)
    if not any(drift.present):
        raise NoGradientError(
            f"the closure left no parameter with a gradient at step {drift.step}: call loss.backward() inside "
            "it, on a loss that depends on the optimizer's parameters (where backward has run already, call step() "
            "without a closure)"
        )
    targets, grads = [], []
    for target, parameter in zip(drift.row.tensors, parameters, strict=True):
        grad = parameter.grad
        if grad is None:
            target.zero_()
        elif grad.layout is not torch.strided:
            raise TypeError(
                f"a gradient of layout {grad.layout} at step {drift.step}: picardopt needs dense gradients "
                "(build embeddings with sparse=False)"
            )
        else:
            targets.append(target)
            grads.append(grad)
    with torch.no_grad():
        torch._foreach_copy_(targets, grads)
    if not is_finite(drift.row):
        drift.outcome = Outcome.NONFINITE


def is_finite(row: Row) -> bool:
    """Whether no element is NaN or infinite (one host sync)."""
    checks = [torch.isfinite(segment).all() for segment in row.segments]
    return bool(torch.stack(checks).all())


def set_gradients(parameters: Sequence[Tensor], drift: Drift) -> None:
    """Gives each parameter its own copy of the drift: some optimizers overwrite ``.grad``."""
    targets, sources = [], []
    for parameter, source, present in zip(
        parameters, drift.row.tensors, drift.present, strict=True
    ):
        if present:
            parameter.grad = torch.empty_like(parameter)
            targets.append(parameter.grad)
            sources.append(source)
        else:
            parameter.grad = None
    torch._foreach_copy_(targets, sources)


def _step_parameter(closure: Closure) -> inspect.Parameter | None:
    try:
        parameter = inspect.signature(closure).parameters.get("step")
    except (TypeError, ValueError):  # builtins without a signature
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if parameter is None or parameter.kind in variadic:
        return None
    return parameter if parameter.default is inspect.Parameter.empty else None
