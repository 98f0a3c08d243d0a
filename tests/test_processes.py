"""Law 1 on 2, 3 and 4 real processes, and the two planted faults that it must find."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import picardopt.drift
import picardopt.replay_check
import picardopt.snapshot
from picardopt import DriftTolerance
from tests.helpers.pool import Pool, Pools
from tests.helpers.runs import (
    Case,
    Trace,
    assert_parallel,
    assert_same_trace,
    check_exact,
    make_closure,
    parallel,
    sequential,
    wrap,
)
from tests.helpers.versions import needs_package, needs_torch

CASES = [
    Case("network", "Adam: amsgrad & foreach"),
    Case("network", "AdamW: nonzero weight_decay & fused"),
    Case("network", "SGD: nesterov"),
    Case("matrices", "Muon: default"),
    Case("network", "Adafactor: default"),
    Case("groups", "NAdam", scheduler="OneCycleLR"),
    Case("partial", "Adam"),
    Case("tied", "RMSprop", scheduler="CosineAnnealingLR", known="wrapper"),
    Case("bf16", "AdamW"),
    Case("clipping", "Adagrad", scheduler="StepLR", known="unknown"),
    Case("complex64", "Adam"),
    Case("integers", "Jumpy"),
    Case("network", "Attribute"),
    Case("network", "Langevin"),
    Case("network", "Nested"),
    Case("network", "pypi: Lamb"),
]


def case_id(case: Case) -> str:
    return f"{case.problem}-{case.optimizer}-{case.scheduler}"


def traced(case: Case, options: dict[str, Any]) -> Trace:
    return parallel(case, **options)


def check(trace: Trace, case: Case) -> None:
    """What every run on processes must pass, and what a planted fault must not."""
    assert_same_trace(trace, sequential(case))
    assert_parallel(trace)


MARKS = {
    "Adafactor: default": needs_torch("2.5", "Adafactor"),
    "Muon: default": needs_torch("2.9", "Muon"),
    "pypi: Lamb": needs_package("torch_optimizer"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case_id(case), marks=MARKS.get(case.optimizer, ())) for case in CASES],
)
def test_exact_on_processes(pool: Pool, case: Case) -> None:
    """Every rank ends every step with the sequential bits, in fewer sweeps than steps."""
    for trace in pool.run(traced, case.packed(), {}):
        check(trace, case)
        assert len(trace.stats["residuals"][0]) == pool.world_size


@pytest.mark.parametrize("predictor", [pytest.param("hold", marks=pytest.mark.slow), "coast"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_any_window_on_any_number_of_processes(pool: Pool, window: int, predictor: Any) -> None:
    """More slots than ranks, fewer, and numbers that do not divide."""
    case = Case("network", "Adam", steps=18)
    expected = sequential(case)
    traces = pool.run(traced, case.packed(), {"window": window, "predictor": predictor})
    for trace in traces:
        assert_same_trace(trace, expected)
        assert trace.stats == traces[0].stats
        if window > 1:
            assert len(trace.stats["residuals"][0]) == window
            assert_parallel(trace)


@pytest.mark.parametrize("secants", [0, 4])
@pytest.mark.parametrize("problem", ["groups", "bf16", "complex64"])
def test_corrected_runs_are_the_same_on_any_number_of_processes(
    pool: Pool, problem: str, secants: int
) -> None:
    """Not sequential bits, but one process's: every rank measures, corrects and decides alike."""
    case = Case(problem, "Adam", steps=24)
    options = {"window": 6, "secants": secants}
    expected = parallel(case, tolerance=DriftTolerance(noise=1.0), **options)
    options["tolerance"] = DriftTolerance(noise=1.0)  # a new one: it learns
    for trace in pool.run(traced, case.packed(), options):
        assert_same_trace(trace, expected)
        assert trace.stats["residuals"] == expected.stats["residuals"]


def draws(window: int | None) -> dict[int, list[tuple[float, float, float]]]:
    """What each evaluation on this rank drew, by step."""
    from picardopt import ParallelPicardOptimizer

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = ParallelPicardOptimizer(torch.optim.SGD([weight], lr=0.1), window=window, seed=4)
    seen: dict[int, list[tuple[float, float, float]]] = {}

    def closure(step: int) -> torch.Tensor:
        optimizer.zero_grad()
        drawn = (float(torch.rand(())), float(np.random.rand()), random.random())
        seen.setdefault(step, []).append(drawn)
        loss = (weight * drawn[0]).sum()
        loss.backward()
        return loss

    torch.manual_seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    random.seed(dist.get_rank())
    for _ in range(10):
        optimizer.step(closure)
    # The worker's own streams go on as if nothing had been drawn.
    outside = (float(torch.rand(())), float(np.random.rand()), random.random())
    torch.manual_seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    random.seed(dist.get_rank())
    assert outside == (float(torch.rand(())), float(np.random.rand()), random.random())
    return seen


@pytest.mark.parametrize("window", [None, 5])
def test_the_same_draw_on_every_rank(pool: Pool, window: int | None) -> None:
    """Law 3: step t draws the same numbers whichever worker evaluates it, however often."""
    by_step: dict[int, set[tuple[float, float, float]]] = {}
    ranks: dict[int, set[int]] = {}
    for rank, seen in enumerate(pool.run(draws, window)):
        for step, drawn in seen.items():
            by_step.setdefault(step, set()).update(drawn)
            ranks.setdefault(step, set()).add(rank)
    assert all(len(drawn) == 1 for drawn in by_step.values())
    assert len(set.union(*by_step.values())) == len(by_step)
    assert any(len(who) > 1 for who in ranks.values())


def initially_different(case: Case) -> tuple[list[torch.Tensor], Trace]:
    """Ranks start from different parameters, as a script without a seed does."""
    from picardopt import ParallelPicardOptimizer

    torch.manual_seed(dist.get_rank())
    weight = torch.nn.Parameter(torch.randn(3))
    own = weight.detach().clone()
    ParallelPicardOptimizer(torch.optim.SGD([weight], lr=0.1))
    return [own, weight.detach().clone()], parallel(case)


def test_initial_parameters_are_those_of_rank_0(pool: Pool) -> None:
    case = Case("network", "Adam")
    results = pool.run(initially_different, case)
    first = results[0][0][0]
    assert not torch.equal(results[1][0][0], first)
    for (_, after), trace in results:
        assert torch.equal(after, first)
        assert_same_trace(trace, sequential(case))


def test_hidden_state_is_found_out_by_every_rank(pools: Pools) -> None:
    """Those of one process are in `test_third_party.py`, whose imports would take a worker seconds."""
    for outcome in pools(2).run(refused_on_a_rank):
        assert outcome == "UnsupportedOptimizerError", outcome


def refused_on_a_rank() -> str:
    problem, optimizer, _ = wrap(Case("network", "InClass"))
    try:
        optimizer.step(make_closure(problem, optimizer.zero_grad))
    except Exception as error:
        return type(error).__name__
    return "nothing"


# --- Two planted faults: the checks above must find them. -----------------------------------------


def _seed_by_rank() -> Any:
    """The randomness of a step depends on the rank that evaluates it."""
    honest = picardopt.drift.step_seed
    return mock.patch.object(
        picardopt.drift, "step_seed", lambda seed, step: honest(seed + dist.get_rank(), step)
    )


@contextmanager
def _state_not_restored() -> Iterator[None]:
    """The rollout's steps stay in the base's state, and rolling out twice does not tell."""
    with (
        mock.patch.object(picardopt.snapshot.Snapshot, "restore", return_value=None),
        mock.patch.object(picardopt.replay_check, "repeats", return_value=True),
    ):
        yield


PLANTED = {"seed by rank": _seed_by_rank, "state not restored": _state_not_restored}


def traced_with(fault: str, case: Case, options: dict[str, Any]) -> Trace:
    with ExitStack() as stack:
        stack.enter_context(PLANTED[fault]())
        return parallel(case, **options)


@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.parametrize("case", CASES[:3], ids=case_id)
def test_planted_faults_are_found_on_processes(pools: Pools, case: Case, fault: str) -> None:
    """Either the bits are wrong, or no guess is ever right and the window is 1 in disguise."""
    for trace in pools(2).run(traced_with, fault, case.packed(), {"audit": "never"}):
        with pytest.raises(AssertionError):
            check(trace, case)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD: momentum", "Attribute", "Nested"])
def test_a_state_that_is_not_restored_is_found(optimizer: str) -> None:
    case = Case("network", optimizer)
    check_exact(case, window=4)
    with _state_not_restored(), pytest.raises(AssertionError, match="step"):
        check_exact(case, window=4, audit="never")
