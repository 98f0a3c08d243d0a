"""What steps measure of Gaussians, which decides how many there are next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Statistics(NamedTuple):
    """What steps measured of each Gaussian since their number last changed.

    Ranks that share a step (a data axis) average all three, so that a radius is the mean of the largest on each rank.

    Attributes:
        gradients: Sum over views of the length of the gradient of its centre on the screen, whose edges are at -1 and
            1. [count]
        views: Number of views that saw it. [count]
        radii: Largest radius seen, as a share of the picture's edge. [count]
    """

    gradients: Tensor
    views: Tensor
    radii: Tensor

    @classmethod
    def zeros(cls, count: int, device: torch.device | str | None = None) -> Statistics:
        """Returns those of Gaussians that no view has seen; floating, so that ranks can average them."""
        return cls(*(torch.zeros(count, device=device) for _ in cls._fields))

    @torch.no_grad()
    def add_(self, seen: Statistics) -> None:
        """Adds what one more step measured, in place."""
        self.gradients.add_(seen.gradients)
        self.views.add_(seen.views)
        self.radii.copy_(torch.maximum(self.radii, seen.radii))


class RunningStatistics(nn.Module):
    """`Statistics` as buffers, which steps rewrite.

    Args:
        count: Number of Gaussians.
    """

    gradients: Tensor
    views: Tensor
    radii: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        for name, value in Statistics.zeros(count)._asdict().items():
            self.register_buffer(name, value)

    def present(self) -> Statistics:
        """Returns the buffers."""
        return Statistics(self.gradients, self.views, self.radii)

    def reset(self, count: int) -> None:
        """Puts zeros for another number of Gaussians in place of the buffers."""
        for name, value in Statistics.zeros(count, self.gradients.device)._asdict().items():
            setattr(self, name, value)
