"""Law 1 in one process: bitwise the sequential run, for every optimizer, problem and scheduler."""

import functools
from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers.catalog import OWN, SCHEDULERS, torch_optimizers
from tests.helpers.problems import PROBLEMS
from tests.helpers.runs import (
    Case,
    Trace,
    assert_parallel,
    assert_same_trace,
    check_exact,
    parallel,
    sequential,
)

PREDICTORS = ("hold", "coast")


def with_each_predictor(names: Iterable[str]) -> list[Any]:
    """All of them with both predictors, each of them with one of the two in the daily suite."""
    pairs = [(name, predictor) for name in names for predictor in PREDICTORS]
    return [
        pytest.param(*pair, marks=() if at % 4 in (0, 3) else pytest.mark.slow)
        for at, pair in enumerate(pairs)
    ]


@functools.cache
def expected(case: Case) -> Trace:
    return sequential(case)


def problem_for(optimizer: str) -> str:
    return "matrices" if optimizer.startswith("Muon") else "network"


@pytest.mark.parametrize(("name", "predictor"), with_each_predictor(torch_optimizers()))
def test_torch_optimizers(name: str, predictor: Any) -> None:
    """Torch's own database, option sample by option sample, plain, foreach and fused."""
    case = Case(problem_for(name), name)
    trace = parallel(case, window=4, predictor=predictor)
    assert_same_trace(trace, expected(case))
    assert_parallel(trace)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("window", [1, 2, 3, 7, 16, 50])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD: nesterov", "Rprop"])
def test_windows(optimizer: str, window: int, predictor: Any) -> None:
    case = Case("network", optimizer, steps=20, seed=5)
    trace = parallel(case, window=window, predictor=predictor)
    assert_same_trace(trace, expected(case))
    if window > 1:
        assert_parallel(trace)
    else:
        assert trace.stats["strides"] == [1] * case.steps


@pytest.mark.parametrize("total_steps", [None, 20])
def test_total_steps_shrinks_the_last_windows(total_steps: int | None) -> None:
    case = Case("network", "Adam", steps=20)
    trace = parallel(case, window=6, total_steps=total_steps)
    assert_same_trace(trace, expected(case))
    assert_parallel(trace)
    if total_steps:
        done = 0
        for stride, residuals in zip(trace.stats["strides"], trace.stats["residuals"], strict=True):
            assert len(residuals) == min(6, total_steps - done)
            done += stride
        assert done == total_steps


def test_running_past_total_steps() -> None:
    """An underestimate of the horizon costs parallelism beyond it, nothing else."""
    case = Case("network", "Adam", steps=20)
    trace = parallel(case, window=4, total_steps=8)
    assert_same_trace(trace, expected(case))
    assert trace.stats["strides"][-12:] == [1] * 12
    assert max(trace.stats["strides"]) >= 2


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("optimizer", ["Adam", "SGD: momentum", "Adagrad"])
@pytest.mark.parametrize("problem", sorted(set(PROBLEMS) - {"network", "smooth", "integers"}))
def test_problems(problem: str, optimizer: str, predictor: Any) -> None:
    """Groups, None and partly-None gradients, frozen, tied, bf16, complex, clipping."""
    check_exact(Case(problem, optimizer), window=4, predictor=predictor)


def test_partial_gradients_are_partial() -> None:
    """The problem of that name has what it says: gradients None always, sometimes and later."""
    gradients = expected(Case("partial", "Adam")).gradients
    absent = [[g is None for g in step] for step in gradients]
    assert all(step[0] and step[3] for step in absent)
    assert [step[4] for step in absent] == [t % 2 == 0 for t in range(14)]
    assert [step[7] for step in absent] == [t >= 6 for t in range(14)]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("window", [3, 6])
@pytest.mark.parametrize("optimizer", ["fused", "foreach"])
def test_bf16_fused_and_foreach(optimizer: str, window: int, predictor: Any) -> None:
    check_exact(Case("bf16", f"AdamW: amsgrad & {optimizer}"), window=window, predictor=predictor)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("name", sorted(set(OWN) - {"Jumpy"}))
def test_state_in_unusual_places(name: str, window: int, predictor: Any) -> None:
    """State in attributes, in groups, in a nested optimizer; own draws; overwritten gradients."""
    check_exact(Case("network", name), window=window, predictor=predictor)


@pytest.mark.parametrize("known", ["base", "wrapper"])
@pytest.mark.parametrize(("name", "predictor"), with_each_predictor(SCHEDULERS))
def test_known_schedulers(name: str, known: str, predictor: Any) -> None:
    """The rollout knows the future learning rates, so that a moving one costs no stride."""
    optimizer = "SGD: momentum" if "momentum" in name else "Adam"
    case = Case("network", optimizer, scheduler=name, known=known)
    check_exact(case, window=4, predictor=predictor)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unknown_schedulers(name: str) -> None:
    """Taken as constant over a window: still exact; it only costs strides where the rate moves."""
    optimizer = "SGD: momentum" if "momentum" in name else "Adam"
    case = Case("network", optimizer, scheduler=name, known="unknown")
    trace = parallel(case, window=4)
    assert_same_trace(trace, expected(case))
    rates = trace.rates
    if any(rates[t] == rates[t + 1] == rates[t + 2] == rates[t + 3] for t in range(10)):
        assert_parallel(trace)


@pytest.mark.parametrize("known", ["base", "wrapper", "unknown"])
@pytest.mark.parametrize("name", ["StepLR", "ExponentialLR", "CyclicLR"])
def test_schedulers_of_a_tensor_rate(name: str, known: str) -> None:
    """A scheduler writes into a learning rate that is a tensor, in place."""
    case = Case("network", "Adagrad: Tensor lr", scheduler=name, known=known)
    trace = parallel(case, window=4)
    assert_same_trace(trace, sequential(case))
    if known != "unknown":
        assert_parallel(trace)


def test_scheduler_over_several_groups() -> None:
    case = Case("groups", "AdamW", scheduler="ExponentialLR")
    check_exact(case, window=5)


@pytest.mark.parametrize("seed", [0, 1, -3, 2**70])
def test_seeds(seed: int) -> None:
    check_exact(Case(seed=seed), window=4)
    other = sequential(Case(seed=seed + 1))
    assert not any(a.equal(b) for a in expected(Case(seed=seed)).losses for b in other.losses)
