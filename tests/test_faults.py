"""Faults on real processes: the right error on every rank within seconds, never a hang.

Jobs report instead of raising, so that a pool lives on where the wrapper says it does. Ranks that
die, stop or leave are in ``test_lost_ranks.py``.
"""

import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from picardopt import (
    NonFiniteGradientError,
    ParallelPicardOptimizer,
    RankMismatchError,
)
from tests.helpers.pool import Pool, Pools
from tests.helpers.runs import (
    SECONDS,
    Case,
    Trace,
    assert_same_trace,
    attempt,
    finish,
    make_closure,
    outside_streams,
    quiet,
    sequential,
    stats_of,
    wrap,
)
from tests.test_speculation import only_at_wrong_guesses, spoil

CASE = Case("network", "Adam", steps=14)


# --- The closure raises ---------------------------------------------------------------------------


class SpecialError(ValueError):
    """An exception with arguments of its own, which cannot be rebuilt from a message."""

    def __init__(self, step: int, *, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")


def failing_head(kind: str, bad: int, only_rank: int | None) -> tuple[dict[str, Any], Trace, Any]:
    """The closure fails at one step whenever it is evaluated (on one rank only, if given)."""
    problem, optimizer, _ = wrap(CASE)
    healthy = make_closure(problem, optimizer.zero_grad)

    def culprit(step: int) -> None:
        if kind == "special":
            raise SpecialError(step, reason="planted")
        if kind == "nan":
            spoil(problem, float("nan"))
        elif kind == "interrupt":
            raise KeyboardInterrupt
        elif kind == "preempted":
            signal.raise_signal(signal.SIGTERM)
        else:
            raise ZeroDivisionError("planted")

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        # Which rank evaluates a step is the engine's affair: an interrupt strikes from then on.
        struck = step >= bad if kind in ("interrupt", "preempted") else step == bad
        if struck and only_rank in (None, dist.get_rank()):
            culprit(step)
        return loss

    trace = Trace()
    before = outside_streams()
    report = attempt(trace, problem, optimizer, closure, CASE.steps)
    report["streams"] = all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(outside_streams(), before, strict=True)
    )
    committed = Trace()
    committed.record(torch.zeros(()), problem, optimizer)
    finish(problem, optimizer, healthy, trace, CASE.steps - report["committed"])
    return report, trace, committed


def assert_stood_at(committed: Trace, expected: Trace, step: int) -> None:
    """What a rank held right after the error is the last commit."""
    if step:
        assert all(
            torch.equal(a, b)
            for a, b in zip(committed.parameters[0], expected.parameters[step - 1], strict=True)
        )
        assert int(committed.states[0]["state"][0]["step"]) == step


@pytest.mark.parametrize(
    ("kind", "bad"),
    [("plain", 0), ("plain", 1), ("plain", 5), ("plain", 6), ("special", 0), ("special", 6)],
)
def test_a_closure_that_raises_at_the_head(pool: Pool, kind: str, bad: int) -> None:
    """The original traceback on every rank, parameters at the last commit, and on it goes."""
    expected = sequential(CASE)
    for report, trace, committed in pool.run(failing_head, kind, bad, None):
        assert report["committed"] == report["step_index"] == bad
        assert report["seconds"] < SECONDS
        assert report["streams"]
        name = {"plain": "ZeroDivisionError", "special": "SpecialError"}[kind]
        assert name in report["text"]
        assert "planted" in report["text"]
        assert "in culprit" in report["text"]  # the closure's own frame
        assert_stood_at(committed, expected, bad)
        assert_same_trace(trace, expected)


@pytest.mark.parametrize("bad", [0, 5])
def test_the_error_keeps_its_type_where_it_can(pools: Pools, bad: int) -> None:
    reports = [report for report, _, _ in pools(3).run(failing_head, "plain", bad, None)]
    assert {report["error"] for report in reports} == {"ZeroDivisionError"}


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_nan_at_the_head(pool: Pool, bad: int) -> None:
    expected = sequential(CASE)
    for report, trace, committed in pool.run(failing_head, "nan", bad, None):
        assert report["error"] == NonFiniteGradientError.__name__
        assert f"step {bad}" in report["message"]
        assert report["committed"] == report["step_index"] == bad
        assert report["seconds"] < SECONDS
        assert_stood_at(committed, expected, bad)
        assert_same_trace(trace, expected)


@pytest.mark.parametrize("kind", ["plain", "nan"])
@pytest.mark.parametrize("rank", [0, -1])
def test_a_fault_of_one_rank_only(pool: Pool, kind: str, rank: int) -> None:
    """The closure fails on one rank alone: all ranks do the same thing, whatever that is."""
    expected = sequential(CASE)
    rank %= pool.world_size
    results = pool.run(failing_head, kind, 5, rank)
    assert len({(report["error"], report["committed"]) for report, _, _ in results}) == 1
    for report, trace, committed in results:
        assert report["error"] in (
            *("NoneType", "ZeroDivisionError", "NonFiniteGradientError"),
            "ImpureClosureError",  # the audit asks the rank that fails, another one did not
        )
        assert report["seconds"] < SECONDS
        assert_stood_at(committed, expected, report["committed"])
        assert_same_trace(trace, expected)


class PreemptedError(Exception):
    """What a program's handler of SIGTERM may raise."""


def preempted(*args: Any) -> tuple[dict[str, Any], Trace, Any]:
    def leave(number: int, frame: Any) -> None:
        raise PreemptedError

    before = signal.signal(signal.SIGTERM, leave)
    try:
        return failing_head("preempted", *args)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_one_rank_catches_raises_everywhere_at_once(pools: Pools) -> None:
    """Not taken for a closure that fails at a guess, though the handler raises an ordinary exception."""
    expected = sequential(CASE)
    for report, trace, committed in pools(3).run(preempted, 5, 1):
        assert report["error"] == "PreemptedError"
        assert report["committed"] == report["step_index"] < CASE.steps
        assert_stood_at(committed, expected, report["committed"])
        assert_same_trace(trace, expected)


@pytest.mark.parametrize("only_rank", [None, 1])
def test_ctrl_c_raises_everywhere_at_once(pools: Pools, only_rank: int | None) -> None:
    """Wherever in the window it strikes, on every rank, and nothing speculative is committed."""
    expected = sequential(CASE)
    for report, trace, committed in pools(3).run(failing_head, "interrupt", 5, only_rank):
        assert report["error"] == "KeyboardInterrupt"
        assert report["committed"] == report["step_index"] < CASE.steps
        assert report["seconds"] < SECONDS
        assert_stood_at(committed, expected, report["committed"])
        assert_same_trace(trace, expected)


def failing_future(kind: str, only_rank: int | None) -> tuple[Trace, dict[str, Any]]:
    """The closure fails wherever it is evaluated at a wrong guess."""
    expected = sequential(CASE)
    problem, optimizer, _ = wrap(CASE)

    def harm(step: int) -> None:
        if only_rank in (None, dist.get_rank()):
            if kind == "nan":
                spoil(problem, float("nan"))
            else:
                raise ZeroDivisionError("planted")

    closure = only_at_wrong_guesses(
        expected, problem, make_closure(problem, optimizer.zero_grad), harm, first=1
    )
    trace = Trace()
    with quiet():
        finish(problem, optimizer, closure, trace, CASE.steps)
    return trace, stats_of(optimizer)


@pytest.mark.parametrize("only_rank", [None, -1])
@pytest.mark.parametrize("kind", ["plain", "nan"])
def test_a_bad_future_on_processes(pool: Pool, kind: str, only_rank: int | None) -> None:
    """Law 5: a shorter stride, counted alike on every rank; "last rank only" among them."""
    expected = sequential(CASE)
    if only_rank is not None:
        only_rank %= pool.world_size
    results = pool.run(failing_future, kind, only_rank)
    for trace, stats in results:
        assert_same_trace(trace, expected)
        assert stats == results[0][1]
        assert stats["failed_speculations"] > 0
        assert stats["sweeps"] <= CASE.steps


# --- The ranks disagree ---------------------------------------------------------------------------


def disagreeing(about: str) -> dict[str, Any]:
    """Rank 1 builds, or does, something else."""
    odd = dist.get_rank() == 1
    options: dict[str, Any] = {"timeout": 60.0, "tolerance": 0}
    shape, dtype = (3, 2), torch.float32
    if about == "shape" and odd:
        shape = (2, 2)
    if about == "transposed shape" and odd:
        shape = (2, 3)
    if about == "dtype" and odd:
        dtype = torch.float64
    if about == "window":
        options["window"] = 3 if odd else 4
    if about == "seed" and odd:
        options["seed"] = 1
    weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    parameters = [weight]
    if about == "count" and odd:
        parameters.append(torch.nn.Parameter(torch.ones(2)))
    started, error = time.perf_counter(), None
    step = 0
    try:
        optimizer = ParallelPicardOptimizer(torch.optim.SGD(parameters, lr=0.1), **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum((p * torch.randn(p.shape, dtype=p.dtype)).sum() for p in parameters)
            assert isinstance(loss, Tensor)
            loss.backward()
            return loss

        for step in range(6):
            if step == 3 and odd and about == "step":
                optimizer.step_index = 4
            if step == 3 and odd and about == "parameters":
                with torch.no_grad():
                    weight.add_(1)
            optimizer.step(closure)
    except BaseException as caught:
        error = caught
    return {
        "error": type(error).__name__,
        "message": str(error),
        "seconds": time.perf_counter() - started,
        "step": step,
    }


WHAT = ["step", "window", "shape", "transposed shape", "dtype", "count", "seed", "parameters"]


@pytest.mark.parametrize("about", WHAT)
def test_ranks_that_disagree(pool: Pool, about: str) -> None:
    """RankMismatchError on every rank, naming the odd one, within seconds."""
    for report in pool.run(disagreeing, about):
        assert report["error"] == RankMismatchError.__name__, report
        assert report["seconds"] < SECONDS
        assert "1" in report["message"]
        assert "rank" in report["message"]
