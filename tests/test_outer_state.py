"""What the loop changes between two steps is legal: sequentially the next step sees it, and here it does too."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picardopt import ParallelPicardOptimizer, PicardWarning, step_rng
from tests.helpers.loops import AT_EVERY_STEP, EVERY, LOOPS, STEPS, Net, ahead, error, sequential
from tests.helpers.pool import Pools


@pytest.mark.parametrize(
    ("name", "window"), [*((name, 8) for name in LOOPS), ("changing_weight", 2)]
)
def test_tolerance_zero_is_the_sequential_run(name: str, window: int) -> None:
    expected_losses, expected = sequential(name)
    losses, got, optimizer = ahead(name, window=window)
    for step, (a, b) in enumerate(zip(losses, expected_losses, strict=True)):
        assert torch.equal(a, b), f"step {step}"
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    stats = optimizer.stats
    if name in AT_EVERY_STEP:
        assert stats.sweeps == STEPS
    else:  # and it did run ahead: else this shows nothing
        assert stats.sweeps < 0.8 * STEPS
        assert stats.outer_changes > 0
        assert stats.outer_changes <= STEPS // 7


def on_ranks(name: str, tolerance: Any, bar: bool) -> tuple[list[Tensor], list[Tensor], int, int]:
    """One rank of a run; with `bar`, rank 0 alone counts steps where the closure sees it."""
    if not bar:
        losses, got, optimizer = ahead(name, 110, tolerance=tolerance)
        return losses, got, optimizer.stats.outer_changes, optimizer.stats.sweeps
    rank = torch.distributed.get_rank()
    progress, model = {"step": 0}, Net()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = ParallelPicardOptimizer(base, window=8, tolerance=tolerance)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = error(model)
        loss.backward()
        progress.get("step")
        return loss

    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PicardWarning)
        for step in range(60):
            losses.append(optimizer.step(closure))
            if rank == 0:
                progress["step"] = step
    got = [p.detach().clone() for p in model.parameters()]
    return losses, got, optimizer.stats.outer_changes, optimizer.stats.sweeps


@pytest.mark.parametrize("tolerance", [0, None])
@pytest.mark.parametrize("bar", [False, True])
def test_ranks_drop_together(pools: Pools, bar: bool, tolerance: Any) -> None:
    results = pools(2).run(on_ranks, "changing_weight", tolerance, bar)
    first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert first[2:] == second[2:]
    if tolerance == 0 and not bar:
        expected_losses, expected = sequential("changing_weight", 110)
        assert all(torch.equal(a, b) for a, b in zip(first[0], expected_losses, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first[1], expected, strict=True))
        assert first[2] > 0
    if bar:
        assert (first[3] == 60) == (tolerance == 0)


def test_flush_is_for_what_cannot_be_seen(tmp_path: Any) -> None:
    """A weight in a file: with `flush` after each change the run is the sequential one."""
    path = tmp_path / "weight"

    def run(
        step_of: Callable[[Net], tuple[Callable[..., Any], Callable[[], None]]],
    ) -> list[Tensor]:
        model = Net()
        path.write_text("1.0")

        def closure(step: int) -> Tensor:
            model.zero_grad()
            loss = float(path.read_text()) * error(model)
            loss.backward()
            return loss

        step_once, flush = step_of(model)
        for step in range(120):
            if step % EVERY == EVERY - 1:
                path.write_text("0.25")
                flush()
            step_once(closure, step)
        return [p.detach().clone() for p in model.parameters()]

    def plain(model: Net) -> tuple[Callable[..., Any], Callable[[], None]]:
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def step_once(closure: Callable[..., Any], step: int) -> None:
            with step_rng(0, step):
                closure(step)
                base.step()

        return step_once, lambda: None

    def ours(model: Net) -> tuple[Callable[..., Any], Callable[[], None]]:
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = ParallelPicardOptimizer(base, window=8, tolerance=0, audit="never")
        return lambda closure, step: optimizer.step(closure), optimizer.flush

    assert all(torch.equal(a, b) for a, b in zip(run(plain), run(ours), strict=True))


def test_never_looks_at_tolerance_zero_all_the_same() -> None:
    expected_losses, _ = sequential("changing_weight", 110)
    losses, _, optimizer = ahead("changing_weight", 110, audit="never")
    assert all(torch.equal(a, b) for a, b in zip(losses, expected_losses, strict=True))
    assert optimizer.stats.audits == 0
