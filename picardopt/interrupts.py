"""Signals wait while parameters or state are not what was last committed.

Speculation lends the live parameters out and steps the base ahead of time; all of that is put back in blocks
that Ctrl-C, or the SIGTERM of a cluster that wants its machine back, must not cut. So handlers are held back for a
whole call of ``step``, except where time is spent and nothing is half done: inside the user's closure and while
waiting for other ranks. What is held back is Python code; a signal without a handler ends the process at once, as ever.
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
    """Whether signals may pass, and those that wait."""

    handlers: ClassVar[dict[int, Handler]] = {}  # those that were there before ours
    active = False
    open = True
    waiting: ClassVar[dict[int, FrameType | None]] = {}
    raised: BaseException | None = None


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Holds signals back until the block is done, except inside `interrupts_allowed`."""
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
    handlers = _Gate.handlers = _present_handlers()
    _Gate.active, _Gate.open = True, False
    try:
        for number in handlers:
            signal.signal(number, _hold)
        yield
    finally:
        # From here on ours pass on what comes, so that it does no harm if a signal keeps one of them in place.
        _Gate.active, _Gate.open = False, True
        try:
            for number, handler in handlers.items():
                found = signal.signal(number, handler)
                if found is not _hold:  # the closure installed one of its own
                    signal.signal(number, found)
        finally:
            _deliver_waiting()
            _Gate.raised = None


@contextmanager
def interrupts_allowed() -> Iterator[None]:
    """Lets signals through where they leave nothing half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_open, _Gate.open = _Gate.open, True
    try:
        _deliver_waiting()
        yield
    finally:
        _Gate.open = was_open


def raised_by_signal(error: BaseException) -> bool:
    """Whether a signal's handler raised this: then it is meant for the program, not for one evaluation."""
    return error is _Gate.raised


def _present_handlers() -> dict[int, Handler]:
    """The handlers that are Python code, looked up behind ours where one was left in place."""
    handlers = {}
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        handler = _Gate.handlers[number] if handler is _hold else handler
        if callable(handler):
            handlers[number] = handler
    return handlers


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
    """Calls the handlers of all that waited, whatever the first ones raise."""
    if _Gate.waiting:
        number = next(iter(_Gate.waiting))
        frame = _Gate.waiting.pop(number)
        try:
            _deliver(number, frame)
        finally:
            _deliver_waiting()
