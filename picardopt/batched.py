"""Calls that the slots of a sweep can share: `batched` marks a function whose rows are independent.

A rank that evaluates several slots one after the other calls an expensive function once for all of them: each slot's
closure runs up to the call, the arguments are joined along dim 0, and the closures go on with their rows of the result.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

import torch

from picardopt.errors import BatchedCallError
from picardopt.rng import RngState
from picardopt.rows import check_result, count_rows, describe, tensors_in
from picardopt.thread_state import ThreadState
from picardopt.turns import present_turn

P = ParamSpec("P")
R = TypeVar("R")


def batched(function: Callable[P, R]) -> Batched[P, R]:
    """Marks a function whose calls the slots of a sweep may share.

    The function must treat its rows independently, draw no random numbers and change nothing; no gradient flows through
    it. Positional arguments are rows: all their tensors, in nested tuples, lists, dicts and dataclasses, have the same
    length along dim 0, and tensors without dimensions are the same in every slot. Keyword arguments are the same in
    every slot. Slots whose arguments differ in more than their rows get separate calls. All tensors of the result
    have one row for each row of the arguments.

    Outside a sweep, and at tolerance 0, it is an ordinary call under ``torch.no_grad()``.

    Args:
        function: A function, a bound method or a callable module; also as a decorator, of methods too.

    Raises:
        TypeError: If it cannot be called.
    """
    if not callable(function):
        raise TypeError(f"function={function!r}: give a function of tensors")
    return function if isinstance(function, Batched) else Batched(function)


@dataclass(eq=False)
class Findings:
    """What was found out about a function by calling it for several slots at once.

    Attributes:
        checked: Whether its rows were compared with those of a slot alone.
        alone: Whether it is called for each slot, because the call for several raised.
        hinted: Whether the user was told why its calls are not joined.
    """

    checked: bool = False
    alone: bool = False
    hinted: bool = False


class Batched(Generic[P, R]):
    """A function marked by `batched`; its other attributes are the function's own.

    Attributes:
        made: Number of calls in this process.
        findings: What is known of the function.
        __wrapped__: The function.
    """

    made: ClassVar[int] = 0

    def __init__(self, function: Callable[P, R], findings: Findings | None = None) -> None:
        self.__wrapped__, self.findings = function, findings or Findings()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the function for this slot's rows, together with the other slots' where these wait for it.

        Raises:
            BatchedCallError: If a gradient would flow through the function, it draws random numbers or changes an
                argument, or its arguments or results are not rows.
        """
        refuse_gradients(self, args, kwargs)
        Batched.made += 1
        turn = present_turn()
        if turn is None:
            result: R = checked_call(self, args, kwargs)
        else:
            rows = count_rows(name_of(self), args)
            # Other slots' values overwrite the parameters, of which an argument may be a view.
            own, shared = (args, kwargs) if turn.aside is None else turn.aside.kept((args, kwargs))
            result = turn.ask(Question(self, own, shared, rows, ThreadState.capture()))
        return result

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Binds a decorated method, whose `self` is no argument."""
        if instance is None:
            return self
        return Batched(types.MethodType(self.__wrapped__, instance), self.findings)

    @property
    def key(self) -> tuple[int, ...]:
        """Two of the same key call the same function, of the same object."""
        function: Any = self.__wrapped__
        if isinstance(function, types.MethodType):
            return id(function.__func__), id(function.__self__)
        return (id(function),)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # not set yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        return f"batched({name_of(self)})"


@dataclass(eq=False)
class Question:
    """A call for which a slot waits.

    Attributes:
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        rows: Number of rows.
        state: The settings of the slot's thread.
    """

    function: Batched[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    state: ThreadState

    def rows_like(self) -> Any:
        """Returns what must be equal for two calls to be joined, besides the keyword arguments."""
        return self.function.key, self.state, describe(self.args, shared=False)


def name_of(function: Batched[..., Any]) -> str:
    """Returns what a function is called in errors."""
    inner: Any = function.__wrapped__
    while isinstance(inner, functools.partial):
        inner = inner.func
    return getattr(inner, "__qualname__", None) or type(inner).__qualname__


def checked_call(function: Batched[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls the function without autograd, and checks that it has the properties that sharing a call needs.

    Raises:
        BatchedCallError: If it draws random numbers or changes an argument, or its arguments or results are not rows.
        Exception: The function's own error.
    """
    name = name_of(function)
    rows = count_rows(name, args)
    tensors = [t for t in tensors_in((args, kwargs)) if not t.is_inference()]
    versions, before = [t._version for t in tensors], RngState.capture()
    with torch.no_grad():
        result = function.__wrapped__(*args, **kwargs)
    if not RngState.capture().same(before):
        before.restore()
        raise BatchedCallError(
            f"{name} drew random numbers: one call for several slots draws others than separate calls. Draw them "
            "in the closure and pass them as an argument"
        )
    if versions != [t._version for t in tensors]:
        raise BatchedCallError(
            f"{name} changed one of its arguments in place: other slots' calls may share it. Work on a copy"
        )
    check_result(name, result, rows)
    return result


def refuse_gradients(function: Batched[..., Any], args: Any, kwargs: Any) -> None:
    """Refuses arguments through which a gradient would flow.

    Raises:
        BatchedCallError: If a tensor among them requires a gradient, where gradients are recorded.
    """
    asked = any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
    if not (asked and torch.is_grad_enabled()):
        return
    for label, value in _labels(function, args, kwargs):
        if any(tensor.requires_grad for tensor in tensors_in(value)):
            raise BatchedCallError(
                f"{name_of(function)} is batched, but {label} requires a gradient, which would end there: no gradient "
                "flows through a batched function. Detach the argument, or let the function compute the gradient and "
                "return it"
            )


def _labels(function: Batched[..., Any], args: Any, kwargs: Any) -> list[tuple[str, Any]]:
    """Returns the arguments with what to call them."""
    try:
        names = list(inspect.signature(function.__wrapped__).parameters)
    except (TypeError, ValueError):  # builtins without a signature
        names = []
    found = [
        (f"argument {names[i]!r}" if i < len(names) else f"argument {i}", value)
        for i, value in enumerate(args)
    ]
    return found + [(f"argument {name!r}", value) for name, value in kwargs.items()]
