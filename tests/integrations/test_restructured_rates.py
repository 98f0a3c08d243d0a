"""Rates that move while the number of parameters changes: running ahead knows them before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.methods.optim import OptimizerConfig, build_optimizer, build_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from picardopt import (
    ParallelPicardOptimizer,
    Restructure,
    load_checkpoint,
    save_checkpoint,
    step_rng,
)

STEPS, EVERY, SEED = 18, 4, 7
CONFIG = OptimizerConfig(
    rates={"means": ((0, 1e-2), (STEPS, 1e-4)), "colours": ((5, 0.1), (9, 0.02))},
    geometric=("means",),
)
Rates = list[list[float]]


class Points:
    """Two groups of rows in one optimizer, some of which are duplicated after every few steps.

    Their gradients depend on the step alone, so that an iterate changes between two sweeps only if the rollout took it
    with another rate.
    """

    def __init__(self, count: int = 3) -> None:
        start = torch.linspace(-1, 1, 2 * count).view(count, 2)
        self.tensors = {name: nn.Parameter(start + i) for i, name in enumerate(CONFIG.rates)}
        self.base = build_optimizer(CONFIG, {name: [p] for name, p in self.tensors.items()})
        scheduler = build_scheduler(CONFIG, self.base)
        assert scheduler is not None
        self.scheduler: LRScheduler = scheduler

    def closure(self, step: int) -> Tensor:
        self.base.zero_grad()
        columns = torch.randn(2)
        loss = torch.stack([(p * columns).sum() for p in self.tensors.values()]).sum()
        loss.backward()
        return loss

    def due(self, step: int) -> bool:
        return step % EVERY == EVERY - 1

    @torch.no_grad()
    def duplicate(self, step: int) -> Tensor:
        """Duplicates a row at random; the new rows are apart, and begin without moments."""
        count = len(self.tensors["means"])
        parents = torch.cat([torch.arange(count), torch.randint(count, (1,))])
        for group in self.base.param_groups:
            (old,) = group["params"]
            new = old[parents]
            new[count:] += torch.randn(1, 2)
            self._replace(group, nn.Parameter(new))
            state = self.base.state.pop(old)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key][parents]
                state[key][count:] = 0
            self.base.state[group["params"][0]] = state
        return parents

    def _replace(self, group: dict[str, Any], new: nn.Parameter) -> None:
        self.tensors[group["name"]] = new
        group["params"] = [new]

    def wrapped(self, known: bool = True, **options: Any) -> ParallelPicardOptimizer:
        restructure = Restructure(self.duplicate, self.due)
        return ParallelPicardOptimizer(
            self.base,
            tolerance=0,
            seed=SEED,
            restructure=restructure,
            total_steps=STEPS,
            lr_scheduler=self.scheduler if known else None,
            **options,
        )

    def run(self, optimizer: ParallelPicardOptimizer, end: int = STEPS) -> Rates:
        rates = []
        while optimizer.step_index < end:
            rates.append([group["lr"] for group in self.base.param_groups])
            optimizer.step(self.closure)
            self.scheduler.step()
        return rates

    def plain(self) -> Rates:
        rates = []
        for step in range(STEPS):
            rates.append([group["lr"] for group in self.base.param_groups])
            with step_rng(SEED, step):
                self.closure(step)
                self.base.step()
                if self.due(step):
                    self.duplicate(step)
            self.scheduler.step()
        return rates

    def state_dict(self) -> dict[str, Any]:
        scene = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return {"scene": scene, "lr_scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for group in self.base.param_groups:
            self._replace(group, nn.Parameter(state["scene"][group["name"]]))
        self.scheduler.load_state_dict(state["lr_scheduler"])


def same(one: Points, other: Points) -> bool:
    """Whether parameters and optimizer states have the same bits."""
    found = [one.base.state_dict()["state"], other.base.state_dict()["state"]]
    moments = [[s[key] for s in states.values() for key in sorted(s)] for states in found]
    tensors = [
        [*points.tensors.values(), *each]
        for points, each in zip((one, other), moments, strict=True)
    ]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.fixture(scope="module")
def plain() -> tuple[Points, Rates]:
    points = Points()
    return points, points.plain()


@pytest.mark.parametrize("predictor", ["coast", "hold"])
@pytest.mark.parametrize(("window", "between"), [(2, [1, 2, 1]), (3, [1, 3]), (8, [1, 3])])
def test_bitwise_and_ahead_over_changes_of_the_number(
    plain: tuple[Points, Rates], window: int, between: list[int], predictor: str
) -> None:
    ahead = Points()
    optimizer = ahead.wrapped(window=window, predictor=predictor)
    assert ahead.run(optimizer) == plain[1]
    assert same(plain[0], ahead)
    assert len(ahead.tensors["means"]) == 3 + STEPS // EVERY
    # From one change to the next: a first sweep that sees every gradient, then those that move nothing.
    strides = [record.stride for record in optimizer.stats.records]
    assert strides[: len(between) * (STEPS // EVERY)] == between * (STEPS // EVERY)


def test_without_the_scheduler_the_rates_ahead_would_be_wrong(plain: tuple[Points, Rates]) -> None:
    points = Points()
    optimizer = points.wrapped(known=False, window=4)
    points.run(optimizer)
    assert same(plain[0], points)
    assert {record.stride for record in optimizer.stats.records} == {1}


def test_goes_on_bitwise_from_between_two_changes(
    tmp_path: Path, plain: tuple[Points, Rates]
) -> None:
    first = Points()
    optimizer = first.wrapped(window=5)
    rates = first.run(optimizer, end=10)
    save_checkpoint(tmp_path / "kept.pt", first.state_dict() | {"own": optimizer.state_dict()})
    again, state = Points(), load_checkpoint(tmp_path / "kept.pt")
    again.load_state_dict(state)
    other = again.wrapped(window=3)
    other.load_state_dict(state["own"])
    assert rates + again.run(other) == plain[1]
    assert same(plain[0], again)
