"""One closure evaluation at given parameters under one step's randomness: the paper's ``s(theta, t)``."""

from __future__ import annotations

import copy
import enum
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from picardopt.errors import NoGradientError
from picardopt.interrupts import interrupts_allowed, raised_by_signal
from picardopt.layout import ParameterLayout, Row
from picardopt.measures import Threshold
from picardopt.rng import RngState, seed_all, step_seed


class Outcome(enum.IntEnum):
    """The outcome of an evaluation, from best to worst."""

    FINITE = 0
    NONFINITE = 1  # a NaN or an infinity in a gradient
    FAILED = 2  # the closure raised
    INTERRUPTED = 3  # KeyboardInterrupt, SystemExit or an error of a signal handler: raised at once


class Calls(enum.IntEnum):
    """What an evaluation's calls of batched functions were (`picardopt.batched`)."""

    NONE = 0
    ALONE = 1  # made for this slot alone
    JOINED = 2  # made for several slots at once: the drift equals one evaluated alone to rounding


@dataclass
class Drift:
    """The gradient and the loss of one step at one point.

    Attributes:
        step: The step whose randomness and data were used.
        row: The gradients, one per parameter; meaningless where `present` is False.
        present: By parameter, whether it received a gradient (otherwise it keeps ``.grad = None``).
        returned: The closure's return value; its tensors are detached copies.
        rng: The generators' states after the closure: the base's step continues from them. None if it draws nothing.
        outcome: Whether the drift can be used.
        error: The closure's exception, if any.
        trace: The exception's formatted traceback.
        uncleared: Indices of the parameters whose ``.grad`` the closure does not clear; None if that was not tested.
        tainted: Whether the test may have changed the gradients or made the closure raise.
        calls: What its calls of batched functions were.
        strides: Those of the gradients that lie in memory otherwise than their parameters, by index: a sum over rows
            or a matrix product may round differently then.
        correction: The coefficients that the row was corrected with, by group (`picardopt.correction`).
    """

    step: int
    row: Row
    present: tuple[bool, ...] = ()
    returned: Any = None
    rng: RngState | None = None
    outcome: Outcome = Outcome.FINITE
    error: BaseException | None = None
    trace: str = field(default="", repr=False)
    uncleared: tuple[int, ...] | None = None
    tainted: bool = False
    calls: Calls = Calls.NONE
    strides: dict[int, tuple[int, ...]] = field(default_factory=dict)
    correction: list[Tensor] | None = field(default=None, repr=False)


EvaluateSlot = Callable[[int, Row], Drift]
"""Evaluates slot j of a window and writes the gradients into a row."""


@dataclass(frozen=True)
class Accepted:
    """A drift that a sweep accepted, waiting to be committed.

    Attributes:
        drift: The drift.
        sweep: The sweep it came from.
        slot: Its slot in that sweep's window; 0 is the head.
        threshold: What distance is accepted between its guess and the live parameters.
        remapped: Whether it was evaluated before the number of parameters changed, so that it cannot be repeated.
    """

    drift: Drift
    sweep: int
    slot: int
    threshold: Threshold = float("inf")
    remapped: bool = False


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies a function to every tensor in nested tuples, lists, dicts, dataclasses and plain objects.

    Objects that hold a tensor are copied; of plain ones (no dataclasses) only the attributes and the containers in them
    are searched.
    """

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, type | torch.nn.Module):
            return leaf
        if is_dataclass(leaf):
            names = [item.name for item in fields(leaf) if hasattr(leaf, item.name)]
            return replaced(
                leaf, {name: map_tensors(function, getattr(leaf, name)) for name in names}
            )
        attributes = getattr(leaf, "__dict__", None)
        if not isinstance(attributes, dict):
            return leaf
        held = any(isinstance(part, Tensor) for part in tree_leaves(list(attributes.values())))
        if not held:
            return leaf
        return replaced(
            leaf, {name: tree_map(shallow, value) for name, value in attributes.items()}
        )

    def shallow(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map(convert, tree)


def replaced(leaf: Any, values: dict[str, Any]) -> Any:
    """Returns the object itself if no attribute changes, else a copy with new attributes; frozen or not."""
    if all(getattr(leaf, name) is value for name, value in values.items()):
        return leaf
    twin = copy.copy(leaf)
    for name, value in values.items():
        object.__setattr__(twin, name, value)
    return twin


def evaluate_drift(
    call: Callable[[int], Any],
    layout: ParameterLayout,
    row: Row,
    step: int,
    seed: int,
    around: AbstractContextManager[None],
    *,
    test_clearing: bool = False,
    keep_rng: bool = True,
) -> Drift:
    """Evaluates one drift at the parameters' present values; records the closure's exceptions instead of raising them.

    It leaves the global generators as the closure did: see `preserved_rng`.

    Args:
        call: The user's closure as a function of the step; it computes the loss and calls ``backward``.
        layout: The live tensors; the parameters' ``.grad`` is None afterwards.
        row: Receives the gradients, and the carry as the closure left it.
        step: Step index t.
        seed: The run's seed.
        around: Entered around the closure; its exceptions count as the closure's.
        test_clearing: Whether to test that the closure clears ``.grad``, by putting NaN there first.
        keep_rng: Whether to note the generators' states for the base's step.

    Returns:
        The drift. If it is `tainted`, evaluate again without `test_clearing`: its gradients, outcome and error are
        not the closure's own.
    """
    drift, parameters = Drift(step, row), layout.parameters
    placed: list[Tensor | None] = [None] * len(parameters)
    try:
        if test_clearing:
            placed = [
                torch.full_like(p, torch.nan) if p.requires_grad else None for p in parameters
            ]
        for parameter, grad in zip(parameters, placed, strict=True):
            parameter.grad = grad
        seed_all(step_seed(seed, step))
        with torch.enable_grad(), around, interrupts_allowed():
            returned = call(step)
        drift.rng = RngState.capture() if keep_rng else None
        if test_clearing:
            drift.uncleared = _uncleared(parameters)
        drift.returned = map_tensors(lambda tensor: tensor.detach().clone(), returned)
        drift.tainted = bool(drift.uncleared) or _still_placed(parameters, placed)
        if not drift.tainted:
            _collect(drift, parameters)
        if layout.carry:
            torch._foreach_copy_(row.carry, layout.carry)
    except BaseException as error:
        failed = isinstance(error, Exception) and not raised_by_signal(error)
        drift.outcome = Outcome.FAILED if failed else Outcome.INTERRUPTED
        drift.error = error
        drift.trace = "".join(traceback.format_exception(error))
        drift.tainted = failed and _still_placed(parameters, placed)
    finally:
        for parameter in parameters:
            parameter.grad = None
    return drift


def _still_placed(parameters: Sequence[Tensor], placed: Sequence[Tensor | None]) -> bool:
    """Returns whether a test gradient is still in place: added to, zeroed, or not reached by a failed closure."""
    return any(
        grad is not None and parameter.grad is grad
        for parameter, grad in zip(parameters, placed, strict=True)
    )


def _uncleared(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Returns the indices of the parameters whose gradients are NaN after the test (one host sync)."""
    indices = [
        index
        for index, parameter in enumerate(parameters)
        if (grad := parameter.grad) is not None and grad.layout is torch.strided and grad.numel()
    ]
    if not indices:
        return ()
    flags = [torch.isnan(parameters[i].grad).all() for i in indices]  # type: ignore[arg-type]
    return tuple(i for i, flag in zip(indices, torch.stack(flags).tolist(), strict=True) if flag)


def _collect(drift: Drift, parameters: Sequence[Tensor]) -> None:
    """Copies the parameters' gradients into the drift's row and checks that they are finite."""
    drift.present = tuple(p.grad is not None for p in parameters)
    if not any(drift.present):
        raise NoGradientError(
            f"the closure left no parameter with a gradient at step {drift.step}: call loss.backward() inside "
            "it, on a loss that depends on the optimizer's parameters (if backward has run already, call step() "
            "without a closure)"
        )
    targets, grads = [], []
    for index, (target, parameter) in enumerate(zip(drift.row.tensors, parameters, strict=True)):
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
            if grad.stride() != parameter.stride() and _lies_otherwise(grad, parameter):
                drift.strides[index] = grad.stride()
    with torch.no_grad():
        torch._foreach_copy_(targets, grads)
    if not drift.row.is_finite():
        drift.outcome = Outcome.NONFINITE


def _lies_otherwise(grad: Tensor, parameter: Tensor) -> bool:
    """Returns whether a gradient without repetitions has other strides, where these matter."""
    both = zip(grad.stride(), parameter.stride(), grad.shape, strict=True)
    pairs = [(own, other) for own, other, length in both if length > 1]
    return any(own != other for own, other in pairs) and all(own for own, _ in pairs)


def set_gradients(parameters: Sequence[Tensor], drift: Drift) -> None:
    """Copies the drift into new tensors in the parameters' ``.grad``: some optimizers overwrite or keep them."""
    targets, sources = [], []
    rows = zip(parameters, drift.row.tensors, drift.present, strict=True)
    for index, (parameter, source, present) in enumerate(rows):
        if present:  # one by one, so that each takes the memory of the last one freed
            strides = drift.strides.get(index)
            if strides is None:
                parameter.grad = torch.empty_like(parameter)
            else:
                parameter.grad = parameter.new_empty_strided(parameter.shape, strides)
            targets.append(parameter.grad)
            sources.append(source)
        else:
            parameter.grad = None
    torch._foreach_copy_(targets, sources)
