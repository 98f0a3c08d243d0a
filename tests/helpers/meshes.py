"""Runs on a mesh with a data axis, and what each must equal bitwise, in plain lines.

That is one process that evaluates the parts of each step's batch one after the other and averages them in their
order.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import picardopt.drift
import picardopt.engines.average
from picardopt import ParallelPicardOptimizer, step_rng
from picardopt.engines.average import mean
from picardopt.rng import step_seed
from tests.helpers.problems import Problem, quantize
from tests.helpers.runs import (
    Trace,
    assert_parallel,
    assert_same_trace,
    stats_of,
)

STEPS, BATCH = 12, 12
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


class Network(nn.Module):
    """Quantized layers (see ``problems``), so that guesses are often right to the bit."""

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
        hidden = torch.tanh(self.norm(x @ quantize(self.first).T + quantize(self.bias)))
        if part == 1:
            hidden = hidden * quantize(self.rare)
        return hidden @ quantize(self.second).T


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
                parts = [torch.zeros_like(parameter) if g is None else g for g in own]
                mean_of_parts: Any = sum(part / run.parts for part in parts)
                parameter.grad = mean_of_parts
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
    honest = step_seed
    return mock.patch.object(
        picardopt.drift, "step_seed", lambda seed, step: honest(seed + dist.get_rank(), step)
    )


FAULTS: dict[str, Callable[[], Any]] = {
    "": nullcontext,
    "own part first": _own_part_first,
    "not averaged": _not_averaged,
    "seed by rank": _seed_by_rank,
}
