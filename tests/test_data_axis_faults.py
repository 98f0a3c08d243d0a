"""What becomes of one data rank's trouble: the rows stay in lockstep, and every rank hears of it."""

import os
import pickle
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from picardopt import ParallelPicardOptimizer
from tests.helpers.meshes import (
    BASES,
    STEPS,
    Network,
    Run,
    build,
    make_closure,
    plain_run,
    record,
)
from tests.helpers.pool import Pools, fresh_pool
from tests.helpers.problems import Problem
from tests.helpers.runs import (
    SECONDS,
    Trace,
    assert_same_bits,
    assert_same_trace,
    attempt,
    quiet,
    stats_of,
)


def troubled(run: Run, kind: str, bad: int, victim: int, nonfinite: str) -> tuple[Any, Trace]:
    """One data rank's closure fails at a step; a collective in it wants the row in lockstep."""
    mesh = init_device_mesh("cpu", run.shape, mesh_dim_names=run.dims)
    model = Network()
    optimizer = ParallelPicardOptimizer(
        BASES["Adam"](model.parameters()),
        mesh=mesh,
        window=run.window,
        tolerance=0,
        nonfinite=nonfinite,
        timeout=60.0,
    )
    healthy, trace = make_closure(model, optimizer), Trace()

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        dist.all_reduce(torch.ones(1), group=mesh.get_group("data"))
        if step == bad and optimizer.data_rank == victim:
            if kind == "raises":
                raise ZeroDivisionError("planted")
            if kind == "interrupt":
                raise KeyboardInterrupt
            if kind == "no gradient":
                optimizer.zero_grad()
            if kind == "nan":
                assert model.bias.grad is not None
                model.bias.grad[0] = torch.nan
        return loss

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    report = attempt(trace, problem, optimizer, closure, STEPS)
    with quiet():
        for _ in range(STEPS - optimizer.step_index):
            trace.record(optimizer.step(healthy), problem, optimizer)
    return report, trace


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raises", "ZeroDivisionError"),
        ("nan", "NonFiniteGradientError"),
        ("no gradient", "NoGradientError"),
    ],
)
@pytest.mark.parametrize("run", [Run((1, 2), window=4), Run((2, 2), window=5)], ids=str)
@pytest.mark.parametrize("victim", [0, 1])
def test_trouble_on_one_data_rank(
    pools: Pools, run: Run, kind: str, error: str, victim: int
) -> None:
    """The worst of the row counts: every rank raises the same error at that step, and on it goes."""
    bad, expected = 5, plain_run(run)
    for report, trace in pools(run.ranks).run(troubled, run, kind, bad, victim, "raise"):
        assert report["error"] == error, report["text"]
        assert report["committed"] == report["step_index"] == bad
        assert report["seconds"] < SECONDS
        trace.states = [{**state, "buffers": []} for state in trace.states]
        assert_same_trace(trace, expected)


def lonely(run: Run) -> tuple[Trace, dict[str, Any]]:
    """On one data rank guesses beyond the head give NaN; DistributedDataParallel wants the row in lockstep."""
    expected = plain_run(run)
    model, called, optimizer = build(run)
    parameters = list(model.parameters())
    healthy, trace = make_closure(called, optimizer), Trace()
    points = [run.model().state_dict().values(), *expected.parameters]

    def closure(step: int) -> Tensor:
        right = all(torch.equal(p, q) for p, q in zip(parameters, points[step], strict=True))
        loss = healthy(step)
        if not right and optimizer.data_rank == 1:
            model.get_parameter("bias").grad.fill_(torch.nan)  # type: ignore[union-attr]
        return loss

    with quiet():
        for _ in range(STEPS):
            record(trace, optimizer.step(closure), model, optimizer)
    return trace, stats_of(optimizer)


def test_a_bad_future_on_one_data_rank(pools: Pools) -> None:
    """It shortens the stride, alike on all ranks, and the row evaluates on together."""
    run = Run((1, 2), window=4, ddp="copies", base="SGD")
    results = pools(2).run(lonely, run)
    for trace, stats in results:
        assert_same_trace(trace, plain_run(run))
        assert stats == results[0][1]
        assert stats["failed_speculations"] > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupt_on_one_data_rank(pools: Pools, victim: int) -> None:
    for report, _ in pools(2).run(troubled, Run((1, 2), window=4), "interrupt", 5, victim, "raise"):
        assert report["error"] == "KeyboardInterrupt"
        assert report["committed"] == report["step_index"] <= 5


def test_a_nan_on_one_data_rank_skips_the_step_on_all(pools: Pools) -> None:
    results = pools(2).run(troubled, Run((1, 2), window=4), "nan", 5, 1, "skip")
    for report, trace in results:
        assert report["committed"] == STEPS
        assert_same_bits(trace.parameters[5], trace.parameters[4])
        assert not torch.equal(trace.parameters[6][0], trace.parameters[5][0])
        assert_same_bits(trace.parameters, results[0][1].parameters)


def moved(victim: int) -> dict[str, Any]:
    """One rank's parameters are changed by hand."""
    model, called, optimizer = build(Run((2, 2), timeout=60.0))
    closure = make_closure(called, optimizer)

    def edit(step: int) -> Tensor:
        return closure(step)

    for _ in range(4):
        optimizer.step(closure)
    optimizer.step_index = 4  # nothing is queued on any rank
    if dist.get_rank() == victim:
        with torch.no_grad():
            model.get_parameter("bias").add_(1)
    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, edit, 1)


@pytest.mark.parametrize("victim", [1, 3])
def test_parameters_are_compared_over_all_ranks(pools: Pools, victim: int) -> None:
    for report in pools(4).run(moved, victim):
        assert report["error"] == "RankMismatchError"
        assert "the parameters' values" in report["message"]


def impure(victim: int) -> dict[str, Any]:
    """One rank's closure counts its calls."""
    model, called, optimizer = build(Run((2, 2), audit="always"))
    healthy, calls = make_closure(called, optimizer), 0

    def closure(step: int) -> Tensor:
        nonlocal calls
        calls += 1
        loss = healthy(step)
        bias = model.get_parameter("bias")
        if dist.get_rank() == victim and bias.grad is not None:
            bias.grad += calls
        return loss

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, STEPS)


@pytest.mark.parametrize("victim", [1, 2])
def test_an_impure_closure_on_one_data_rank(pools: Pools, victim: int) -> None:
    for report in pools(4).run(impure, victim):
        assert report["error"] == "ImpureClosureError", report["text"]


def dying(victim: int, at: int) -> dict[str, Any]:
    model, called, optimizer = build(Run((2, 2)))
    healthy, evaluations = make_closure(called, optimizer), 0

    def closure(step: int) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if dist.get_rank() == victim and evaluations == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return healthy(step)

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, STEPS)


@pytest.mark.parametrize("victim", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_9_is_heard_by_every_row_and_column(victim: int) -> None:
    """Also by the rank that shares neither a row nor a column with the lost one."""
    with fresh_pool(4) as pool:
        outcomes = pool.outcomes(dying, victim, 1)
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.lost
            continue
        assert outcome.value["error"] == "RankLostError", outcome.text or outcome.value["text"]
        assert outcome.value["seconds"] < SECONDS


def failing_alone(timeout: float) -> dict[str, Any]:
    """Rank 0 raises before its backward; rank 1's waits there for it."""
    model, called, optimizer = build(Run((1, 2), window=2, ddp="copies", timeout=timeout))
    healthy = make_closure(called, optimizer)

    def closure(step: int) -> Tensor:
        if step == 4 and dist.get_rank() == 0:
            raise ZeroDivisionError("planted")
        return healthy(step)

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, STEPS)


@pytest.mark.slow
def test_a_rank_that_leaves_its_partner_in_backward() -> None:
    """DistributedDataParallel's collective waits: the rank that raised gives up in time and says why."""
    with fresh_pool(2) as pool:
        pool.submit(failing_alone, 5.0)
        assert pool.connections[0].poll(5.0 + SECONDS)
        report = pickle.loads(pool.connections[0].recv_bytes()).value
    assert report["error"] == "RankLostError"
    assert report["committed"] == 4
    assert "before that the closure raised on this rank" in report["text"]
    assert "ZeroDivisionError: planted" in report["text"]
