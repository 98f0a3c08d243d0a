"""Joined calls on several ranks: each joins those of its own slots, and ranks of a data row stay in step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from picardopt import ParallelPicardOptimizer, Restructure, StepRelativeTolerance, batched
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.helpers.shared import Result, Scene, assert_same, one_call, run, slot_by_slot, target
from tests.helpers.splats import Densify, Splats, due


def both(job: Callable[..., Result], *args: Any) -> tuple[Result, Result]:
    """A job with joined calls and slot by slot, on this rank."""
    got = job(*args)
    with slot_by_slot():
        expected = job(*args)
    return got, expected


def ranks_run(window: int) -> Result:
    return run(Scene("batchnorm"), window=window, steps=30, process_group=dist.group.WORLD)


@pytest.mark.parametrize("window", [4, 5, 8])
def test_two_ranks_join_the_calls_of_their_own_slots(pools: Pools, window: int) -> None:
    results = pools(2).run(both, ranks_run, window)
    for got, expected in results:
        assert_same(got, expected)
        assert got.losses == results[0][0].losses
        assert_same_bits(got.parameters, results[0][0].parameters)
        assert expected.stats.joined_calls == 0
        assert got.stats.joined_calls > 0


def meshed_run(shape: tuple[int, int], window: int, ddp: bool) -> Result:
    """Every rank of a data row takes a part of the batch; collectives stand before and after the call."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("picard", "data"))
    group, part = mesh.get_group("data"), mesh.get_local_rank("data")
    scene = Scene()
    called = DistributedDataParallel(scene.first, process_group=group) if ddp else scene.first

    def loss(scene: Scene, score: Any, step: int) -> Tensor:
        batch = torch.randn(4, 4, dtype=torch.float64)[part::2]
        seen = called(batch)
        size = seen.detach().square().mean()
        dist.all_reduce(size, group=group)
        wanted = score(seen.detach() / size, torch.rand(2, 1, dtype=torch.float64))
        level = wanted.mean()
        dist.all_reduce(level, group=group)
        return (scene.second(seen) - wanted * level).square().mean()

    return run(scene, loss, window=window, steps=30, mesh=mesh, carry=None)


@pytest.mark.parametrize(("shape", "window"), [((1, 2), 4), ((2, 2), 4), ((2, 2), 6)], ids=str)
def test_ranks_of_a_data_row_keep_their_collectives_in_order(
    pools: Pools, shape: tuple[int, int], window: int
) -> None:
    results = pools(shape[0] * shape[1]).run(both, partial(meshed_run, ddp=False), shape, window)
    for got, expected in results:
        assert_same(got, expected)
        assert_same_bits(got.parameters, results[0][0].parameters)
        assert got.stats.joined_calls > 3


def test_ddp_averages_each_backward_after_its_forward(pools: Pools) -> None:
    """Slot by slot: of two forwards before the backwards it would average one."""
    for got, expected in pools(2).run(both, partial(meshed_run, ddp=True), (1, 2), 4):
        assert_same(got, expected)
        assert got.stats.joined_calls == 0
        assert max(got.strides) > 1


def failing_run(bad: int) -> tuple[str, int, int]:
    scene, score = Scene(), batched(target)
    optimizer = ParallelPicardOptimizer(
        torch.optim.Adam(scene.parameters(), lr=0.01),
        window=4,
        tolerance=StepRelativeTolerance(1.0),
        process_group=dist.group.WORLD,
    )

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = one_call(scene, score, step)
        if step == bad:
            raise ValueError("a bad step")
        loss.backward()
        return loss

    try:
        for _ in range(40):
            optimizer.step(closure)
    except ValueError as error:
        return str(error), optimizer.step_index, optimizer.stats.joined_calls
    return "", optimizer.step_index, 0


def test_an_error_in_a_thread_reaches_every_rank(pools: Pools) -> None:
    found = pools(2).run(failing_run, 22)
    assert [each[:2] for each in found] == [("a bad step", 22)] * 2
    assert all(joined > 0 for *_, joined in found)


def splats_run(score: Any) -> tuple[list[Any], Any]:
    splats = Splats()
    optimizers = splats.optimizers()
    optimizer = ParallelPicardOptimizer(
        list(optimizers.values()),
        window=4,
        tolerance=StepRelativeTolerance(0.5),
        restructure=Restructure(Densify(splats, optimizers), due, across=True),
        carry=splats,
        seed=3,
    )

    def closure(step: int) -> Tensor:
        splats.zero_grad()
        x = 2 * torch.rand(16) - 1
        seen = splats(x)
        wanted = score(seen.detach(), x)
        loss = (seen - wanted).square().mean()
        loss.backward()
        with torch.no_grad():
            assert splats.means.grad is not None
            splats.slopes += splats.means.grad.abs()
            splats.seen += 1
        return loss

    states = []
    for _ in range(33):
        loss = float(optimizer.step(closure))
        tensors = [t.detach().clone() for t in [*splats.parameters(), *splats.buffers()]]
        states.append((loss, tensors))
    return states, optimizer.stats


def towards(seen: Tensor, x: Tensor) -> Tensor:
    return seen + (torch.sin(5 * x) - seen) / 2


def test_scenes_that_grow() -> None:
    """Parameters are replaced every few steps, also between the slots of a window."""
    got, stats = splats_run(batched(towards))
    with slot_by_slot():
        expected, _ = splats_run(batched(towards))
    assert_same_bits(got, expected)
    assert stats.joined_calls > 3
    assert len(got[-1][1][0]) > 6
