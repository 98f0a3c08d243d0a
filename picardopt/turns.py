"""Runs functions in threads of their own, one at a time, up to questions that the caller's thread answers.

Exactly one thread runs at any time: the caller hands its turn to a function, and waits until that asks or ends. So the
functions need no locks, and see each other's changes only between their turns.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from picardopt.interrupts import interrupts_allowed
from picardopt.thread_state import ThreadState

_TURN: ContextVar[Turn | None] = ContextVar("picardopt.turn", default=None)


class Aside(Protocol):
    """What a function has in places that all of them share, such as the live tensors."""

    def leave(self) -> None:
        """Puts it aside, before others run."""
        ...

    def kept(self, tree: Any) -> Any:
        """Returns a tree with copies of what lies in these places."""
        ...

    def enter(self) -> None:
        """Puts it back where it belongs."""
        ...


class Unwound(BaseException):
    """Raised in a function that is not to go on; no error of the program."""


class Turn:
    """A function in a thread of its own, which runs only while the caller waits for it.

    Args:
        function: The function.
        state: The settings that its thread begins with.

    Attributes:
        question: What it waits for, from `ask`; None while it runs.
        ended: Whether it has returned or raised.
        result: What it returned.
        error: What it raised.
    """

    def __init__(self, function: Callable[[], Any], state: ThreadState) -> None:
        self._function, self._state = function, state
        self.question: Any = None
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.aside: Aside | None = None
        self._cancelled = self._unwindable = False
        self._answer: Any = None
        self._refusal: BaseException | None = None
        self._go, self._back = threading.Lock(), threading.Lock()
        self._back.acquire()
        context = contextvars.copy_context()
        # A daemon, so that no thread keeps the program alive whatever happens here.
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)

    def proceed(self) -> None:
        """Lets the function run to its next question or to its end."""
        self.question = None
        if self._thread.ident is None:
            self._go.acquire()
            self._thread.start()
        else:
            self._go.release()
        with interrupts_allowed():
            self._back.acquire()
        if self.ended:
            self._thread.join()

    def answer(self, answer: Any = None, refusal: BaseException | None = None) -> None:
        """Gives the answer to the question, or an error for `ask` to raise; `proceed` then goes on."""
        self._answer, self._refusal = answer, refusal

    def ask(self, question: Any) -> Any:
        """Waits for an answer, in the function's own thread, while other threads run."""
        if self._cancelled:
            raise Unwound
        if self.aside is not None:
            self.aside.leave()
        torch.clear_autocast_cache()  # keyed by tensor, it would outlive the values
        try:
            self.question = question
            self._back.release()
            self._go.acquire()
        finally:
            torch.clear_autocast_cache()
            if self.aside is not None:
                self.aside.enter()
        if self._cancelled:
            raise Unwound
        answer, refusal, self._answer, self._refusal = self._answer, self._refusal, None, None
        if refusal is not None:
            raise refusal
        return answer

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Lets the caller's thread find, inside the block, what the function had when it asked."""
        if self.aside is None:
            yield
            return
        self.aside.enter()
        try:
            yield
        finally:
            self.aside.leave()

    def cancel(self) -> None:
        """Ends the function wherever it is, by raising `Unwound` there, and waits for its end."""
        self._cancelled = True
        if self._thread.ident is not None:
            if self.question is None and self._unwindable:  # a signal ended the caller's wait
                target, error = ctypes.c_ulong(self._thread.ident), ctypes.py_object(Unwound)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, error)
            if self._go.locked():
                self._go.release()
            self._thread.join()
        self.ended = True
        self.result = self.error = None  # their frames hold the activations

    def _run(self) -> None:
        try:
            self._unwindable = True
            _TURN.set(self)
            torch.get_num_threads()  # gives this thread the number that was set for the process
            with self._state.applied():
                self.result = self._function()
        except BaseException as error:
            self.error = error
        try:
            self._unwindable = False
            _nothing()  # an error raised in this thread from outside arrives at the next call at the latest
        except Unwound:
            pass
        self.ended = True
        if self._back.locked():  # a caller whose wait was ended by a signal has not taken it
            self._back.release()


def _nothing() -> None:
    pass


@contextmanager
def turns(functions: Sequence[Callable[[], Any]]) -> Iterator[list[Turn]]:
    """Gives each function a thread, with the settings of the caller's; all of them have ended after the block."""
    state = ThreadState.capture()
    found = [Turn(function, state) for function in functions]
    try:
        yield found
    finally:
        # One that still runs ends first: two never run at once.
        for turn in sorted(found, key=lambda turn: turn.question is not None):
            turn.cancel()


def present_turn() -> Turn | None:
    """Returns the turn of the calling thread's function; None outside of one."""
    return _TURN.get()


@contextmanager
def put_aside_by(aside: Aside) -> Iterator[None]:
    """Lets questions inside the block put something aside while they wait.

    A block within such a block asks no questions: the outer one knows nothing of what is to be put aside there.
    """
    turn = _TURN.get()
    if turn is None:
        yield
    elif turn.aside is not None:
        token = _TURN.set(None)
        try:
            yield
        finally:
            _TURN.reset(token)
    else:
        turn.aside = aside
        try:
            yield
        finally:
            turn.aside = None
