"""Classifies the argument of ``step``: a closure that runs for any step, or the reason for a plain step."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from picardopt.adapters import lightning

Closure = Callable[..., Any]
_NO_CLOSURE = (
    "step() without a closure takes a plain step of the base optimizer: nothing runs ahead. Pass a closure that "
    "computes a step's loss and its gradients from that step's own batch: `batches = StepIndexedLoader(loader)`, then "
    "`def closure(step): batch = batches.batch(step); ...`"
)
_AUTOMATIC = (
    "Lightning's automatic optimization hands over one batch per call and runs its closure in that call, so "
    "plain steps of the base are taken: nothing runs ahead. Set self.automatic_optimization = False and call "
    "`self.optimizers().step(closure)` with a closure that takes its batch by step: `batches = "
    "StepIndexedLoader(loader)`, then `def closure(step): batch = batches.batch(step); ...`"
)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class StepClosure:
    """A closure that can be evaluated for any step.

    Attributes:
        call: Evaluates the closure for a step and returns its result.
        source: The user's own function, whose variables are inspected.
    """

    call: Callable[[int], Any] = field(repr=False)
    source: Closure

    @property
    def code(self) -> object:
        """The closure's code: the same object if a loop defines the closure anew at each step."""
        source = inspect.unwrap(self.source)
        while isinstance(source, functools.partial):
            source = source.func
        source = getattr(source, "__func__", source)
        return getattr(source, "__code__", None) or type(source)


@dataclass(frozen=True)
class Plain:
    """A call of ``step`` that takes a plain step of the base.

    Attributes:
        reason: The cause, with the remedy.
    """

    reason: str


def as_step_closure(closure: Closure | None) -> StepClosure | Plain:
    """Returns the argument of ``step`` as a function of the step, or the reason why that is impossible.

    Args:
        closure: The argument of ``step``.

    Raises:
        TypeError: If it is not callable, or has a required parameter with a name other than `step`.
    """
    if closure is None:
        return Plain(_NO_CLOSURE)
    if not callable(closure):
        raise TypeError(
            f"closure={closure!r}: give a function that computes a loss and its gradients"
        )
    wrapped = lightning.unwrap(closure)
    if wrapped is None:
        return StepClosure(_by_step(closure), closure)
    if wrapped.automatic:
        return Plain(_AUTOMATIC)
    if wrapped.does_nothing:
        return Plain(_NO_CLOSURE)
    own = _by_step(wrapped.own)
    return StepClosure(lambda step: wrapped.call(functools.partial(own, step)), wrapped.own)


def _by_step(closure: Closure) -> Callable[[int], Any]:
    """Returns the closure as a function of the step, which it receives if it has a parameter called `step`."""
    names = _plain_parameters(closure)
    if names == ():
        return lambda step: closure()
    if names == ("step",):
        return closure
    try:
        parameters = inspect.signature(closure).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return lambda step: closure()
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in _VARIADIC
        if required and name != "step":
            raise TypeError(
                f"closure has a required parameter {name!r}: the only one that it may have is the index of the step "
                "to evaluate, and it must be called `step` (def closure(step): ...)"
            )
    step_parameter = parameters.get("step")
    if step_parameter is None or step_parameter.kind in _VARIADIC or _is_bound(closure):
        return lambda step: closure()
    if step_parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        return closure
    return lambda step: closure(step=step)


def _plain_parameters(closure: Closure) -> tuple[str, ...] | None:
    """Returns the parameter names of a plain function or method; faster than `inspect.signature`."""
    function = getattr(closure, "__func__", closure)
    if type(function) is not types.FunctionType or vars(function):  # __wrapped__, __signature__
        return None
    code = function.__code__
    variadic = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    if variadic or code.co_kwonlyargcount:
        return None
    return code.co_varnames[function is not closure : code.co_argcount]


def _is_bound(closure: Closure) -> bool:
    """Returns whether the user bound `step` with functools.partial: that value then stays."""
    return isinstance(closure, functools.partial) and "step" in closure.keywords


def captured_by(function: object) -> list[object]:
    """Returns a function's captured objects: its `self`, bound arguments and closure variables."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), *captured_by(function.func)]
    if inspect.ismethod(function):
        return [function.__self__]
    if not inspect.isfunction(function):
        return []
    return list(inspect.getclosurevars(inspect.unwrap(function)).nonlocals.values())


def seen_by(closure: Closure) -> Iterator[Any]:
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
