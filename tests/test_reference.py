"""The theorem (supplement A) on the paper's Algorithm 2, over arbitrary states."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picardopt.reference import Solution, algorithm_2

KINDS = ("int", "float", "numpy", "torch")


@dataclass(frozen=True)
class Process:
    """A random nonlinear, discontinuous process over integers, floats, arrays or tensors.

    The drift is a table of (step, cell of the state): constant inside a cell of ``coarse``
    units, arbitrary across cells. With small cells every wrong guess gives a wrong drift; with
    large ones many wrong guesses give the right drift, so that long strides occur.
    """

    kind: str
    table: tuple[int, ...]
    coarse: int
    branch: int

    def start(self) -> Any:
        return self._make(7)

    def _make(self, value: int) -> Any:
        if self.kind == "int":
            return value
        if self.kind == "float":
            return value / 8
        values = [value / 8, -value / 4, value]
        return np.array(values) if self.kind == "numpy" else torch.tensor(values)

    def _cell(self, state: Any) -> int:
        total = state if self.kind in ("int", "float") else float(state.sum())
        return math.floor(total / self.coarse)

    def s(self, state: Any, t: int) -> Any:
        cell = self._cell(state)
        return self._make(self.table[(5 * t + 3 * cell + t * cell) % len(self.table)])

    def h(self, drift: Any, state: Any) -> Any:
        if self.kind == "int":  # integer-valued and not invertible
            moved = state // 2 + drift if state % self.branch == 0 else drift - state
            return moved % 1009
        if self._cell(state) % self.branch == 0:  # a jump
            return drift - state / 2
        return state * 0.75 + drift * abs(drift) / (1 + abs(drift))

    def sequential(self, steps: int) -> list[Any]:
        states = [self.start()]
        for t in range(steps):
            states.append(self.h(self.s(states[-1], t), states[-1]))
        return states


processes = st.builds(
    Process,
    kind=st.sampled_from(KINDS),
    table=st.lists(st.integers(-40, 40), min_size=1, max_size=7).map(tuple),
    coarse=st.sampled_from([1, 3, 20, 400]),
    branch=st.integers(1, 5),
)
horizons = st.integers(0, 14)
windows = st.integers(1, 9)
thresholds = st.sampled_from([0.0, 1e-6, 0.5, 30.0, math.inf])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.all(a == b))


def distance(a: Any, b: Any) -> float:
    if isinstance(a, torch.Tensor):
        return float((a - b).square().mean())
    return float(np.mean(np.square(np.subtract(a, b))))


def solve(process: Process, steps: int, window: int, **options: Any) -> Solution[Any]:
    options = {"e": 0.0, "distance": distance, **options}
    return algorithm_2(process.s, process.h, process.start(), steps, p=window, **options)


def assert_states_equal(got: tuple[Any, ...] | list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@given(processes, horizons, windows)
def test_exact_mode_is_the_sequential_trajectory(process: Process, steps: int, window: int) -> None:
    solution = solve(process, steps, window, same=same)
    assert_states_equal(solution.trajectory, process.sequential(steps))
    assert same(solution.theta, solution.trajectory[-1])
    assert len(solution.sweeps) <= steps
    assert sum(sweep.skip for sweep in solution.sweeps) == steps


@given(processes, horizons)
def test_after_k_sweeps_the_first_k_iterates_are_exact(process: Process, steps: int) -> None:
    """The theorem itself: the window spans the whole horizon and nothing is ever accepted."""
    solution = solve(process, steps, max(steps, 1), same=lambda a, b: False)
    expected = process.sequential(steps)
    assert [sweep.skip for sweep in solution.sweeps] == [1] * steps
    for k, sweep in enumerate(solution.sweeps, start=1):
        assert sweep.tau == k - 1
        assert_states_equal(sweep.iterates[:2], expected[k - 1 : k + 1])
    assert_states_equal(solution.trajectory, expected)


@given(processes, horizons, windows, thresholds)
def test_head_is_exact_relative_to_its_guess_and_stride_is_at_least_one(
    process: Process, steps: int, window: int, e: float
) -> None:
    """Whatever the threshold: progress every sweep, and the head step is an honest step."""
    solution = solve(process, steps, window, e=e)
    tau = 0
    for sweep in solution.sweeps:
        assert sweep.tau == tau
        assert 1 <= sweep.skip <= len(sweep.error) == min(window, steps - tau)
        assert len(sweep.guesses) == len(sweep.iterates) == len(sweep.error) + 1
        head = sweep.guesses[0]
        assert same(sweep.iterates[0], head)
        assert same(sweep.iterates[1], process.h(process.s(head, tau), head))
        accepted = sweep.error[: sweep.skip - 1]
        assert all(residual <= e for residual in accepted)
        if sweep.skip < len(sweep.error):
            assert not sweep.error[sweep.skip - 1] <= e
        tau += sweep.skip
    assert tau == steps
    assert len(solution.sweeps) <= steps


@given(processes, horizons, thresholds)
def test_window_of_one_is_the_sequential_loop(process: Process, steps: int, e: float) -> None:
    solution = solve(process, steps, 1, e=e)
    assert_states_equal(solution.trajectory, process.sequential(steps))
    assert len(solution.sweeps) == steps


@given(processes, horizons, windows, thresholds)
def test_window_shrinks_at_the_end_of_time(
    process: Process, steps: int, window: int, e: float
) -> None:
    """Nothing at or beyond T is ever evaluated, and slot j is evaluated as step tau+j."""
    calls: list[int] = []

    def s(state: Any, t: int) -> Any:
        calls.append(t)
        return process.s(state, t)

    solution = algorithm_2(s, process.h, process.start(), steps, p=window, e=e, distance=distance)
    expected = [
        sweep.tau + j for sweep in solution.sweeps for j in range(min(window, steps - sweep.tau))
    ]
    assert calls == expected


@given(processes, horizons, windows, thresholds)
def test_window_slides_and_is_filled_with_its_tail(
    process: Process, steps: int, window: int, e: float
) -> None:
    sweeps = solve(process, steps, window, e=e).sweeps
    if sweeps:
        assert_states_equal(sweeps[0].guesses, [process.start()] * len(sweeps[0].guesses))
    for before, after in itertools.pairwise(sweeps):
        tail = before.iterates[-1]
        expected = [*before.iterates[before.skip :], *[tail] * before.skip]
        assert_states_equal(after.guesses, expected[: len(after.guesses)])


def test_strides_beyond_one_do_occur() -> None:
    """The properties above are not vacuous: piecewise constant drifts converge at once."""
    process = Process("float", (40, 41, 42, 43), coarse=10**6, branch=5)
    solution = solve(process, 12, 4, same=same)
    assert [sweep.skip for sweep in solution.sweeps] == [1, 4, 1, 4, 1, 1]


@pytest.mark.parametrize(
    ("drifts", "skip", "window"),
    [
        ((3, 1, 1), 1, (3, 4, 5, 5)),  # the first residual, 9, is beyond e = 4
        ((1, 2, 5), 2, (3, 8, 8, 8)),  # 1 is not, 9 is
        ((1, 1, 1), 3, (3, 3, 3, 3)),  # 1 and 4 are not; the third is never asked
        ((1, 1, 9), 3, (11, 11, 11, 11)),
        ((0, 0, 0), 3, (0, 0, 0, 0)),
    ],
)
def test_the_window_of_three_of_the_supplement(
    drifts: tuple[int, ...], skip: int, window: tuple[int, ...]
) -> None:
    """Supplement C: slide by one, by two, or by the whole window of three."""

    def s(state: int, t: int) -> int:
        return drifts[t] if t < 3 else 0

    solution = algorithm_2(
        s, lambda d, x: x + d, 0, 30, p=3, e=4.0, distance=lambda a, b: float((a - b) ** 2)
    )
    first, second = solution.sweeps[:2]
    assert first.guesses == (0, 0, 0, 0)
    assert first.skip == skip
    assert second.tau == skip
    assert second.guesses == window


@given(
    bad=st.sets(st.integers(0, 9), min_size=1),
    window=windows,
    e=st.sampled_from([0.0, 1.0, math.inf]),
    gamma=st.sampled_from([0.5, 0.9]),
    poison=st.sampled_from([math.nan, math.inf]),
)
def test_nan_is_never_accepted_and_never_enters_the_threshold(
    bad: set[int], window: int, e: float, gamma: float, poison: float
) -> None:
    def s(state: float, t: int) -> float:
        return poison if t in bad else 0.5

    def h(drift: float, state: float) -> float:
        return state + drift - (drift * 0 if math.isfinite(drift) else poison)

    solution = algorithm_2(
        s, h, 0.0, 10, p=window, e=e, gamma=gamma, distance=lambda a, b: (a - b) ** 2
    )
    for sweep in solution.sweeps:
        assert not any(math.isnan(residual) for residual in sweep.error[: sweep.skip - 1])
        assert not math.isnan(sweep.e)
        if e < math.inf:
            assert math.isfinite(sweep.e)
    # From the first bad step on the sequential trajectory is not a number; ours is the same one.
    assert all(math.isfinite(state) for state in solution.trajectory[: min(bad) + 1])
    assert math.isnan(solution.trajectory[-1])


def test_threshold_follows_the_median_after_the_stride_is_chosen() -> None:
    process = Process("float", (5, -3, 8, 1, 2), coarse=2, branch=3)
    solution = solve(process, 20, 4, e=0.25, gamma=0.9)
    assert len(solution.sweeps) > 5
    for before, after in itertools.pairwise(solution.sweeps):
        residuals = sorted(before.error)
        middle = len(residuals) // 2
        median = (
            residuals[middle]
            if len(residuals) % 2
            else (residuals[middle - 1] + residuals[middle]) / 2
        )
        assert after.e == pytest.approx(0.9 * before.e + 0.1 * median, rel=1e-12)
        assert before.skip == next(
            (j for j, r in enumerate(before.error, 1) if not r <= before.e), len(before.error)
        )
    assert any(len(sweep.error) % 2 == 0 for sweep in solution.sweeps)


def test_equality_sees_what_the_square_of_a_tiny_difference_hides() -> None:
    """Squares underflow to 0: only the comparison of states is exact at tolerance 0."""

    def s(state: float, t: int) -> float:
        return 1e-200 if state == 0 else 2.0

    def run(equality: Callable[[float, float], bool] | None) -> Solution[float]:
        return algorithm_2(
            s,
            lambda d, x: x + d,
            0.0,
            3,
            p=3,
            e=0.0,
            distance=lambda a, b: (a - b) ** 2,
            same=equality,
        )

    assert run(None).trajectory == (0.0, 1e-200, 2e-200, 3e-200)
    assert run(lambda a, b: a == b).trajectory == (0.0, 1e-200, 2.0, 4.0)


@dataclass(frozen=True)
class Growing:
    """Points that split and die in some steps: iterates of changing dimension (supplement C).

    A state is (step, values, origins); origin i is the point of the first state that point i stems from. Drifts
    and guesses of another dimension are carried over by it: the paper's ``unproj``.
    """

    table: tuple[int, ...]
    every: int

    def s(self, state: Any, t: int) -> dict[int, int]:
        _, values, origins = state
        total = sum(values) // 7
        return {
            origin: self.table[(t + value + total) % len(self.table)]
            for value, origin in zip(values, origins, strict=True)
        }

    def h(self, drift: dict[int, int], state: Any) -> Any:
        t, values, origins = state
        moved = [(v + drift.get(o, 0)) % 101 for v, o in zip(values, origins, strict=True)]
        if t % self.every == self.every - 1:  # the largest splits, the smallest dies
            high, low = moved.index(max(moved)), moved.index(min(moved))
            chosen = [i for i in range(len(moved)) if i != low or len(moved) < 3]
            chosen += [high, high]
            moved = [moved[i] + (n >= len(moved)) for n, i in enumerate(chosen)]
            origins = tuple(origins[i] for i in chosen)
        return t + 1, tuple(moved), origins

    def distance(self, a: Any, b: Any) -> float:
        """Of a to the unprojected b; what b does not have is infinitely far."""
        known = dict(zip(b[2], b[1], strict=True))
        gaps = [(v - known.get(o, math.inf)) ** 2 for v, o in zip(a[1], a[2], strict=True)]
        return sum(gaps) / len(gaps)


@given(
    st.builds(
        Growing,
        table=st.lists(st.integers(-3, 3), min_size=1, max_size=4).map(tuple),
        every=st.integers(1, 5),
    ),
    st.integers(1, 16),
    st.integers(1, 9),
)
def test_iterates_of_changing_dimension(process: Growing, steps: int, window: int) -> None:
    """The theorem does not ask for a dimension: k sweeps make k iterates exact."""
    state: Any = (0, (5, 40, 77), (0, 1, 2))
    expected = [state]
    for t in range(steps):
        expected.append(process.h(process.s(expected[-1], t), expected[-1]))
    for options in ({"same": lambda a, b: a == b}, {}):
        solution = algorithm_2(
            process.s,
            process.h,
            state,
            steps,
            p=window,
            e=0.0,
            distance=process.distance,
            **options,
        )
        assert len(solution.sweeps) <= steps
        if options:
            assert list(solution.trajectory) == expected
        for k, sweep in enumerate(solution.sweeps, start=1):
            if sweep.tau == 0 and options:
                assert list(sweep.iterates[: k + 1]) == expected[: k + 1]
    if process.every < steps:
        assert len({len(values) for _, values, _ in expected}) > 1
