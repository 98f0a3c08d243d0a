"""Stands for simple-knn, whose compiled part `simple_knn._C` this is registered as."""

import torch
from torch import Tensor


def distCUDA2(points: Tensor) -> Tensor:
    """Returns each point's mean squared distance to its three nearest neighbours. [count]."""
    squared = torch.cdist(points, points).square()
    return squared.topk(4, largest=False).values[:, 1:].mean(1)
