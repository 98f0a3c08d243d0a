"""The data axis: ranks of one row share a slot, split its batch and average their gradients.

What a run must equal bitwise is written here in plain lines: one process that evaluates the parts of each
step's batch one after the other and averages them in their order.
"""

import os
import pickle
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pool import Pools, fresh_pool
from problems import Problem, quantise
from runs import (
    SECONDS,
    Trace,
    assert_parallel,
    assert_same_bits,
    assert_same_trace,
    attempt,
    quiet,
    stats_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import picardopt.drift
import picardopt.engines.average
from picardopt import ParallelPicardOptimizer, step_rng
from picardopt.engines.average import average_losses, mean

STEPS, BATCH = 12, 12
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


class Network(nn.Module):
    """Quantised layers (see ``problems``), so that guesses are often right to the bit."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(4, 3, generator=draw))
        self.bias = nn.Parameter(torch.randn(4, generator=draw))
        self.second = nn.Parameter(torch.randn(2, 4, generator=draw))
        self.rare = nn.Parameter(torch.randn(4, generator=draw))  # in some parts of the batch only
        self.unused = nn.Parameter(torch.randn(3, generator=draw))
        self.norm = nn.BatchNorm1d(4, affine=False) if norm else nn.Identity()

    def forward(self, x: Tensor, part: int) -> Tensor:
        hidden = torch.tanh(self.norm(x @ quantise(self.first).T + quantise(self.bias)))
        if part == 1:
            hidden = hidden * quantise(self.rare)
        return hidden @ quantise(self.second).T


class Dense(Network):
    """Uses all its parameters in every part, so that DistributedDataParallel rebuilds its buckets."""

    def __init__(self) -> None:
        super().__init__()
        del self.rare, self.unused

    def forward(self, x: Tensor, part: int) -> Tensor:
        return super().forward(x, 0)


@dataclass(frozen=True)
class Run:
    """One run on a mesh, by names, so that it can be sent to a worker."""

    shape: tuple[int, ...]
    dims: tuple[str, ...] = ("picard", "data")
    window: int | None = None
    base: str = "Adam"
    norm: bool = False
    dense: bool = False
    ddp: str = ""
    """"", or DistributedDataParallel with "copies" of gradients or with "views" of its buckets."""
    audit: str = "auto"
    timeout: float = 60.0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        more = [self.base, self.ddp and f"DDP {self.ddp}", "BatchNorm" if self.norm else ""]
        return " ".join([shape, *self.dims, str(self.window), *filter(None, more)])

    def model(self) -> nn.Module:
        return Dense() if self.dense else Network(self.norm)

    @property
    def parts(self) -> int:
        return self.shape[self.dims.index("data")] if "data" in self.dims else 1

    @property
    def ranks(self) -> int:
        return int(torch.tensor(self.shape).prod())


def loss_of(model: nn.Module, part: int, parts: int) -> Tensor:
    """The loss of one part of a batch; the whole batch is drawn whatever the part."""
    x, y = torch.randn(BATCH, 3), torch.randn(BATCH, 2)
    return (model(x[part::parts], part) - y[part::parts]).square().mean()


def plain_run(run: Run) -> Trace:
    """The sequential loop over all parts of each batch."""
    model, trace = run.model(), Trace()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    base = BASES[run.base](parameters)
    for t in range(STEPS):
        losses, gradients, carried = [], [], []
        before = [b.clone() for b in buffers]
        for part in range(run.parts):
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            base.zero_grad()
            with step_rng(0, t):
                loss = loss_of(model, part, run.parts)
                loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad for p in parameters])
            carried.append([b.clone() for b in buffers])
        for buffer, value in zip(buffers, carried[0], strict=True):
            buffer.copy_(value)
        for parameter, own in zip(parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = None
            if any(g is not None for g in own):
                own = [torch.zeros_like(parameter) if g is None else g for g in own]
                parameter.grad = sum(g / run.parts for g in own)
        base.step()
        record(trace, sum(loss / run.parts for loss in losses), model, base)
    return trace


def record(trace: Trace, loss: Any, model: nn.Module, optimizer: Any) -> None:
    trace.record(loss, Problem(list(model.parameters()), lambda step: loss), optimizer)
    trace.states[-1]["buffers"] = [b.clone() for b in model.buffers()]


def build(run: Run) -> tuple[nn.Module, nn.Module, ParallelPicardOptimizer]:
    """The model, what the closure calls, and the wrapper on this rank."""
    mesh = init_device_mesh("cpu", run.shape, mesh_dim_names=run.dims)
    model = run.model()
    called = model
    if run.ddp:
        called = DistributedDataParallel(
            model,
            process_group=mesh.get_group("data"),
            find_unused_parameters=not run.dense,
            gradient_as_bucket_view=run.ddp == "views",
        )
    optimizer = ParallelPicardOptimizer(
        BASES[run.base](model.parameters()),
        mesh=mesh,
        window=run.window,
        tolerance=0,
        carry=model if run.norm else None,
        audit=run.audit,
        timeout=run.timeout,
    )
    return model, called, optimizer


def make_closure(called: nn.Module, optimizer: ParallelPicardOptimizer) -> Callable[[int], Tensor]:
    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(called, optimizer.data_rank, optimizer.data_size)
        loss.backward()
        return loss

    return closure


def meshed_run(run: Run, fault: str = "") -> Trace:
    with FAULTS[fault]():
        model, called, optimizer = build(run)
        assert optimizer.data_size == run.parts
        closure, trace = make_closure(called, optimizer), Trace()
        for _ in range(STEPS):
            record(trace, optimizer.step(closure), model, optimizer)
    trace.stats = {**stats_of(optimizer), "window": optimizer.window}
    return trace


def check(run: Run, traces: list[Trace]) -> None:
    expected = plain_run(run)
    for trace in traces:
        assert_same_trace(trace, expected)
        assert trace.stats == traces[0].stats
    assert_parallel(traces[0])


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


# --- What becomes of one data rank's trouble ------------------------------------------------------


def troubled(run: Run, kind: str, bad: int, victim: int, nonfinite: str) -> tuple[Any, Trace]:
    """One data rank's closure fails at a step; a collective in it wants the row in lockstep."""
    mesh = init_device_mesh("cpu", run.shape, mesh_dim_names=run.dims)
    model = Network()
    optimizer = ParallelPicardOptimizer(
        BASES["Adam"](model.parameters()),
        mesh=mesh,
        window=run.window,
        tolerance=0,
        nonfinite=nonfinite,
        timeout=30.0,
    )
    healthy, trace = make_closure(model, optimizer), Trace()

    def closure(step: int) -> Tensor:
        loss = healthy(step)
        dist.all_reduce(torch.ones(1), group=mesh.get_group("data"))
        if step == bad and optimizer.data_rank == victim:
            if kind == "raises":
                raise ZeroDivisionError("planted")
            if kind == "interrupt":
                raise KeyboardInterrupt
            if kind == "no gradient":
                optimizer.zero_grad()
            if kind == "nan":
                assert model.bias.grad is not None
                model.bias.grad[0] = torch.nan
        return loss

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    report = attempt(trace, problem, optimizer, closure, STEPS)
    with quiet():
        for _ in range(STEPS - optimizer.step_index):
            trace.record(optimizer.step(healthy), problem, optimizer)
    return report, trace


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raises", "ZeroDivisionError"),
        ("nan", "NonFiniteGradientError"),
        ("no gradient", "NoGradientError"),
    ],
)
@pytest.mark.parametrize("run", [Run((1, 2), window=4), Run((2, 2), window=5)], ids=str)
@pytest.mark.parametrize("victim", [0, 1])
def test_trouble_on_one_data_rank(
    pools: Pools, run: Run, kind: str, error: str, victim: int
) -> None:
    """The worst of the row counts: every rank raises the same error at that step, and on it goes."""
    bad, expected = 5, plain_run(run)
    for report, trace in pools(run.ranks).run(troubled, run, kind, bad, victim, "raise"):
        assert report["error"] == error, report["text"]
        assert report["committed"] == report["step_index"] == bad
        assert report["seconds"] < SECONDS
        trace.states = [{**state, "buffers": []} for state in trace.states]
        assert_same_trace(trace, expected)


def lonely(run: Run) -> tuple[Trace, dict[str, Any]]:
    """On one data rank guesses beyond the head give NaN; DistributedDataParallel wants the row in lockstep."""
    expected = plain_run(run)
    model, called, optimizer = build(run)
    parameters = list(model.parameters())
    healthy, trace = make_closure(called, optimizer), Trace()
    points = [run.model().state_dict().values(), *expected.parameters]

    def closure(step: int) -> Tensor:
        right = all(torch.equal(p, q) for p, q in zip(parameters, points[step], strict=True))
        loss = healthy(step)
        if not right and optimizer.data_rank == 1:
            model.get_parameter("bias").grad.fill_(torch.nan)  # type: ignore[union-attr]
        return loss

    with quiet():
        for _ in range(STEPS):
            record(trace, optimizer.step(closure), model, optimizer)
    return trace, stats_of(optimizer)


def test_a_bad_future_on_one_data_rank(pools: Pools) -> None:
    """It shortens the stride, alike on all ranks, and the row evaluates on together."""
    run = Run((1, 2), window=4, ddp="copies", base="SGD")
    results = pools(2).run(lonely, run)
    for trace, stats in results:
        assert_same_trace(trace, plain_run(run))
        assert stats == results[0][1]
        assert stats["failed_speculations"] > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupt_on_one_data_rank(pools: Pools, victim: int) -> None:
    for report, _ in pools(2).run(troubled, Run((1, 2), window=4), "interrupt", 5, victim, "raise"):
        assert report["error"] == "KeyboardInterrupt"
        assert report["committed"] == report["step_index"] <= 5


def test_a_nan_on_one_data_rank_skips_the_step_on_all(pools: Pools) -> None:
    results = pools(2).run(troubled, Run((1, 2), window=4), "nan", 5, 1, "skip")
    for report, trace in results:
        assert report["committed"] == STEPS
        assert_same_bits(trace.parameters[5], trace.parameters[4])
        assert not torch.equal(trace.parameters[6][0], trace.parameters[5][0])
        assert_same_bits(trace.parameters, results[0][1].parameters)


def moved(victim: int) -> dict[str, Any]:
    """One rank's parameters are changed by hand."""
    model, called, optimizer = build(Run((2, 2), timeout=30.0))
    closure = make_closure(called, optimizer)

    def edit(step: int) -> Tensor:
        return closure(step)

    for _ in range(4):
        optimizer.step(closure)
    optimizer.step_index = 4  # nothing is queued on any rank
    if dist.get_rank() == victim:
        with torch.no_grad():
            model.get_parameter("bias").add_(1)
    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, edit, 1)


@pytest.mark.parametrize("victim", [1, 3])
def test_parameters_are_compared_over_all_ranks(pools: Pools, victim: int) -> None:
    for report in pools(4).run(moved, victim):
        assert report["error"] == "RankMismatchError"
        assert "the parameters' values" in report["message"]


def impure(victim: int) -> dict[str, Any]:
    """One rank's closure counts its calls."""
    model, called, optimizer = build(Run((2, 2), audit="always"))
    healthy, calls = make_closure(called, optimizer), 0

    def closure(step: int) -> Tensor:
        nonlocal calls
        calls += 1
        loss = healthy(step)
        bias = model.get_parameter("bias")
        if dist.get_rank() == victim and bias.grad is not None:
            bias.grad += calls
        return loss

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, STEPS)


@pytest.mark.parametrize("victim", [1, 2])
def test_an_impure_closure_on_one_data_rank(pools: Pools, victim: int) -> None:
    for report in pools(4).run(impure, victim):
        assert report["error"] == "ImpureClosureError", report["text"]


def dying(victim: int, at: int) -> dict[str, Any]:
    model, called, optimizer = build(Run((2, 2)))
    healthy, evaluations = make_closure(called, optimizer), 0

    def closure(step: int) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if dist.get_rank() == victim and evaluations == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return healthy(step)

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, STEPS)


@pytest.mark.parametrize("victim", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_9_is_heard_by_every_row_and_column(victim: int) -> None:
    """Also by the rank that shares neither a row nor a column with the lost one."""
    with fresh_pool(4) as pool:
        outcomes = pool.outcomes(dying, victim, 1)
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.lost
            continue
        assert outcome.value["error"] == "RankLostError", outcome.text or outcome.value["text"]
        assert outcome.value["seconds"] < SECONDS


def failing_alone(timeout: float) -> dict[str, Any]:
    """Rank 0 raises before its backward; rank 1's waits there for it."""
    model, called, optimizer = build(Run((1, 2), window=2, ddp="copies", timeout=timeout))
    healthy = make_closure(called, optimizer)

    def closure(step: int) -> Tensor:
        if step == 4 and dist.get_rank() == 0:
            raise ZeroDivisionError("planted")
        return healthy(step)

    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, STEPS)


@pytest.mark.slow
def test_a_rank_that_leaves_its_partner_in_backward() -> None:
    """DistributedDataParallel's collective waits: the rank that raised gives up in time and says why."""
    with fresh_pool(2) as pool:
        pool.submit(failing_alone, 5.0)
        assert pool.connections[0].poll(5.0 + SECONDS)
        report = pickle.loads(pool.connections[0].recv_bytes()).value
    assert report["error"] == "RankLostError"
    assert report["committed"] == 4
    assert "before that the closure raised on this rank" in report["text"]
    assert "ZeroDivisionError: planted" in report["text"]


# --- DistributedDataParallel over other ranks, and sharded parameters -----------------------------


def wrongly_wrapped(how: str) -> dict[str, Any]:
    """DistributedDataParallel over ranks that evaluate different steps."""
    model, options = Network(), {}
    if how == "mesh":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("picard", "data"))
        options = {"mesh": mesh}
    if how == "alone":
        groups = [dist.new_group([rank]) for rank in range(2)]
        options = {"process_group": groups[dist.get_rank()]}
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = ParallelPicardOptimizer(
        BASES["Adam"](model.parameters()), window=2, audit="never", **options
    )
    closure = make_closure(called, optimizer)
    problem = Problem(list(model.parameters()), lambda step: torch.zeros(()))
    return attempt(Trace(), problem, optimizer, closure, 3)


@pytest.mark.parametrize("how", ["default group", "mesh", "alone"])
def test_ddp_without_its_mesh_is_refused(pools: Pools, how: str) -> None:
    """Else gradients of different steps would be averaged, and no one would know."""
    for report in pools(2).run(wrongly_wrapped, how):
        assert report["error"] == "ValueError"
        assert "DistributedDataParallel module over ranks [0, 1]" in report["message"]
        assert 'mesh_dim_names=("picard", "data")' in report["message"]
        assert report["committed"] == 0


def sharded(how: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    if how == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    error, message = "", ""
    try:
        optimizer = ParallelPicardOptimizer(torch.optim.Adam(model.parameters()), mesh=mesh)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.randn(2, 4)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    except Exception as caught:
        error, message = type(caught).__name__, str(caught)
    return {"error": error, "message": message}


@pytest.mark.parametrize("how", ["fully_shard", "tensor parallel"])
def test_sharded_parameters_are_refused(pools: Pools, how: str) -> None:
    for report in pools(2).run(sharded, how):
        assert report["error"] == "UnsupportedOptimizerError", report
        assert "shard" in report["message"]
        assert "mesh=" in report["message"]


# --- Arguments ------------------------------------------------------------------------------------


def refused() -> dict[str, str]:
    flat = init_device_mesh("cpu", (2,), mesh_dim_names=("picard",))
    named = init_device_mesh("cpu", (2, 1), mesh_dim_names=("picard", "data"))
    wrong = {
        "both": {"mesh": flat, "process_group": dist.group.WORLD},
        "names": {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))},
        "no names": {"mesh": init_device_mesh("cpu", (2,))},
        "type": {"mesh": "picard"},
        "group of two dims": {"process_group": named},
    }
    told = {}
    for name, options in wrong.items():
        try:
            ParallelPicardOptimizer(BASES["Adam"](Network().parameters()), **options)
        except (TypeError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def test_meshes_that_are_refused(pools: Pools) -> None:
    for told in pools(2).run(refused):
        assert told["both"].startswith("ValueError: mesh and process_group")
        assert '"picard" and "data"' in told["names"]
        assert '"picard" and "data"' in told["no names"]
        assert told["type"].startswith("TypeError: mesh='picard'")
        assert told["group of two dims"].startswith("ValueError: process_group=")


def test_alone_there_is_one_part() -> None:
    optimizer = ParallelPicardOptimizer(BASES["Adam"](Network().parameters()))
    assert (optimizer.data_rank, optimizer.data_size) == (0, 1)


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


def _own_part_first() -> Any:
    """Each rank adds its own part first, so that sums depend on the rank."""
    honest = mean

    def turned(parts: list[Any]) -> Any:
        at = dist.get_rank() % len(parts)
        return honest([*parts[at:], *parts[:at]])

    return mock.patch.object(picardopt.engines.average, "mean", turned)


def _not_averaged() -> Any:
    return mock.patch.object(picardopt.engines.average, "mean", lambda parts: parts[0])


def _seed_by_rank() -> Any:
    honest = picardopt.drift.step_seed
    return mock.patch.object(
        picardopt.drift, "step_seed", lambda seed, step: honest(seed + dist.get_rank(), step)
    )


FAULTS: dict[str, Callable[[], Any]] = {
    "": nullcontext,
    "own part first": _own_part_first,
    "not averaged": _not_averaged,
    "seed by rank": _seed_by_rank,
}


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
