"""A small regression whose step t draws its own batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from picardopt import ParallelPicardOptimizer, step_rng

STEPS = 12


class Regression:
    """A small model whose step t draws its own batch."""

    def __init__(self, window: int = 4, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.base = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.optimizer = (
            ParallelPicardOptimizer(self.base, window=window, **options) if window else self.base
        )

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=generator)
        return (self.model(x) - x[:, :2]).square().mean()

    def backward(self, step: int) -> Tensor:
        self.base.zero_grad()
        loss = self.loss(step)
        loss.backward()
        return loss

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def sequential(step_of: Callable[[Regression, int], Any]) -> list[Tensor]:
    regression = Regression(0)
    for step in range(STEPS):
        with step_rng(0, step):
            step_of(regression, step)
            regression.base.step()
    return regression.weights()
