"""What the wrapper does with a base optimizer between drifts: snapshot, rollout, commit, residuals.

Run `pytest benchmarks`; `make bench` also writes the table in `benchmarks/results/rollout.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from picardopt.drift import Drift
from picardopt.layout import ParameterLayout, Row
from picardopt.lending import Lending
from picardopt.snapshot import Snapshot
from picardopt.stepper import BaseStepper
from picardopt.sweep import measure

WINDOW = 8

# Long enough for a minimum that holds, short enough for the whole table to take about two minutes.
pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5)


@dataclass
class Case:
    """An Adam with state, one drift for it, and the rows of a window."""

    parameters: list[torch.Tensor]
    base: torch.optim.Adam
    layout: ParameterLayout
    drift: Drift
    rows: list[Row]
    stepper: BaseStepper
    lending: Lending


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[True, False], ids=["foreach", "loop"])
def foreach(request):
    return request.param


@pytest.fixture(params=[1, 100], ids="{}-tensors".format)
def tensors(request):
    return request.param


@pytest.fixture(params=[10_000, 100_000, 1_000_000, 10_000_000], ids="{:.0e}".format)
def numel(request):
    return request.param


@pytest.fixture
def case(numel: int, tensors: int, foreach: bool, request) -> Case:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.randn(numel // tensors, generator=generator, requires_grad=True)
        for _ in range(tensors)
    ]
    base = torch.optim.Adam(parameters, lr=1e-3, foreach=foreach)
    layout = ParameterLayout(parameters)
    row = layout.row()
    row.store([torch.randn(p.shape, generator=generator) for p in parameters])
    drift = Drift(step=0, row=row, present=(True,) * tensors)
    stepper = BaseStepper(base)
    commit(stepper, parameters, drift)  # Adam makes its state in the first step
    rows = [layout.row() for _ in range(WINDOW + 1)]
    for row in rows:
        row.store([p.detach() for p in parameters])
    return Case(parameters, base, layout, drift, rows, stepper, Lending(base, layout))


def commit(stepper: BaseStepper, parameters: list[torch.Tensor], drift: Drift) -> None:
    with stepper.commit((), (), user_code=False, draws=True):
        stepper.apply(parameters, drift)


def test_plain_step(benchmark, case: Case):
    for parameter, gradient in zip(case.parameters, case.drift.row.tensors, strict=True):
        parameter.grad = gradient.clone()
    benchmark(case.base.step)


def test_snapshot(benchmark, case: Case):
    snapshot = Snapshot([case.base])

    def capture_and_restore():
        snapshot.capture(case.parameters)
        snapshot.restore()

    before = [p.detach().clone() for p in case.parameters]
    benchmark(capture_and_restore)
    assert all(torch.equal(a, b) for a, b in zip(before, case.parameters, strict=True))


def test_commit(benchmark, case: Case):
    before = int(case.base.state[case.parameters[0]]["step"])
    benchmark(commit, case.stepper, case.parameters, case.drift)
    assert int(case.base.state[case.parameters[0]]["step"]) > before


def test_rollout(benchmark, case: Case):
    head = case.rows[0]

    def sweep_without_drifts():
        with case.stepper.speculation(case.parameters, head):
            for row in case.rows[1:]:
                case.stepper.advance(case.drift, case.lending)
                row.store(case.parameters)

    benchmark(sweep_without_drifts)
    assert all(torch.equal(a, b) for a, b in zip(head.tensors, case.parameters, strict=True))
    assert not torch.equal(case.rows[-1].buffer, head.buffer)


def test_residuals(benchmark, case: Case):
    table = benchmark(measure, case.rows, case.rows, case.layout.numels)
    assert table.shape == (4, WINDOW)
    assert table[0].all()  # the same bits
    assert not table[1].any()  # residuals
