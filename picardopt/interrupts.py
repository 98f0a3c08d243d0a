"""Ctrl-C waits while parameters or state are not what was last committed.

Speculation lends the live parameters out and steps the base ahead of time; all of that is put back in blocks
that an interrupt must not cut. So Ctrl-C is held back for a whole call of ``step``, except where time is
spent and nothing is half done: inside the user's closure and while waiting for other ranks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class _Gate:
    """Whether an interrupt may pass, and the one that waits."""

    deliver: Handler | None = None  # the handler that was there before, while ours is installed
    open = False
    waiting: tuple[int, FrameType | None] | None = None


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, except inside `interrupts_allowed`."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    if _Gate.deliver is not None:  # a step within a step's closure
        was_open, _Gate.open = _Gate.open, False
        try:
            yield
        finally:
            _Gate.open = was_open
        return

    def hold(number: int, frame: FrameType | None) -> None:
        if _Gate.open:
            before(number, frame)
        else:
            _Gate.waiting = (number, frame)

    signal.signal(signal.SIGINT, hold)
    _Gate.deliver, _Gate.waiting = before, None
    try:
        yield
    finally:
        _Gate.deliver, _Gate.open = None, False
        signal.signal(signal.SIGINT, before)
        if _Gate.waiting is not None:
            before(*_Gate.waiting)


@contextmanager
def interrupts_allowed() -> Iterator[None]:
    """Lets Ctrl-C through where it leaves nothing half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_open, _Gate.open = _Gate.open, True
    try:
        if _Gate.deliver is not None and _Gate.waiting is not None:
            waiting, _Gate.waiting = _Gate.waiting, None
            _Gate.deliver(*waiting)
        yield
    finally:
        _Gate.open = was_open
