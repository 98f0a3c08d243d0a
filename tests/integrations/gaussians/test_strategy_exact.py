"""Densification, pruning and opacity resets inside the fixed point: at tolerance 0 bitwise the sequential run."""

from __future__ import annotations

import copy
import functools
import math
import signal
import sys
import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise
from types import FrameType
from typing import Any

import picardopt_3d
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picardopt_3d.scenes.gaussians import strategy
from picardopt_3d.scenes.gaussians.config import StrategyConfig

from tests.helpers import gaussians
from tests.helpers.gaussians import LONG, SHORT, Pulled, run, sequential, state_of
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits

STEPS = 26


@functools.cache
def expected(config: StrategyConfig) -> tuple[list[Any], list[Any], Pulled]:
    """The sequential run."""
    scene = Pulled(config)
    return *sequential(scene, STEPS), scene


def changes_inside(strides: list[int], config: StrategyConfig) -> int:
    """How many changes windows ran across: those that are not the last step of a stride."""
    ends = [0, *accumulate(strides)]
    return sum(strategy.due(config, step) for a, b in pairwise(ends) for step in range(a, b - 1))


def traced(
    config: StrategyConfig, options: dict[str, Any], across: bool = False
) -> tuple[Any, ...]:
    scene = Pulled(config, across=across)
    optimizer = scene.wrap(total_steps=STEPS, **options)
    return *run(scene, optimizer, range(STEPS)), optimizer.stats.strides


def test_everything_happens_in_these_runs() -> None:
    happened = expected(SHORT)[2].happened
    assert min(happened[kind] for kind in ("removed", "halves", "duplicates", "reset")) >= 3
    assert expected(LONG)[2].happened.keys() == happened.keys()


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("config", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 16])
def test_bitwise_after_every_step(window: int, config: StrategyConfig, across: bool) -> None:
    losses, states, _ = expected(config)
    got_losses, got_states, strides = traced(config, {"window": window}, across)
    assert_same_bits(got_losses, losses)
    assert_same_bits(got_states, states)
    assert changes_inside(strides, config) == 0
    assert window == 1 or max(strides) > 1


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("config", [SHORT, LONG], ids=["short", "long"])
def test_bitwise_on_processes(pools: Pools, world_size: int, config: StrategyConfig) -> None:
    losses, states, _ = expected(config)
    for got_losses, got_states, strides in pools(world_size).run(traced, config, {"window": 5}):
        assert_same_bits(got_losses, losses)
        assert_same_bits(got_states, states)
        assert max(strides) > 1


@given(
    st.integers(1, 16),
    st.builds(
        StrategyConfig,
        start=st.integers(0, 8),
        stop=st.integers(8, 20),
        every=st.integers(1, 9),
        gradient=st.sampled_from([0.0, 0.004, math.inf]),
        split_scale=st.sampled_from([0.0, 0.4, 9.0]),
        least_opacity=st.sampled_from([0.0, 0.3, 0.45]),
        largest_scale=st.sampled_from([None, 0.4, 0.7]),
        largest_radius=st.sampled_from([None, 0.3]),
        reset_every=st.integers(0, 9),
        reset_opacity=st.just(0.5),
        most=st.sampled_from([1, 30, 60]),
    ),
    st.sampled_from(["hold", "coast"]),
    st.integers(0, 9),
)
@settings(max_examples=12)
def test_bitwise_whatever_the_strategy(
    window: int, config: StrategyConfig, predictor: str, seed: int
) -> None:
    scene, steps = Pulled(config), 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing would be left
        expected = sequential(Pulled(config), steps, seed)
        got = run(scene, scene.wrap(window=window, predictor=predictor, seed=seed), range(steps))
    assert_same_bits(got, expected)


OTHERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "fused": functools.partial(torch.optim.AdamW, fused=True),
    "foreach": functools.partial(torch.optim.Adam, foreach=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("one", [True, False], ids=["one with groups", "one each"])
@pytest.mark.parametrize("name", OTHERS)
def test_bitwise_with_other_optimizers(name: str, one: bool) -> None:
    losses, states = sequential(Pulled(base=OTHERS[name], one=one), STEPS)
    scene = Pulled(base=OTHERS[name], one=one)
    got = run(scene, scene.wrap(window=5), range(STEPS))
    assert_same_bits(got, (losses, states))
    assert len(scene.statistics.views) != 24


# Steps 8 and 17 end with a densification, step 6 with a reset, step 20 with both.
@pytest.mark.parametrize("at", [6, 7, 8, 9, 10, 17, 18, 19, 20, 21, 22])
def test_resumes_bitwise_with_another_window(at: int) -> None:
    """Into a scene of the first size, as a run is resumed: scene, optimizers, wrapper, then the checkpoint."""
    losses, states, _ = expected(SHORT)
    scene = Pulled()
    optimizer = scene.wrap(window=8)
    run(scene, optimizer, range(at))
    saved = copy.deepcopy((scene.state_dict(), optimizer.state_dict()))
    again = Pulled()
    resumed = again.wrap(window=5)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert_same_bits(state_of(again), states[at - 1])
    got = run(again, resumed, range(at, STEPS))
    assert_same_bits(got, (losses[at:], states[at:]))


def resumed_on_ranks(saved: tuple[Any, Any], at: int) -> tuple[list[Any], list[Any]]:
    scene = Pulled()
    optimizer = scene.wrap(window=3)
    scene.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return run(scene, optimizer, range(at, STEPS))


def test_resumes_bitwise_on_processes(pools: Pools) -> None:
    losses, states, _ = expected(SHORT)
    scene = Pulled()
    optimizer = scene.wrap(window=8)
    run(scene, optimizer, range(9))
    saved = copy.deepcopy((scene.state_dict(), optimizer.state_dict()))
    for got in pools(2).run(resumed_on_ranks, saved, 9):
        assert_same_bits(got, (losses[9:], states[9:]))


@pytest.mark.parametrize("config", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("tolerance", [1e-2, math.inf])
def test_the_papers_window_runs_across(
    pools: Pools, config: StrategyConfig, tolerance: float
) -> None:
    """What was evaluated for the parents is used for their children where those have not moved too far, on ranks too.

    At the lower tolerance halves have: what was accepted behind such a change is dropped.
    """
    options = {"window": 8, "tolerance": tolerance}
    one = traced(config, options, across=True)
    losses, states, strides = one
    assert sum(strides) > STEPS if tolerance < 1 else sum(strides) == STEPS
    assert tolerance < 1 or changes_inside(strides, config) > 0
    assert all(math.isfinite(loss) for loss in losses)
    for tensors, _ in states:
        assert all(bool(value.isfinite().all()) for value in tensors.values())
        assert {len(value) for value in tensors.values()} == {len(tensors["statistics.views"])}
    for other in pools(2).run(traced, config, options, True):
        assert_same_bits(other, one)


@pytest.mark.parametrize("across", [False, True])
def test_each_step_counts_once_in_the_statistics(across: bool) -> None:
    """Three Gaussians are seen by each step; what runs across a change counts for the children."""
    scene = Pulled(LONG, across=across)
    optimizer = scene.wrap(window=7, tolerance=math.inf, total_steps=STEPS)
    since = 0
    for step in range(STEPS):
        optimizer.step(scene.closure)
        since = 0 if strategy.densifies(LONG, step) else since + 1
        assert since <= int(scene.statistics.views.sum()) or across
        assert int(scene.statistics.views.max()) <= since
        assert (int(scene.statistics.views.sum()) > 0) == (since > 0)


class Stop:
    """Raises at the nth line of the code that changes the Gaussians, whoever runs it."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        self.places = (picardopt_3d.scenes.gaussians.__path__[0], gaussians.__file__)
        self.inside: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self.places):
            return None
        if event == "call" and code.co_name == "restructured":
            self.inside = frame
        if event == "return" and frame is self.inside:
            self.inside = None
        if event == "line" and self.inside is not None:
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize(
    "one", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["one with groups", "one each"]
)
def test_an_error_at_any_line_of_a_change_leaves_the_last_step(one: bool) -> None:
    """Step 20 densifies and resets. It fails at its first line, then at the next ..., and at last succeeds."""
    losses, states = sequential(Pulled(one=one), STEPS)
    scene = Pulled(one=one)
    optimizer = scene.wrap(window=4)
    assert strategy.densifies(SHORT, 20)
    assert strategy.resets(SHORT, 20)
    run(scene, optimizer, range(20))
    tensors = [*scene.parameters(), *scene.buffers()]
    lines, happened = 0, scene.happened.copy()
    while optimizer.step_index == 20:
        lines += 1
        stop = Stop(lines)
        sys.settrace(stop)
        try:
            loss = optimizer.step(scene.closure).total
        except KeyboardInterrupt:
            assert all(
                a is b
                for a, b in zip(tensors, [*scene.parameters(), *scene.buffers()], strict=True)
            )
            assert_same_bits(state_of(scene), states[19])
            assert scene.happened == happened
        finally:
            sys.settrace(None)
    assert lines > 100
    assert_same_bits([loss, state_of(scene)], [losses[20], states[20]])
    assert_same_bits(run(scene, optimizer, range(21, STEPS)), (losses[21:], states[21:]))


def failed_once(step: int) -> tuple[list[Any], list[Any]]:
    scene = Pulled()
    optimizer = scene.wrap(window=4)
    start = run(scene, optimizer, range(step))
    before = state_of(scene)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch.nn, "Parameter", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        optimizer.step(scene.closure)
    assert optimizer.step_index == step
    assert_same_bits(state_of(scene), before)
    end = run(scene, optimizer, range(step, STEPS))
    return start[0] + end[0], start[1] + end[1]


@pytest.mark.parametrize("step", [6, 8, 20])
def test_a_change_that_failed_on_all_processes_can_be_made_again(pools: Pools, step: int) -> None:
    losses, states, _ = expected(SHORT)
    for got in pools(2).run(failed_once, step):
        assert_same_bits(got, (losses, states))


def test_ctrl_c_in_the_middle_of_a_change_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, states, _ = expected(SHORT)
    scene = Pulled()
    optimizer = scene.wrap(window=4)
    run(scene, optimizer, range(8))
    apply = strategy.apply

    def pressed(*args: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return apply(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(strategy, "apply", pressed)
        optimizer.step(scene.closure)
    assert optimizer.step_index == 9
    assert_same_bits(state_of(scene), states[8])
    assert_same_bits(run(scene, optimizer, range(9, STEPS)), (losses[9:], states[9:]))
