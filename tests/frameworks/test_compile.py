"""Compiled models and compiled optimizer steps: exact, and the audit costs no compilation."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from picardopt import ImpureClosureError, StepIndexedLoader, step_rng
from picardopt.audit.modules import uses_compile
from tests.frameworks.task import (
    BATCHES,
    Network,
    Normalized,
    loss_of,
    make_base,
    make_loader,
    run_ahead,
    sequential,
    weights,
    wrap,
)
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits

# Of dynamo, on its way through the task's own autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
STEPS = 2 * BATCHES


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
        ],
    ),
]


@pytest.fixture
def compiler() -> Iterator[None]:
    """Starts without compiled code and leaves none behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    assert not uses_compile()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_in_the_closure(backend: str) -> None:
    """torch.compile of the forward, dropout included."""

    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend=backend, fullgraph=True)

    expected = sequential(STEPS, compiled)
    model = Network()
    optimizer = wrap(make_base(model))
    run_ahead(model, optimizer, called=compiled(model))
    assert_same_bits(weights(model), expected)
    assert max(optimizer.stats.strides) >= 2


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("rate", ["float", "tensor"])
def test_a_compiled_base_step(rate: str) -> None:
    """``base.step = torch.compile(base.step)``: rolled out and put back like any other."""

    def compiled(model: nn.Module) -> torch.optim.Optimizer:
        lr = torch.tensor(2e-3) if rate == "tensor" else 2e-3
        base = torch.optim.Adam(model.parameters(), lr=lr)
        base.step = torch.compile(base.step, backend="eager")  # type: ignore[method-assign]
        return base

    model, loader = Network(), StepIndexedLoader(make_loader())
    base = compiled(model)
    for t in range(STEPS):
        with step_rng(0, t):
            base.zero_grad()
            loss_of(model, loader.batch(t)).backward()
            base.step()
    expected, model = weights(model), Network()
    optimizer = wrap(compiled(model))
    run_ahead(model, optimizer)
    assert_same_bits(weights(model), expected)
    assert max(optimizer.stats.strides) >= 2


@pytest.mark.usefixtures("compiler")
def test_the_audit_makes_nothing_compile_anew() -> None:
    """A global module hook that comes and goes would: dynamo guards on it, and gives up after a few."""
    model, counter = nn.Sequential(Network(), nn.Linear(1, 1)), CompileCounter()
    optimizer = wrap(make_base(model), audit="always")
    run_ahead(model, optimizer, called=torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    assert optimizer.stats.audits >= optimizer.stats.sweeps


@pytest.mark.usefixtures("compiler")
def test_a_buffer_of_a_compiled_model_raises_by_name() -> None:
    model = Normalized()
    before = [buffer.clone() for buffer in model.buffers()]
    unfinished = nn.Linear.__new__(nn.Linear)  # alive, but its constructor never ran
    optimizer = wrap(make_base(model))
    called = torch.compile(model, backend="eager")
    with pytest.raises(ImpureClosureError, match=r"Normalized\.norm\.running_mean"):
        run_ahead(model, optimizer, called=called)
    assert_same_bits(list(model.buffers()), before)
    del unfinished


def compiled_over_everyone() -> str:
    model = Network()
    optimizer = wrap(make_base(model), 2)
    called = torch.compile(DistributedDataParallel(model), backend="eager")
    try:
        with pytest.raises(ValueError) as caught:
            run_ahead(model, optimizer, 1, called)
    finally:
        torch.compiler.reset()
    return str(caught.value)


def test_a_compiled_data_parallel_model_is_refused_too(pools: Pools) -> None:
    """It would average gradients of different steps; it is found without a module hook."""
    for text in pools(2).run(compiled_over_everyone):
        assert "DistributedDataParallel" in text
        assert "mesh=mesh" in text
