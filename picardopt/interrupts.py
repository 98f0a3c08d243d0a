"""Delays signals while parameters or state differ from those last committed.

Speculation overwrites the live parameters and steps the base ahead of time. Ctrl-C, or a cluster's SIGTERM, must not
interrupt the code that restores them. Signal handlers are therefore delayed for a whole call of ``step``, except where
it spends its time with nothing half done: inside the user's closure and while it waits for other ranks. Only handlers
written in Python are delayed; a signal without a handler ends the process at once, as always.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

Handler = Callable[[int, FrameType | None], Any]

_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


class _Gate:
    """The state of signal handling: whether handlers may run now, and the signals that wait."""

    handlers: ClassVar[dict[int, Handler]] = {}  # the handlers that were installed before ours
    active = False
    open = True
    waiting: ClassVar[dict[int, FrameType | None]] = {}
    raised: BaseException | None = None


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Delays signals to the end of the block, except inside `interrupts_allowed`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _Gate.active:  # a step within a step's closure
        was_open, _Gate.open = _Gate.open, False
        try:
            yield
        finally:
            _Gate.open = was_open
        return
    handlers = _present_handlers()
    try:
        _Gate.handlers, _Gate.active, _Gate.open = handlers, True, False
        for number in handlers:
            signal.signal(number, _hold)
        yield
    finally:
        try:
            # From here on our handlers call the earlier ones at once, so that one left installed does no harm.
            _Gate.active, _Gate.open = False, True
            _put_back(handlers)
        finally:
            try:
                _put_back(handlers)  # again: a signal may have interrupted it
            finally:
                _deliver_waiting()
                _Gate.raised = None


@contextmanager
def interrupts_allowed() -> Iterator[None]:
    """Lets signals through inside the block, where they leave nothing half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_open = _Gate.open
    try:
        _Gate.open = True
        _deliver_waiting()
        yield
    finally:
        _Gate.open = was_open


def raised_by_signal(error: BaseException) -> bool:
    """Returns whether a signal's handler raised this error: it is then meant for the whole program."""
    return error is _Gate.raised


def _present_handlers() -> dict[int, Handler]:
    """Returns the handlers written in Python; where one of ours is still installed, the one that it replaced."""
    handlers = {}
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        handler = _Gate.handlers[number] if handler is _hold else handler
        if callable(handler):
            handlers[number] = handler
    return handlers


def _put_back(handlers: dict[int, Handler]) -> None:
    """Installs the earlier handlers, but where the closure has installed one of its own."""
    for number, handler in handlers.items():
        if signal.getsignal(number) is _hold:
            signal.signal(number, handler)


def _hold(number: int, frame: FrameType | None) -> None:
    if _Gate.open:
        _deliver(number, frame)
    else:
        _Gate.waiting[number] = frame


def _deliver(number: int, frame: FrameType | None) -> None:
    try:
        _Gate.handlers[number](number, frame)
    except BaseException as error:
        _Gate.raised = error
        raise


def _deliver_waiting() -> None:
    """Calls the handlers of all waiting signals, even if one of them raises."""
    if _Gate.waiting:
        number = next(iter(_Gate.waiting))
        frame = _Gate.waiting.pop(number)
        try:
            _deliver(number, frame)
        finally:
            _deliver_waiting()
