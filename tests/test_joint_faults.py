"""Joined calls where something goes wrong: errors and misuse. No thread is left."""

import itertools
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picardopt import (
    BatchedCallError,
    ImpureClosureError,
    ParallelPicardOptimizer,
    PicardWarning,
    StepRelativeTolerance,
    batched,
)
from tests.helpers.joint_loop import Loop, nothing
from tests.helpers.shared import SIZE, Scene, assert_same, one_call, run, slot_by_slot, target

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("slot", [1, 3])
def test_a_slot_that_raises_fails_alone(where: str, slot: int) -> None:
    """The steps before it are kept; at the head the error is the user's own."""
    loop = Loop(nothing)
    loop.steps(9)
    bad = loop.run_out() + slot

    def fail(step: int, at: str) -> None:
        if step == bad and at == where:
            raise ValueError("a bad step")

    loop.extra = fail
    before = loop.optimizer.stats.joined_calls
    with pytest.warns(PicardWarning, match="a bad step"):
        loop.steps(slot)
    assert loop.optimizer.stats.failed_speculations >= 1
    if slot > 1:
        assert loop.optimizer.stats.joined_calls > before
    state = loop.state()
    with pytest.raises(ValueError, match="a bad step"):
        loop.steps(1)
    assert loop.optimizer.step_index == bad
    assert all(torch.equal(a, b) for a, b in zip(loop.state(), state, strict=True))
    loop.extra = nothing
    loop.steps(6)


def test_a_call_that_fails_for_several_slots_is_made_for_each() -> None:
    """Out of memory, say; said once."""
    calls: list[int] = []

    def small(x: Tensor, level: Tensor) -> Tensor:
        calls.append(len(x))
        if len(x) > 3:
            raise MemoryError("too many rows")
        return target(x, level)

    with pytest.warns(PicardWarning, match="MemoryError.*called for each from now on") as caught:
        got = run(Scene(), score=batched(small))
    assert len(caught) == 1
    assert sum(rows > 3 for rows in calls) == 1
    assert got.stats.joined_calls == 0
    with slot_by_slot():
        assert_same(got, run(Scene(), score=batched(target)))


def test_the_functions_error_belongs_to_its_slot() -> None:
    """The joined call raises because of one slot's rows."""

    limits: list[float] = []

    def picky(x: Tensor, level: Tensor) -> Tensor:
        if limits and (level > limits[0]).any():
            raise ValueError("a level above 0.9")
        return target(x, level)

    loop = Loop(nothing, score=batched(picky))
    loop.steps(9)
    limits.append(0.9)
    with pytest.warns(PicardWarning), pytest.raises(ValueError, match=r"above 0\.9"):
        loop.steps(60)
    at_the_head = loop.optimizer.step_index
    from picardopt import step_rng

    with step_rng(0, at_the_head), pytest.raises(ValueError, match=r"above 0\.9"):
        loop.closure(at_the_head)


def mean_of_all(x: Tensor, level: Tensor) -> Tensor:
    return target(x, level) - x.mean(0)


class Reader:
    """Reads the scene that is optimized."""

    def __init__(self) -> None:
        self.scene: Scene | None = None

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        assert self.scene is not None
        return target(x, level) * self.scene.second[1].bias


def total(x: Tensor, level: Tensor) -> Tensor:
    return (x * level).sum(0, keepdim=True)


def test_rows_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(BatchedCallError, match="mean_of_all gives other rows"):
        Loop(nothing, score=batched(mean_of_all)).steps(30)
    norm = nn.BatchNorm1d(SIZE, track_running_stats=False).double()
    with pytest.raises(BatchedCallError, match="BatchNorm1d gives other rows"):
        Loop(nothing, score=_first_argument(batched(norm))).steps(30)


def _first_argument(score: Any) -> Any:
    return lambda x, level: score(x)


def test_a_function_that_reads_the_parameters_is_refused() -> None:
    reader = Reader()
    loop = Loop(nothing, score=batched(reader))
    reader.scene = loop.scene
    with pytest.raises(BatchedCallError, match=r"it reads the optimizer's parameters"):
        loop.steps(30)


def test_a_parameter_times_zero_is_not_taken_for_reading() -> None:
    """As LoRA with a scale of 0 in the network that the pretrained score comes from."""
    reader = Reader()

    def score(x: Tensor, level: Tensor) -> Tensor:
        return target(x, level) + 0 * reader(x, level)

    loop = Loop(nothing, score=batched(score))
    reader.scene = loop.scene
    loop.steps(20)
    assert loop.optimizer.stats.joined_calls > 0


def test_a_result_without_one_row_for_each_is_refused() -> None:
    """With one row it looks like one; joined it does not."""

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        seen = scene.view(1)
        return (scene.second(seen) - score(seen.detach(), torch.rand(1, 1))).square().mean()

    with pytest.raises(BatchedCallError, match=r"shape \(1, 4\) for \d rows"):
        run(Scene(), loss, batched(total))


def test_impure_closures_are_found_with_joined_calls() -> None:
    batches = itertools.count()

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        batch = torch.full((3, SIZE), float(next(batches)), dtype=torch.float64)
        seen = scene.first(torch.sin(batch))
        return (scene.second(seen) - score(seen.detach(), torch.rand(3, 1))).square().mean()

    with pytest.raises(ImpureClosureError):
        run(Scene(), loss)


def test_a_closure_that_becomes_impure_later_is_found() -> None:
    """The sweeps whose gradients are audited are evaluated slot by slot, and compared bit by bit."""
    batches, steps = itertools.count(), 0

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        value = 1.0 + 1e-9 * next(batches) * (step > 40)
        seen = scene.view()
        return value * (scene.second(seen) - score(seen.detach(), torch.rand(3, 1))).square().mean()

    with pytest.raises(ImpureClosureError):
        run(Scene(), loss, steps=400, window=3)
    assert steps == 0


def rounded(x: Tensor, level: Tensor) -> Tensor:
    """Rounds differently for other numbers of rows, as kernels do."""
    return target(x, level) * (1 + 1e-12 * len(x))


@pytest.mark.parametrize("audit", ["auto", "always"])
def test_a_pure_closure_is_never_accused(audit: str) -> None:
    stats = run(Scene(), score=batched(rounded), steps=150, audit=audit).stats
    assert stats.audits > 0
    assert (stats.joined_calls > 5) == (audit == "auto")


def test_a_counter_that_changes_does_not_drop_joined_gradients() -> None:
    """It is told from a harmful change by the bits of slots evaluated alone."""
    scene, score, log = Scene(), batched(rounded), {"count": 0}
    optimizer = ParallelPicardOptimizer(
        torch.optim.Adam(scene.parameters(), lr=0.01),
        window=4,
        tolerance=StepRelativeTolerance(1.0),
    )

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        assert log["count"] >= 0
        loss = one_call(scene, score, step)
        loss.backward()
        return loss

    for step in range(60):
        log["count"] += step > 20
        optimizer.step(closure)
    stats = optimizer.stats
    assert stats.joined_calls > 5
    assert stats.outer_changes <= 1
    assert stats.mean_stride > 3


def test_a_closure_that_needs_the_main_thread_gets_it_and_says_so() -> None:
    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        if step > 6:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        return one_call(scene, score, step)

    with pytest.warns(PicardWarning, match="ValueError.*main thread.*for each slot") as caught:
        got = run(Scene(), loss)
    assert len(caught) == 1
    assert got.stats.failed_speculations == 0
    with slot_by_slot():
        assert_same(got, run(Scene(), loss))


def test_a_closure_that_leaves_a_module_changed_around_the_call_is_refused() -> None:
    """Each slot saves the flag that the slot before it has left, and puts that back."""
    flag = {"scale": 1.0}

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        seen = scene.view() * flag["scale"]
        before, flag["scale"] = flag["scale"], 3 * flag["scale"]
        try:
            wanted = score(seen.detach(), torch.rand(3, 1))
        finally:
            flag["scale"] = before
        return (scene.second(seen) - wanted).square().mean()

    with pytest.raises(BatchedCallError, match="Leave nothing changed around the call"):
        run(Scene(), loss)


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_what_other_slots_change_while_one_waits_is_found_by_the_audit(share: float) -> None:
    """A generator of the user's own, seeded by step: after the call it is another slot's."""
    weight, own = torch.nn.Parameter(torch.ones(8)), torch.Generator()
    score = batched(lambda x: torch.sin(x))
    optimizer = ParallelPicardOptimizer(
        torch.optim.SGD([weight], lr=1e-2), window=4, tolerance=float("inf")
    )

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        own.manual_seed(step)
        (gradient,) = score(weight.detach()[None])
        noise = share * torch.randn(8, generator=own)
        loss = (weight * (gradient + noise)).sum()
        loss.backward()
        return loss

    with pytest.raises((ImpureClosureError, BatchedCallError)):
        for _ in range(40):
            optimizer.step(closure)


def test_numbers_in_results_are_refused() -> None:
    def score(x: Tensor) -> tuple[Tensor, float]:
        return 2 * x, float(x.mean())

    with pytest.raises(BatchedCallError, match="score returned a number"):
        batched(score)(torch.ones(2, 3))
