"""Seconds a step from what was measured on one device; and what a run of some tens of steps tells."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import picardopt
from picardopt import ParallelPicardOptimizer
from picardopt.links import ETHERNET, LINKS, NVLINK, Link, all_gather, all_reduce
from picardopt.planner import Measured, best, option, options, slowest
from picardopt.recommendation import Plan

FREE = Link("free", math.inf, 0.0, "no cost at all")
H100 = {1: (0.0359,), 4: (0.0391,), 16: (0.0908,)}
"""Seconds of a gradient by views: benchmarks/results/gpu_drift.md."""


def strides(reach: float, most: int = 64) -> dict[int, float]:
    """Nearly all of a window, up to a reach."""
    return {w: max(1.0, min(reach, 0.9 * w)) for w in range(1, most + 1)}


def measured(**changes: Any) -> Measured:
    """The README's example: 12.6 million parameters, a window of 8 whose guesses hold for 7.1 steps."""
    numbers = Measured(H100, 0.5e-3, 0.5e-3, 1e-3, 4 * 12_600_000, strides(7.1))
    return replace(numbers, **changes)


def plan(numbers: Measured, devices: int = 8, link: Link = NVLINK) -> Plan:
    return Plan(devices, link, numbers, options(numbers, link, devices))


seconds = st.floats(1e-3, 10.0)


@given(st.lists(seconds, min_size=1, max_size=6), st.integers(1, 16))
def test_the_slowest_of_some_ranks(times: list[float], ranks: int) -> None:
    """Between the mean and the largest, and more with more ranks; of one rank the mean."""
    found = slowest(times, ranks)
    assert min(times) - 1e-9 <= found <= max(times) + 1e-9
    assert slowest(times, 1) == pytest.approx(sum(times) / len(times))
    assert found <= slowest(times, ranks + 1) + 1e-9


@given(st.integers(2, 32), st.integers(1, 10**9), st.sampled_from(sorted(LINKS)))
def test_messages_cost_bytes_and_latency(ranks: int, size: int, name: str) -> None:
    link = LINKS[name]
    for exchange in (all_gather, all_reduce):
        assert exchange(link, 1, size) == 0
        assert exchange(link, ranks, size) > link.latency
        assert exchange(link, ranks, 2 * size) > exchange(link, ranks, size)
    assert all_gather(link, ranks, size) >= all_reduce(link, ranks, size) or ranks == 2


@given(seconds, st.floats(1.0, 20.0), st.integers(2, 16), st.integers(1, 8))
def test_where_nothing_else_costs_a_sweep_is_its_drifts(
    drift: float, reach: float, picard: int, slots: int
) -> None:
    numbers = Measured({1: (drift,)}, 0.0, 0.0, 0.0, 4, strides(reach, 128))
    found = option(numbers, FREE, picard, slots=slots)
    assert found.seconds == pytest.approx(slots * drift / numbers.strides[picard * slots])
    assert option(numbers, FREE, 1).seconds == pytest.approx(drift)


@given(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0), st.integers(2, 8))
def test_costs_add_up(commit: float, ahead: float, picard: int) -> None:
    """Every rank rolls out the whole window and commits every step."""
    numbers = measured(commit=commit, ahead=ahead)
    stride = numbers.strides[picard]
    found = option(numbers, FREE, picard).seconds
    rollout = numbers.sweep + (picard + stride) * ahead
    assert found == pytest.approx((0.0908 + rollout) / stride + commit)


def test_a_split_is_what_was_measured_of_it() -> None:
    """Never the whole batch's time divided."""
    assert option(measured(), FREE, 1, data=4).seconds == pytest.approx(0.0391 + 0.5e-3)
    assert option(measured(), FREE, 1, data=16).seconds == pytest.approx(0.0359 + 0.5e-3)
    with pytest.raises(ValueError, match="data=8"):
        option(measured(), FREE, 1, data=8)
    with pytest.raises(ValueError, match="window of 65"):
        option(measured(), FREE, 65)


def test_the_readmes_example() -> None:
    """Eight devices and a batch of 16: running ahead wins, and splitting on four is 2.3 times as fast as one device."""
    found = plan(measured())
    assert found.recommended.kind == "Picard"
    assert (found.recommended.devices, found.recommended.window) == (8, 8)
    assert "Run ahead with a window of 8 on 8 devices" in found.sentence
    assert "times as fast as data parallelism" in found.sentence
    kinds = {each.kind for each in found.options}
    assert kinds >= {"one device", "data parallel", "Picard", "Picard x data"}


def test_data_parallelism_is_recommended_where_a_part_fills_a_device() -> None:
    numbers = measured(drifts={batch: (0.01 * batch,) for batch in (1, 2, 4, 8, 16)})
    found = plan(numbers)
    assert (found.recommended.kind, found.recommended.devices) == ("data parallel", 8)
    assert found.sentence.startswith("Data parallelism on 8 devices is the better choice")


@pytest.mark.parametrize(
    "changes",
    [
        {"ahead": 0.2, "drifts": {1: (0.09,)}},  # the optimizer's own steps are not small
        {"row_bytes": 10**9, "drifts": {1: (0.09,)}},  # nor is the exchange
        {"strides": strides(1.0), "drifts": {1: (0.09,)}},  # no guess holds
    ],
)
def test_one_device_is_recommended_where_nothing_is_gained(changes: Any) -> None:
    found = plan(measured(**changes), link=ETHERNET)
    assert found.recommended.kind == "one device"
    assert found.sentence.startswith("One device is the better choice: 90.5 ms a step.")


def test_why_running_ahead_does_not_help_is_told() -> None:
    numbers = measured(strides=strides(1.1), drifts={1: (0.09,)}, drift_error=1.8)
    assert plan(numbers).sentence.endswith(
        "Running ahead does not help here: the drift at the second guess is already off by 180 %."
    )
    slow = measured(ahead=0.2, drifts={1: (0.09,)}, drift_error=0.1)
    assert "Running ahead would take" in plan(slow).sentence


def test_devices_that_gain_nothing_are_left_alone() -> None:
    """Strides that end at 2.7 need no more than 3 devices."""
    found = plan(measured(strides=strides(2.7), drifts={1: (0.09,)}))
    assert found.recommended.devices == 3


@given(st.floats(1.0, 64.0), st.integers(1, 64), st.sampled_from(sorted(LINKS)))
def test_what_is_recommended_is_worth_it(reach: float, devices: int, name: str) -> None:
    """Never slower than one device, never more devices than there are, and the table and the sentence say so."""
    found = plan(measured(strides=strides(reach)), devices, LINKS[name])
    chosen = found.recommended
    assert chosen.devices <= devices
    assert chosen.seconds <= found.options[0].seconds
    assert best(found.options).seconds * 1.2 >= chosen.seconds or chosen.kind != "Picard"
    assert f"{chosen.devices} devices" in found.sentence or chosen.devices == 1
    assert len(found.table.splitlines()) == 1 + len({each.kind for each in found.options})
    json.dumps(found.as_dict())


def joined(**changes: Any) -> Measured:
    """The README's example with batches of 1, where four slots in a call take little more than one."""
    slots = {1: (0.0359,), 2: (0.0365,), 4: (0.0391,), 8: (0.0563,)}
    return measured(drifts={1: (0.0359,)}, joined=slots, **changes)


def test_one_device_gains_where_slots_share_a_call() -> None:
    found = plan(joined(), devices=1)
    assert found.recommended.kind == "one device, batched calls"
    assert found.recommended.window == 8
    assert found.sentence.startswith(
        "Run ahead with a window of 8 on one device, 8 slots to a batched call: 9.63 ms"
    )
    assert "slots that share their batched calls: 1: 35.9 ms, 2: 36.5 ms" in str(found)


def test_joined_slots_are_what_was_measured_of_them() -> None:
    """Never so many times one slot; and what was not measured is refused, not computed."""
    found = option(joined(), FREE, 2, slots=4)
    numbers = joined()
    rollout = numbers.sweep + (8 + numbers.strides[8]) * numbers.ahead
    assert found.seconds == pytest.approx(
        (0.0391 + rollout) / numbers.strides[8] + numbers.commit, rel=1e-9
    )
    assert found.kind == "Picard, batched calls"
    with pytest.raises(ValueError, match="slots=3"):
        option(joined(), FREE, 2, slots=3)
    parts = joined()
    with pytest.raises(ValueError, match="data=2"):
        option(replace(parts, drifts={2: (0.1,), 1: (0.06,)}), FREE, 1, data=2, slots=2)


def test_without_batched_calls_there_is_no_such_row() -> None:
    kinds = {each.kind for each in plan(measured()).options}
    assert not any("batched" in kind for kind in kinds)
    assert "one device, batched calls" in {each.kind for each in plan(joined()).options}


@given(st.integers(1, 64), st.integers(2, 16), st.integers(1, 8))
def test_ranks_that_share_cores_stand_in_line(cores: int, picard: int, slots: int) -> None:
    """With everything but the drifts: rollout and commits take as many times as long as ranks share a core."""
    numbers = measured(strides=strides(7.1, 128))
    alone, shared = (option(numbers, FREE, picard, slots=slots, cores=c) for c in (None, cores))
    drift = slots * 0.0908 / alone.stride
    line = max(1.0, picard / cores)
    assert shared.seconds - drift == pytest.approx(line * (alone.seconds - drift))


def test_memory_is_told_where_it_is_known() -> None:
    found = plan(measured(memory={8: 1_600_000_000}))
    assert found.recommended.memory == 1_600_000_000
    (line,) = (each for each in found.table.splitlines() if each.startswith("Picard  "))
    assert line.endswith("+1.6 GB")
    assert not any(line.endswith(" ") for line in found.table.splitlines())


class Clock:
    """Seconds of waiting, which take none, and of this process's own work: no others' work is counted."""

    waited = 0.0

    def sleep(self, seconds: float) -> None:
        self.waited += seconds

    def perf_counter(self) -> float:
        return self.waited + time.process_time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    return clock


class Waits:
    """A run over noisy gradients whose closure waits, and shorter for a part of its batch."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.x = nn.Parameter(torch.randn(50))
        self.optimizer = ParallelPicardOptimizer(
            torch.optim.Adam([self.x], 1e-3), **{"window": 4, "seed": 1} | options
        )

    def closure(self, seconds: float = 0.002) -> Any:
        def evaluate(step: int) -> Tensor:
            self.optimizer.zero_grad()
            loss = (self.x * (self.x + torch.randn(50))).sum()
            loss.backward()
            time.sleep(seconds)
            return loss.detach()

        return evaluate

    def nan(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        (math.nan * self.x).sum().backward()
        return torch.zeros(())

    def run(self, steps: int) -> list[Tensor]:
        return [self.take() for _ in range(steps)]

    def take(self) -> Tensor:
        self.optimizer.step(self.closure())
        return self.x.detach().clone()


@pytest.mark.usefixtures("clock")
def test_a_plan_from_a_run() -> None:
    run = Waits()
    run.run(40)
    found = picardopt.plan(run.optimizer, {8: run.closure(0.02), 2: run.closure(0.012)}, devices=4)
    numbers = found.measured
    assert numbers.parts == [1, 4]
    assert 0.02 <= min(numbers.drifts[8]) < 0.04
    assert 0.012 <= min(numbers.drifts[2]) < 0.02
    assert 0 < numbers.commit < 0.02
    assert 0 < numbers.ahead < 0.02
    assert numbers.row_bytes >= 200
    assert numbers.strides[4] == pytest.approx(run.optimizer.stats.mean_stride, abs=0.5)
    assert set(numbers.strides) >= {1, 2, 3, 4, 8, 16, 32}
    assert numbers.memory[4] == picardopt.needed_memory(run.optimizer).total
    assert numbers.memory[8] > numbers.memory[4]
    assert "a step" in str(found)


def waiting(seconds: float, x: Tensor) -> Tensor:
    time.sleep(seconds)
    return x.clone()


class SharedCall(Waits):
    """The same with a batched call, which waits once however many slots share it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.quick, self.slow = (picardopt.batched(partial(waiting, s)) for s in (0.0, 0.05))

    def closure(self, seconds: float = 0.002) -> Any:
        shared = self.slow if seconds else self.quick

        def evaluate(step: int) -> Tensor:
            self.optimizer.zero_grad()
            noise = torch.randn(50)
            loss = (self.x * shared((self.x.detach() + noise)[None])[0]).sum()
            loss.backward()
            return loss.detach()

        return evaluate

    def take(self) -> Tensor:
        self.optimizer.step(self.closure(0.0))
        return self.x.detach().clone()


@pytest.mark.usefixtures("clock")
def test_slots_that_share_calls_are_measured_together() -> None:
    """As many as the window has wait once; and the run goes on bitwise as one without a plan."""
    plain, planned = SharedCall(audit="always"), SharedCall(audit="always")
    plain.run(40)
    planned.run(40)
    before = torch.get_rng_state()
    found = picardopt.plan(planned.optimizer, planned.closure(), devices=2)
    assert torch.equal(torch.get_rng_state(), before)
    joined = found.measured.joined
    assert sorted(joined) == [2, 4]
    assert all(0.05 <= min(times) < 0.095 for times in joined.values())
    assert found.recommended.joined
    assert found.recommended.slots > 1
    for a, b in zip(plain.run(30), planned.run(30), strict=True):
        assert torch.equal(a, b)
    assert plain.optimizer.stats.calls_saved == planned.optimizer.stats.calls_saved


@pytest.mark.usefixtures("clock")
def test_at_tolerance_0_no_calls_are_shared() -> None:
    run = SharedCall(tolerance=0)
    run.run(40)
    assert picardopt.plan(run.optimizer, run.closure(), devices=2).measured.joined == {}


@pytest.mark.usefixtures("clock")
def test_planning_changes_nothing_in_the_run() -> None:
    """Parameters, gradients, generators, statistics and the queue: the run goes on bitwise as one without a plan."""
    plain, planned = Waits(audit="always"), Waits(audit="always")
    plain.run(33)
    planned.run(33)
    assert planned.optimizer._speculator is not None
    torch.manual_seed(5)
    before = torch.get_rng_state()
    grad = planned.x.grad
    picardopt.plan(planned.optimizer, {2: planned.closure(), 1: planned.closure()}, devices=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert planned.x.grad is grad
    for a, b in zip(plain.run(30), planned.run(30), strict=True):
        assert torch.equal(a, b)
    assert plain.optimizer.stats.strides == planned.optimizer.stats.strides
    evaluations = [run.optimizer.stats.drift_evaluations for run in (plain, planned)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.usefixtures("clock")
def test_what_cannot_be_planned_is_refused() -> None:
    run = Waits()
    with pytest.raises(ValueError, match="usable sweeps"):
        picardopt.plan(run.optimizer, run.closure(), devices=2)
    run.run(30)
    with pytest.raises(ValueError, match="devices=0"):
        picardopt.plan(run.optimizer, run.closure(), devices=0)
    with pytest.raises(ValueError, match="batch size -1"):
        picardopt.plan(run.optimizer, {-1: run.closure()}, devices=2)

    def broken(step: int) -> Tensor:
        raise KeyError("no such batch")

    with pytest.raises(KeyError, match="no such batch"):
        picardopt.plan(run.optimizer, {2: run.closure(), 1: broken}, devices=2)
    with pytest.raises(picardopt.NonFiniteGradientError):
        picardopt.plan(run.optimizer, run.nan, devices=2)
    run.run(3)
