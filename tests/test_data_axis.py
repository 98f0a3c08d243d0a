"""The data axis: ranks of one row share a slot, split its batch and average their gradients."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from picardopt import ParallelPicardOptimizer, step_rng
from picardopt.engines.average import average_losses, mean
from tests.helpers.meshes import (
    BASES,
    FAULTS,
    STEPS,
    Network,
    Run,
    build,
    check,
    loss_of,
    make_closure,
    meshed_run,
    plain_run,
    record,
)
from tests.helpers.pool import Pools, fresh_pool
from tests.helpers.runs import (
    SECONDS,
    Trace,
    assert_same_bits,
    assert_same_trace,
    stats_of,
)

RUNS = [
    Run((1, 2), window=4),
    Run((1, 2), window=3, ddp="copies"),
    Run((2, 2)),
    Run((2, 2), window=5, base="SGD"),
    Run((2, 2), ddp="copies"),
    Run((2, 2), window=5, ddp="views", audit="always"),
    Run((2, 2), dims=("data", "picard"), window=3),
    Run((1, 3), window=4),
    Run((2, 1), window=3),
    Run((3,), dims=("picard",)),
    Run((2,), dims=("data",), window=4),
    Run((1, 2), window=4, norm=True),
    Run((2, 2), norm=True, ddp="copies"),
    Run((1, 4), window=3),
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_exact_on_meshes(pools: Pools, run: Run) -> None:
    """Law 1 for every mesh with the same data size, with and without DistributedDataParallel."""
    check(run, pools(run.ranks).run(meshed_run, run))


@pytest.mark.parametrize("run", [Run((2,), dims=("data",)), Run((1, 3))], ids=str)
def test_only_data_is_plain_data_parallelism(pools: Pools, run: Run) -> None:
    """One Picard rank: a window of 1, nothing guessed."""
    for trace in pools(run.ranks).run(meshed_run, run):
        assert_same_trace(trace, plain_run(run))
        assert trace.stats["window"] == 1
        assert trace.stats["sweeps"] == trace.stats["drift_evaluations"] == STEPS


def test_the_default_window_is_the_number_of_picard_ranks(pools: Pools) -> None:
    for trace in pools(4).run(meshed_run, Run((2, 2))):
        assert trace.stats["window"] == 2


@pytest.mark.parametrize("parts", [2, 4])
def test_ddp_alone_gives_the_same_bits(pools: Pools, parts: int) -> None:
    """The mean over a row is DistributedDataParallel's own, for two data ranks to the bit."""
    run = Run((1, parts), ddp="copies")
    for got in pools(parts).run(ddp_without_us, run):
        expected = plain_run(run).parameters[-1]
        if parts == 2:
            assert_same_bits(got, expected)
        torch.testing.assert_close(got, expected)


def ddp_without_us(run: Run) -> list[Tensor]:
    mesh = init_device_mesh("cpu", run.shape, mesh_dim_names=run.dims)
    model = Network()
    called = DistributedDataParallel(
        model, process_group=mesh.get_group("data"), find_unused_parameters=True
    )
    base = BASES[run.base](model.parameters())
    for t in range(STEPS):
        base.zero_grad()
        with step_rng(0, t):
            loss_of(called, mesh.get_local_rank("data"), run.parts).backward()
        base.step()
    return [p.detach().clone() for p in model.parameters()]


def with_four(window: int) -> tuple[list[Tensor], dict[str, Any]]:
    """DistributedDataParallel over four ranks, whose sums depend on its buckets."""
    model, called, optimizer = build(
        Run((1, 4), window=window, dense=True, ddp="views", audit="always")
    )
    closure = make_closure(called, optimizer)
    for _ in range(STEPS):
        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()], stats_of(optimizer)


@pytest.mark.parametrize("window", [1, 3])
def test_ddp_over_four_ranks(pools: Pools, window: int) -> None:
    """To rounding, alike on every rank, and no impurity is seen where only the order of sums changed."""
    results = pools(4).run(with_four, window)
    expected = plain_run(Run((1, 4), dense=True)).parameters[-1]
    for got, stats in results:
        assert_same_bits(got, results[0][0])
        assert stats == results[0][1]
        torch.testing.assert_close(got, expected)


def permuted(ranks: list[list[int]]) -> Trace | None:
    """A mesh that lists the ranks in an order of its own, perhaps not all of them."""
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("picard", "data"))
    place = mesh.get_coordinate()
    if place is None:
        return None
    model = Network()
    optimizer = ParallelPicardOptimizer(BASES["Adam"](model.parameters()), mesh=mesh, tolerance=0)
    assert optimizer.data_rank == place[1]
    closure, trace = make_closure(model, optimizer), Trace()
    for _ in range(STEPS):
        record(trace, optimizer.step(closure), model, optimizer)
    trace.stats = stats_of(optimizer)
    return trace


@pytest.mark.parametrize("ranks", [[[0, 2], [1, 3]], [[3, 1], [0, 2]]], ids=str)
def test_any_order_of_ranks(pools: Pools, ranks: list[list[int]]) -> None:
    check(Run((2, 2)), pools(4).run(permuted, ranks))


@pytest.mark.slow
def test_a_mesh_over_some_of_the_ranks() -> None:
    """One rank of five trains apart from it: the mesh's four make a group of their own."""
    with fresh_pool(5) as pool:
        traces = pool.run(permuted, [[4, 1], [0, 3]])
    assert traces[2] is None
    check(Run((2, 2)), [trace for trace in traces if trace is not None])


# --- The mean -------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.integers(2, 9),
)
def test_equal_gradients_keep_their_bits(values: list[float], parts: int) -> None:
    """DistributedDataParallel averaged them already; thirds of a number do not add up to it."""
    row = torch.tensor(values)
    assert_same_bits(mean([row.clone() for _ in range(parts)]), row)
    assert mean([values[0]] * parts) == values[0]


def test_what_closures_return_is_averaged() -> None:
    first = {"loss": torch.tensor(1.0), "seen": 3, "parts": [2.0, torch.tensor([1, 2])], "tag": "a"}
    second = {
        "loss": torch.tensor(2.0),
        "seen": 5,
        "parts": [4.0, torch.tensor([7, 8])],
        "tag": "b",
    }
    assert_same_bits(
        average_losses([first, second]),
        {"loss": torch.tensor(1.5), "seen": 3, "parts": [3.0, torch.tensor([1, 2])], "tag": "a"},
    )
    assert average_losses([None, None]) is None
    assert average_losses([0, 0.5]) == 0.25  # a part of the batch in which nothing was seen
    with pytest.raises(ValueError, match="different structures or shapes"):
        average_losses([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="different structures or shapes"):
        average_losses([1.0, None])


# --- Planted faults: the checks above must find them ----------------------------------------------


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault])
def test_planted_faults_are_found(pools: Pools, fault: str) -> None:
    started = time.perf_counter()
    run = Run((1, 3), window=3, audit="never", timeout=5.0)
    outcomes = pools(3).outcomes(meshed_run, run, fault)
    if all(outcome.error is None for outcome in outcomes):
        with pytest.raises(AssertionError):
            check(run, [outcome.value for outcome in outcomes])
    else:  # ranks that part notice it themselves
        assert any("RankMismatchError" in outcome.text for outcome in outcomes)
        pools(3).kill()
    assert time.perf_counter() - started < SECONDS
