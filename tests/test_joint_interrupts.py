"""Interruptions of joined calls leave no thread and no half-done step."""

import os
import signal
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from picardopt import batched
from picardopt.rng import RngState
from picardopt.turns import Unwound, turns
from tests.helpers.joint_loop import Loop, nothing
from tests.helpers.shared import target
from tests.test_interrupts import Interrupter

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class Stop(BaseException):
    """Meant for the whole program, like SystemExit."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Stop])
@pytest.mark.parametrize("where", ["before", "after", "function"])
@pytest.mark.parametrize("slot", [0, 2])
def test_an_interruption_leaves_everything_at_the_last_commit(
    kind: type[BaseException], where: str, slot: int
) -> None:
    armed: list[bool] = []

    def score(x: Tensor, level: Tensor) -> Tensor:
        if armed and where == "function":
            raise kind
        return target(x, level)

    loop, undisturbed = Loop(nothing, score=batched(score)), Loop(nothing)
    loop.steps(9)
    head = loop.run_out()
    undisturbed.steps(head)
    state, generators = loop.state(), RngState.capture()

    def stop(step: int, at: str) -> None:
        if armed and at == where and step == head + slot:
            raise kind

    loop.extra = stop
    armed.append(True)
    with pytest.raises(kind):
        loop.steps(1)
    armed.clear()
    assert RngState.capture().same(generators)
    assert loop.optimizer.step_index == head
    assert all(torch.equal(a, b) for a, b in zip(loop.state(), state, strict=True))
    loop.steps(6)
    undisturbed.steps(6)
    assert all(torch.equal(a, b) for a, b in zip(loop.state(), undisturbed.state(), strict=True))


@pytest.mark.parametrize("where", ["before", "after", "function"])
def test_ctrl_c_reaches_a_closure_on_its_thread_and_the_function(where: str) -> None:
    """The signal arrives at the main thread while a slot's closure runs on another one."""
    armed: list[bool] = []
    cleaned: list[str] = []
    key = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def wait() -> None:
        key.start()
        end = time.monotonic() + 120
        try:
            while time.monotonic() < end:
                time.sleep(0.01)
        finally:
            cleaned.append("up")

    def score(x: Tensor, level: Tensor) -> Tensor:
        if armed and where == "function":
            wait()
        return target(x, level)

    loop = Loop(nothing, score=batched(score))
    loop.steps(9)
    head = loop.run_out()
    state, generators = loop.state(), RngState.capture()
    assert loop.optimizer.stats.joined_calls > 0

    def stop(step: int, at: str) -> None:
        if armed and at == where and step == head + 1:
            wait()

    loop.extra = stop
    armed.append(True)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop.steps(1)
    assert time.monotonic() - start < 60
    key.join()
    assert cleaned == ["up"]
    armed.clear()
    assert RngState.capture().same(generators)
    assert all(torch.equal(a, b) for a, b in zip(loop.state(), state, strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    loop.steps(6)


def test_cancelled_functions_are_unwound_once_each() -> None:
    found: list[Any] = []

    def function(index: int) -> None:
        from picardopt.turns import present_turn

        turn = present_turn()
        assert turn is not None
        try:
            turn.ask(index)
        except Unwound:
            found.append(index)
            raise

    with (
        pytest.raises(ZeroDivisionError),
        turns([lambda i=i: function(i) for i in range(3)]) as all_turns,
    ):
        for turn in all_turns[:2]:
            turn.proceed()
        raise ZeroDivisionError
    assert found == [0, 1]
    assert all_turns[2].ended


@pytest.mark.parametrize("every", [211, pytest.param(29, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_line_of_a_joined_sweep(every: int) -> None:
    """In picardopt's own lines on the main thread and on the slots' threads."""
    undisturbed, states = Loop(nothing), {}
    for step in range(20):
        states[step] = undisturbed.state()
        undisturbed.steps(1)
    hit, at, threads = 0, 1, set(threading.enumerate())
    while True:
        loop = Loop(nothing)
        loop.steps(9)
        loop.run_out()
        generators = RngState.capture()
        interrupter = Interrupter(at)
        sys.settrace(interrupter)
        threading.settrace(interrupter)
        try:
            loop.steps(1)
        except KeyboardInterrupt:
            hit += 1
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        assert RngState.capture().same(generators), at
        step = loop.optimizer.step_index
        assert all(torch.equal(a, b) for a, b in zip(loop.state(), states[step], strict=True)), at
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not set(threading.enumerate()) - threads, at
        loop.steps(2)
        if interrupter.count < at:
            break
        at += every
    assert hit > 3
