"""A run that can be stopped in the middle of a joined sweep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from picardopt import ParallelPicardOptimizer, StepRelativeTolerance, batched
from tests.helpers.shared import Scene, target

Extra = Callable[[int, str], None]


class Loop:
    """A run that can be stopped in the middle of a joined sweep, by `extra(step, where)`."""

    def __init__(self, extra: Extra, score: Any = None, **options: Any) -> None:
        self.scene, self.score = Scene("batchnorm"), batched(target) if score is None else score
        self.optimizer = ParallelPicardOptimizer(
            torch.optim.Adam(self.scene.parameters(), lr=0.01),
            tolerance=StepRelativeTolerance(1.0),
            **{"window": 4, "carry": self.scene, **options},
        )
        self.extra = extra

    def closure(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        seen = self.scene.view()
        self.extra(step, "before")
        wanted = self.score(seen.detach(), torch.rand(3, 1, dtype=torch.float64))
        self.extra(step, "after")
        loss = (self.scene.second(seen) - wanted).square().mean()
        loss.backward()
        return loss

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.step(self.closure)

    def run_out(self) -> int:
        """Goes on until nothing is queued; returns the next step, which is then the first of a sweep."""
        while self.optimizer._speculator is not None and self.optimizer._speculator.queue:
            self.steps(1)
        return self.optimizer.step_index

    def state(self) -> list[Tensor]:
        return [t.detach().clone() for t in [*self.scene.parameters(), *self.scene.buffers()]]


def nothing(step: int, where: str) -> None:
    """Lets the run pass."""
