"""What recipes ask of a render besides the guidance, each a scalar to be weighted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sparsity(opacity: Tensor) -> Tensor:
    """Mean of sqrt(opacity^2 + 0.01), which clears floaters (DreamFusion). Opacity: [batch, 1, height, width]."""
    return (opacity.square() + 0.01).sqrt().mean()


def opaqueness(opacity: Tensor) -> Tensor:
    """Binary entropy of the opacity: least where a pixel is either hit or missed. [batch, 1, height, width]."""
    sure = opacity.clamp(1e-3, 1 - 1e-3)
    return F.binary_cross_entropy(sure, sure)


def image_smoothness(normal: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of normals, down plus across. [batch, 3, height, width]."""
    down = (normal[..., 1:, :] - normal[..., :-1, :]).square().mean()
    across = (normal[..., :, 1:] - normal[..., :, :-1]).square().mean()
    return down + across
