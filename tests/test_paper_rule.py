"""The reference against the real code under the paper's rule: hold and the adaptive threshold."""

import copy
from statistics import mean, median
from typing import Any

import pytest
import torch

from picardopt import AdaptiveTolerance, ParallelPicardOptimizer, step_rng
from picardopt.reference import Solution, algorithm_2
from tests.helpers.problems import PROBLEMS
from tests.helpers.runs import Case, as_bytes, assert_same_bits, make_closure, stats_of


class State:
    """An iterate of the reference: its own problem and its own optimizer."""

    def __init__(self, case: Case) -> None:
        problem, base = case.build()
        # Copied together, so that the optimizer's copy holds the copies of the parameters.
        self.parameters, self.base = problem.parameters, base

    def tensors(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.parameters]


def reference(case: Case, window: int, **options: Any) -> Solution[State]:
    """Algorithm 2 over (parameters, optimizer) pairs; the closure runs on a problem beside them."""
    problem = PROBLEMS[case.problem]()
    closure = make_closure(problem, lambda: None)

    def s(state: State, t: int) -> list[torch.Tensor | None]:
        with torch.no_grad():
            for p, value in zip(problem.parameters, state.tensors(), strict=True):
                p.copy_(value)
                p.grad = None
        with step_rng(case.seed, t):
            closure(t)
        return [None if p.grad is None else p.grad.clone() for p in problem.parameters]

    def h(drift: list[torch.Tensor | None], state: State) -> State:
        new = copy.deepcopy(state)
        for p, gradient in zip(new.parameters, drift, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        new.base.step()
        return new

    def distance(a: State, b: State) -> float:
        """Squared distance per parameter, summed in float64 (the paper's d^2 / D)."""
        squares, count = 0.0, 0
        for x, y in zip(a.tensors(), b.tensors(), strict=True):
            difference = (x - y).double().abs()
            squares += float(difference.square().sum())
            count += x.numel()
        return squares / count

    return algorithm_2(s, h, State(case), case.steps, p=window, distance=distance, **options)


def real(
    case: Case, window: int, tolerance: Any, **options: Any
) -> tuple[list[list[torch.Tensor]], dict[str, Any]]:
    problem, base = case.build()
    optimizer = ParallelPicardOptimizer(
        base,
        window=window,
        tolerance=tolerance,
        predictor="hold",
        total_steps=case.steps,
        seed=case.seed,
        **options,
    )
    closure = make_closure(problem, optimizer.zero_grad)
    trajectory = [[p.detach().clone() for p in problem.parameters]]
    for _ in range(case.steps):
        optimizer.step(closure)
        trajectory.append([p.detach().clone() for p in problem.parameters])
    return trajectory, stats_of(optimizer)


def assert_agree(
    expected: Solution[State], trajectory: list[list[torch.Tensor]], stats: dict[str, Any]
) -> None:
    assert stats["strides"] == [sweep.skip for sweep in expected.sweeps]
    assert len(stats["residuals"]) == len(expected.sweeps) == len(stats["tolerances"])
    for sweep, residuals, tolerances in zip(
        expected.sweeps, stats["residuals"], stats["tolerances"], strict=True
    ):
        assert residuals == pytest.approx(sweep.error, rel=1e-6, abs=1e-30)
        assert tolerances == pytest.approx([sweep.e] * len(sweep.error), rel=1e-6, abs=1e-30)
    for step, (got, state) in enumerate(zip(trajectory, expected.trajectory, strict=True)):
        assert_same_bits(got, state.tensors(), f"theta_{step}")


@pytest.mark.parametrize("window", [2, 3, 5, 8, 40])
@pytest.mark.parametrize(("statistic", "M"), [("median", median), ("mean", mean)])
@pytest.mark.parametrize(
    ("problem", "optimizer", "initial"),
    [("smooth", "Adam", 5e-6), ("smooth", "SGD", 2e-7), ("network", "Adam", 1e-6)],
)
def test_adaptive(
    problem: str, optimizer: str, initial: float, statistic: Any, M: Any, window: int
) -> None:
    case = Case(problem, optimizer, steps=30, seed=3)
    expected = reference(case, window, e=initial, gamma=0.9, M=M)
    tolerance = AdaptiveTolerance(initial=initial, decay=0.9, statistic=statistic)
    trajectory, stats = real(case, window, tolerance)
    assert_agree(expected, trajectory, stats)
    assert max(stats["strides"]) > 1
    assert len(stats["strides"]) < case.steps


def test_the_rule_is_put_to_the_test() -> None:
    """The comparison above covers strides from 1 to the whole window, cut by a residual or not."""
    case = Case("smooth", "Adam", steps=30, seed=3)
    sweeps = reference(case, 5, e=5e-6, gamma=0.9).sweeps
    assert len({sweep.skip for sweep in sweeps}) >= 3
    assert len({sweep.e for sweep in sweeps}) == len(sweeps)


@pytest.mark.parametrize("e", [1e-7, 3e-6, 1e-4])
def test_fixed_threshold(e: float) -> None:
    case = Case("smooth", "Adam", steps=24)
    expected = reference(case, 6, e=e)
    assert_agree(expected, *real(case, 6, e))


@pytest.mark.parametrize("optimizer", ["Adam", "SGD: nesterov", "NAdam", "RMSprop"])
def test_exact_mode(optimizer: str) -> None:
    """Tolerance 0 accepts by bits, as the reference does with ``same``."""
    case = Case("network", optimizer, steps=24)

    def same(a: State, b: State) -> bool:
        return all(
            torch.equal(as_bytes(x), as_bytes(y))
            for x, y in zip(a.tensors(), b.tensors(), strict=True)
        )

    expected = reference(case, 6, e=0.0, same=same)
    assert_agree(expected, *real(case, 6, 0))
    assert max(sweep.skip for sweep in expected.sweeps) >= 3


def test_initial_zero_is_legal_and_grows() -> None:
    """Only a fixed 0 means exact: the adaptive rule starts there and loosens."""
    case = Case("smooth", "Adam", steps=30)
    expected = reference(case, 6, e=0.0, gamma=0.9)
    trajectory, stats = real(case, 6, AdaptiveTolerance(initial=0.0, decay=0.9))
    assert_agree(expected, trajectory, stats)
    assert stats["tolerances"][0][0] == 0 < stats["tolerances"][-1][0]
    assert max(stats["strides"]) >= 2


def distributed_run(case: Case, initial: float) -> tuple[Any, dict[str, Any]]:
    return real(case, 4, AdaptiveTolerance(initial=initial, decay=0.9))


def test_adaptive_on_processes(pools: Any) -> None:
    """The same strides, residuals and tolerances on every rank of a window spread over two."""
    case = Case("smooth", "Adam", steps=30, seed=3)
    expected = reference(case, 4, e=5e-6, gamma=0.9)
    for trajectory, stats in pools(4).run(distributed_run, case, 5e-6):
        assert_agree(expected, trajectory, stats)
