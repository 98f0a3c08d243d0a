"""What running ahead takes in memory: the formula against what torch allocates, and the error where it ends."""

from __future__ import annotations

import subprocess
import sys
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import picardopt
from picardopt import DriftTolerance, ParallelPicardOptimizer, StepRelativeTolerance
from picardopt.memory import memory, size
from picardopt.state_size import state_bytes

NUMEL, TENSORS = 400_000, 20
COPY = 4 * NUMEL


class Loop:
    """A loop over some tensors; window 0 is the plain one."""

    def __init__(self, window: int, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (NUMEL // TENSORS,)
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(TENSORS)
        ]
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters, 1e-3)
        if window:
            self.optimizer = ParallelPicardOptimizer(self.optimizer, window=window, **options)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = torch.zeros(())
        for parameter in self.parameters:
            loss = loss + parameter.sum()
        loss.backward()
        return loss

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.closure)


def peak(window: int, **options: Any) -> int:
    """The most memory that torch allocates in a loop, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        Loop(window, **options).run(3 * max(1, window))
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    found = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(number for _, number in sorted(found)))


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("secants", [0, 8])
def test_the_formula_is_what_is_allocated(window: int, secants: int) -> None:
    """To within 10 %, with the plain loop's own."""
    options: dict[str, Any] = {"tolerance": DriftTolerance(), "secants": secants}
    plain, measured = peak(0), peak(window, **options)
    expected = memory(window, COPY, 2 * COPY, secants=secants).total
    assert plain + expected == pytest.approx(measured, rel=0.1)


def test_the_formula_at_tolerance_0() -> None:
    """No pair and no secants."""
    measured = peak(4, tolerance=0)
    assert peak(0) + memory(4, COPY, 2 * COPY, exact=True).total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("steps", [0, 3])
def test_what_an_optimizer_needs_is_known_before_its_first_step(steps: int) -> None:
    loop = Loop(8)
    loop.run(steps)
    assert isinstance(loop.optimizer, ParallelPicardOptimizer)
    found = picardopt.needed_memory(loop.optimizer)
    assert found.iterates == pytest.approx(17 * COPY, rel=1e-3)
    assert found.secants == pytest.approx(16 * COPY, rel=1e-3)
    assert found.snapshot == pytest.approx(2 * COPY, rel=1e-3)
    assert picardopt.needed_memory(loop.optimizer, 1).total == pytest.approx(5 * COPY, rel=1e-3)
    assert not loop.optimizer.state or steps


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Adam", {}),
        ("Adam", {"amsgrad": True}),
        ("Adam", {"fused": True}),
        ("SGD", {"momentum": 0.9}),
        ("SGD", {}),
        ("RMSprop", {}),
        ("Adagrad", {}),
        ("NAdam", {}),
    ],
)
def test_the_size_of_a_state(kind: str, options: dict[str, Any]) -> None:
    """Before the first step as after it; and nothing of the optimizer changes."""
    parameters = [nn.Parameter(torch.randn(50, 3)), nn.Parameter(torch.randn(7))]
    base = getattr(torch.optim, kind)(parameters, lr=0.1, **options)
    called: list[int] = []
    base.register_step_post_hook(lambda *_: called.append(1))
    before, untouched = state_bytes(base), [p.detach().clone() for p in parameters]
    assert not called
    assert all(map(torch.equal, parameters, untouched))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    base.step()
    assert before == state_bytes(base)


def test_a_state_that_cannot_be_known() -> None:
    """One of another package's, or one that takes a closure: None until there is one."""

    class Own(torch.optim.SGD):
        pass

    parameter = nn.Parameter(torch.randn(3))
    assert state_bytes(Own([parameter], lr=0.1, momentum=0.9)) is None
    assert state_bytes(torch.optim.LBFGS([parameter])) is None


@given(st.integers(1, 64), st.integers(1, 10**9), st.integers(0, 10**9), st.integers(0, 16))
def test_more_takes_more(window: int, row: int, state: int, secants: int) -> None:
    found = memory(window, row, state, secants=secants)
    assert found.total < memory(window + 1, row, state, secants=secants).total
    assert found.total >= memory(window, row, state, exact=True).total
    assert size(found.total) in str(found)


class Fails:
    """An allocator that has room for so many rows; what it lacks it asks of the real one, which cannot have it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.left, zeros = room, torch.zeros

        def allocate(*shape: Any, **options: Any) -> Tensor:
            if shape == (self.row_bytes,) and options.get("dtype") is torch.uint8:
                self.left -= 1
                if self.left < 0:
                    return zeros(1 << 60, dtype=torch.uint8)
            return zeros(*shape, **options)

        self.row_bytes = -1
        monkeypatch.setattr(torch, "zeros", allocate)


def test_where_memory_ends_the_error_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run goes on bitwise once there is memory again."""
    loop, plain = Loop(8, tolerance=0, seed=3), Loop(1, tolerance=0, seed=3)
    optimizer = loop.optimizer
    assert isinstance(optimizer, ParallelPicardOptimizer)
    limited = Fails(monkeypatch, 12)
    limited.row_bytes = optimizer._ready().layout.row_bytes
    before = [p.detach().clone() for p in loop.parameters]
    with pytest.raises(picardopt.WindowMemoryError) as caught:
        optimizer.step(loop.closure)
    text = str(caught.value)
    assert "no memory for 1.6 MB of one iterate or drift on cpu" in text
    assert f"a window of 8 takes {picardopt.needed_memory(optimizer)}" in text
    assert "window=4 takes" in text
    assert "allocate" in str(caught.value.__cause__)
    assert all(map(torch.equal, loop.parameters, before))
    assert optimizer.stats.steps == 0
    limited.left = 1000
    loop.run(20)
    plain.run(20)
    assert all(map(torch.equal, loop.parameters, plain.parameters))


def test_without_secants_it_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so."""
    loop = Loop(4, tolerance=DriftTolerance())
    assert isinstance(loop.optimizer, ParallelPicardOptimizer)
    Fails(monkeypatch, 8).row_bytes = loop.optimizer._ready().layout.row_bytes
    needed = picardopt.needed_memory(loop.optimizer)
    with pytest.raises(picardopt.WindowMemoryError, match="secants=0 takes") as caught:
        loop.optimizer.step(loop.closure)
    assert size(needed.total - needed.secants) in str(caught.value)


def test_a_closure_without_memory_raises_its_own_error() -> None:
    loop = Loop(4, tolerance=StepRelativeTolerance())

    def closure() -> Tensor:
        return torch.zeros(1 << 60)

    with pytest.raises(RuntimeError, match="allocate") as caught:
        loop.optimizer.step(closure)
    assert not isinstance(caught.value, picardopt.PicardError)


LIMITED = """
import resource, torch, picardopt
x = torch.nn.Parameter(torch.zeros(25_000_000))  # 100 MB
optimizer = picardopt.ParallelPicardOptimizer(torch.optim.SGD([x], lr=0.1), window=64, tolerance=0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_500_000_000,) * 2)
def closure():
    x.grad = None
    x.sum().backward()
try:
    optimizer.step(closure)
except picardopt.WindowMemoryError as error:
    print(error)
"""


def test_a_process_that_may_have_no_more_memory() -> None:
    """What the system refuses, not a stand-in."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120
    )
    assert "no memory for 100 MB of one iterate or drift on cpu" in done.stdout, done.stderr
    assert "a window of 64 takes 19.5 GB (iterates 12.9 GB, drifts 6.4 GB" in done.stdout
    assert "window=32 takes 9.9 GB" in done.stdout
