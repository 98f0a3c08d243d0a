"""StepIndexedSource: what a loop would draw from a generator, addressed by step."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from picardopt import ParallelPicardOptimizer, PicardWarning, StepIndexedSource, step_rng
from picardopt.source import needed_from
from tests.helpers.pool import Pools
from tests.helpers.problems import quantize
from tests.helpers.runs import assert_same_bits

STEPS = 30


def stream(count: int | None = None) -> Iterator[Tensor]:
    """Walks by what it draws from its own generator and from torch's global one: no item can be made alone."""
    own, item = torch.Generator().manual_seed(3), torch.zeros(4)
    for _ in itertools.count() if count is None else range(count):
        item = 0.9 * item + torch.randn(4, generator=own) + 0.1 * torch.randn(4)
        yield item


def drawn(count: int, seed: int = 0) -> list[Tensor]:
    """What a loop draws that asks for nothing twice and nothing ahead."""
    items, found = stream(), []
    for step in range(count):
        with step_rng(seed, -1 - step):
            found.append(next(items))
    return found


SEQUENTIAL = drawn(50)


class Numbers(IterableDataset[int]):
    """Seven numbers, in another order each time."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(7).tolist())


# -- as windows ask ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_any_window_from_any_step_on_gives_the_sequential_draws(seed: int) -> None:
    """Sweeps of any stride, repeated questions, a resumption with a new source and another window."""
    chance = random.Random(seed)
    source, head = StepIndexedSource(stream()), 0
    while head < 40:
        if chance.random() < 0.05:
            source = StepIndexedSource(stream())
        window = chance.randint(1, 9)
        asked = [chance.randrange(window) for _ in range(chance.randint(1, 12))]
        with needed_from(head):
            for ahead in asked:
                assert torch.equal(source(head + ahead), SEQUENTIAL[head + ahead])
        assert len(source._stream._items) <= 9
        head += chance.randint(1, window)


@pytest.mark.parametrize("window", [1, 2, 9])
def test_no_more_is_kept_than_the_window(window: int) -> None:
    alive: list[int] = []

    class Item:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    source = StepIndexedSource(Item)
    for head in range(40):
        with needed_from(head):
            for ahead in range(window):
                source(head + ahead)
        assert len(alive) == window


def test_a_loop_of_its_own_may_ask_again_and_keeps_few() -> None:
    """Without an optimizer nobody says what is needed: the last 64 stay."""
    expected = drawn(200)
    source = StepIndexedSource(stream())
    order = [max(0, step - random.Random(step).randrange(60)) for step in range(200)]
    assert all(torch.equal(source(step), expected[step]) for step in order)
    source(199)
    assert len(source._stream._items) == 65


def test_the_step_that_asks_first_lends_no_randomness() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    source = StepIndexedSource(stream())
    with step_rng(0, 17):
        late = source(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(late, drawn(4)[3])
    assert not torch.equal(late, StepIndexedSource(stream(), seed=1)(3))


# -- what may be given -------------------------------------------------------------------------------------


def test_a_function_is_called_once_a_step() -> None:
    items = iter(range(100))
    source = StepIndexedSource(lambda: [next(items) for _ in range(3)])
    assert source(2) == [6, 7, 8]
    assert source(0) == [0, 1, 2]
    assert source(3) == [9, 10, 11]


def test_an_iterable_is_begun_anew_as_by_epochs() -> None:
    source = StepIndexedSource(DataLoader(Numbers(), batch_size=3))
    epochs = [torch.cat([source(3 * epoch + i) for i in range(3)]) for epoch in range(4)]
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_a_stream_that_was_moved_forward_resumes_at_start() -> None:
    source = StepIndexedSource(iter(range(20, 100)), start=20)
    assert source(25) == 25
    with pytest.raises(IndexError, match=r"begins at step 20 \(start=20\)"):
        source(19)


@pytest.mark.parametrize("draw", [3, None, torch.utils.data.Dataset()])
def test_what_cannot_be_drawn_from_is_refused(draw: Any) -> None:
    with pytest.raises(TypeError, match="a function without arguments"):
        StepIndexedSource(draw)


# -- errors ------------------------------------------------------------------------------------------------


def test_what_is_no_longer_kept_is_said() -> None:
    source = StepIndexedSource(iter(range(100)))
    with needed_from(40):
        source(45)
    with pytest.raises(IndexError, match="keeps items from step 40 on"):
        source(39)
    with pytest.raises(IndexError, match="counted from 0"):
        source(-1)
    with pytest.raises(ValueError, match="start=-1"):
        StepIndexedSource(iter([]), start=-1)


def test_several_items_a_step_asked_one_by_one_are_refused_before_they_fill_the_memory() -> None:
    source = StepIndexedSource(iter(range(10_000)))
    with needed_from(100), pytest.raises(IndexError, match="let draw return them together"):
        source(100 + 1024)


def test_an_iterable_that_can_be_read_only_once_is_said() -> None:
    class Once:
        def __init__(self) -> None:
            self.items = iter(range(3))

        def __iter__(self) -> Iterator[int]:
            return self.items

    source = StepIndexedSource(Once())
    assert source(2) == 2
    for _ in range(2):
        with pytest.raises(ValueError, match="more than once"):
            source(3)


def test_an_error_of_a_draw_is_final() -> None:
    """An iterator that raised may have lost an item: the next one must not take its place."""
    calls = iter(range(100))

    def draw() -> int:
        call = next(calls)
        if call == 3:
            raise OSError("a broken file")
        return call

    source = StepIndexedSource(draw)
    for step in (5, 3, 4):
        with pytest.raises(OSError, match="a broken file"):
            source(step)
    assert source(2) == 2


def test_an_interrupted_draw_is_said() -> None:
    def draw() -> int:
        raise KeyboardInterrupt

    source = StepIndexedSource(draw, start=4)
    with pytest.raises(KeyboardInterrupt):
        source(4)
    with pytest.raises(RuntimeError, match="with start=4"):
        source(4)


# -- in the optimizer --------------------------------------------------------------------------------------


def loss_of(parameter: Tensor, item: Tensor) -> Tensor:
    return (quantize(parameter) - item).square().mean() * (1 + 0.1 * torch.rand(()))


def sequential(steps: int = STEPS) -> Tensor:
    parameter, items = torch.nn.Parameter(torch.zeros(4)), drawn(steps)
    base = torch.optim.Adam([parameter], lr=2e-3)
    for step in range(steps):
        with step_rng(0, step):
            base.zero_grad()
            loss_of(parameter, items[step]).backward()
            base.step()
    return parameter.detach()


def make(
    draw: Any, window: int, **options: Any
) -> tuple[ParallelPicardOptimizer, Callable[[int], Tensor], torch.nn.Parameter]:
    parameter, source = torch.nn.Parameter(torch.zeros(4)), StepIndexedSource(draw)
    base = torch.optim.Adam([parameter], lr=2e-3)
    optimizer = ParallelPicardOptimizer(base, window=window, tolerance=0, **options)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(parameter, source(step))
        loss.backward()
        return loss

    return optimizer, closure, parameter


def run(optimizer: ParallelPicardOptimizer, closure: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("audit", ["auto", "always"])
def test_a_run_is_the_sequential_one(window: int, audit: str) -> None:
    optimizer, closure, parameter = make(stream(), window, audit=audit)
    run(optimizer, closure, STEPS)
    assert_same_bits(parameter, sequential())
    assert optimizer.stats.outer_changes == 0  # a draw is no change by the loop
    assert window == 1 or optimizer.stats.mean_stride > 1.5


def test_the_optimizer_says_what_it_still_needs() -> None:
    """With ten steps ahead at most, ten items are kept; a loop of its own would keep 65."""
    alive: list[int] = []

    class Item:
        def __init__(self) -> None:
            alive.append(1)
            self.value = torch.ones(4)

        def __del__(self) -> None:
            alive.pop()

    parameter, source = torch.nn.Parameter(torch.zeros(4)), StepIndexedSource(Item)
    optimizer = ParallelPicardOptimizer(torch.optim.Adam([parameter]), window=10)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(parameter, source(step).value)
        loss.backward()
        return loss

    for _ in range(90):
        optimizer.step(closure)
        assert len(alive) <= 10
    assert optimizer.stats.mean_stride > 1


def test_a_run_resumes_with_a_new_source_and_another_window() -> None:
    first, closure, parameter = make(stream(), 8)
    for _ in range(STEPS // 2):
        first.step(closure)
    second, closure, resumed = make(stream(), 3)
    with torch.no_grad():
        resumed.copy_(parameter)
    second.load_state_dict(first.state_dict())
    for _ in range(STEPS - STEPS // 2):
        second.step(closure)
    assert_same_bits(resumed, sequential())


def on_a_rank() -> tuple[Tensor, float]:
    optimizer, closure, parameter = make(stream(), 4)
    run(optimizer, closure, STEPS)
    return parameter.detach(), optimizer.stats.mean_stride


def test_every_rank_draws_the_whole_stream(pools: Pools) -> None:
    for parameter, stride in pools(3).run(on_a_rank):
        assert_same_bits(parameter, sequential())
        assert stride > 1.5


def another_stream_on_a_rank() -> str:
    """Rank 1's stream is another one, as if it was shuffled without a seed."""
    torch.manual_seed(torch.distributed.get_rank())
    own = torch.randn(100, 4)
    optimizer, closure, _ = make(iter(own), 4)
    try:
        run(optimizer, closure, STEPS)
    except Exception as error:
        return type(error).__name__
    return "no error"


def test_ranks_with_different_streams_are_found_out(pools: Pools) -> None:
    assert pools(2).run(another_stream_on_a_rank) == ["ImpureClosureError"] * 2


def test_the_end_of_a_stream_ends_the_run_at_its_step() -> None:
    """Ahead of its time it only shortens the stride, with one warning; with total_steps nothing asks beyond it."""
    optimizer, closure, parameter = make(stream(10), 8)
    with pytest.warns(PicardWarning, match="total_steps=10"):
        run(optimizer, closure, 10)
    assert_same_bits(parameter, sequential(10))
    with pytest.raises(IndexError, match="ended after 10 items"):
        optimizer.step(closure)
    assert optimizer.step_index == 10
    optimizer, closure, parameter = make(stream(10), 8, total_steps=10)
    run(optimizer, closure, 10)
    assert_same_bits(parameter, sequential(10))


def test_a_draw_that_raises_ends_the_run_at_its_step() -> None:
    def broken() -> Iterator[Tensor]:
        yield from stream(10)
        raise OSError("a broken file")

    optimizer, closure, parameter = make(broken(), 8)
    with pytest.warns(PicardWarning, match="a broken file"):
        run(optimizer, closure, 10)
    for _ in range(2):
        with pytest.raises(OSError, match="a broken file"):
            optimizer.step(closure)
    assert_same_bits(parameter, sequential(10))
