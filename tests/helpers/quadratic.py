"""A noisy quadratic with a flat and a stiff group of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from picardopt import DriftTolerance, ParallelPicardOptimizer


class Quadratic:
    """Noisy gradients of ``x' A x / 2`` in two parameter groups, one flat and one stiff."""

    def __init__(self, noise: float = 0.1, stiff: float = 30.0, **options: Any) -> None:
        torch.manual_seed(0)
        self.flat, self.stiff = nn.Parameter(torch.randn(40)), nn.Parameter(torch.randn(3))
        self.noise, self.curvature = noise, stiff
        base = torch.optim.SGD([{"params": [self.flat]}, {"params": [self.stiff]}], 0.01, 0.9)
        self.optimizer = ParallelPicardOptimizer(
            base, **{"window": 8, "seed": 3, "tolerance": DriftTolerance(), **options}
        )

    def loss(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        noise = [torch.randn_like(p) for p in (self.flat, self.stiff)]
        loss = (self.flat**2).sum() / 2 + self.curvature * (self.stiff**2).sum() / 2
        loss = loss + self.noise * ((noise[0] * self.flat).sum() + (noise[1] * self.stiff).sum())
        loss.backward()
        return loss

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.loss)
