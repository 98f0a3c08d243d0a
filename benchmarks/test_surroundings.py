"""What it costs at every step to compare what a closure sees with what it saw: under 50 microseconds.

Run `pytest benchmarks/test_surroundings.py`; the minimum counts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from picardopt.audit.surroundings import Surroundings

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=50)


class Trainer:
    """An ordinary training script's object."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(layers)]
        self.model = nn.Sequential(*blocks)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.loader = torch.utils.data.DataLoader(torch.zeros(16, 8), batch_size=4)
        self.weight, self.log = 1.0, [0.0] * 20

    def closure(self, step: int) -> Any:
        self.optimizer.zero_grad()
        loss = self.weight * self.model(next(iter(self.loader))).square().mean()
        loss.backward()
        return loss


def function(trainer: Trainer) -> Any:
    """The same as a closure over a few variables."""
    optimizer, model, loader, weight = trainer.optimizer, trainer.model, trainer.loader, 1.0

    def closure(step: int) -> Any:
        optimizer.zero_grad()
        loss = weight * model(next(iter(loader))).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", ["function", "method"])
def test_nothing_changed(benchmark: Any, kind: str) -> None:
    trainer = Trainer(layers=10)  # 20 parameters
    closure = function(trainer) if kind == "function" else trainer.closure
    surroundings = Surroundings([*trainer.model.parameters(), trainer.optimizer])
    surroundings.changed(closure)
    assert benchmark(surroundings.changed, closure) == []
    trainer.model.eval()
    assert surroundings.changed(closure)


def test_a_frozen_network(benchmark: Any) -> None:
    """A teacher of 400 tensors in 600 modules, as large as a latent diffusion model's."""
    teacher = Trainer(layers=200).model.requires_grad_(False)

    def closure() -> Any:
        return teacher

    surroundings = Surroundings()
    surroundings.changed(closure)
    assert benchmark(surroundings.changed, closure) == []


def test_first_look(benchmark: Any) -> None:
    """Once per closure, and whenever another function is handed over."""
    trainer = Trainer(layers=10)

    def look() -> list[str]:
        return Surroundings(trainer.model.parameters()).changed(trainer.closure)

    assert benchmark(look) == []
