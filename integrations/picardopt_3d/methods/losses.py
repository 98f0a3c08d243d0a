"""Losses on a render besides the guidance; each is a scalar without a weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sparsity(opacity: Tensor) -> Tensor:
    """Returns the mean of sqrt(opacity^2 + 0.01), which removes floaters (DreamFusion).

    Args:
        opacity: Opacity in [0, 1], `[batch, 1, height, width]`.
    """
    return (opacity.square() + 0.01).sqrt().mean()


def opaqueness(opacity: Tensor) -> Tensor:
    """Returns the mean binary entropy of the opacity, which is least if every pixel is opaque or empty.

    Args:
        opacity: Opacity in [0, 1], `[batch, 1, height, width]`.
    """
    sure = opacity.clamp(1e-3, 1 - 1e-3)
    return F.binary_cross_entropy(sure, sure)


def image_smoothness(normal: Tensor) -> Tensor:
    """Returns the mean squared difference of neighbouring pixels, vertically plus horizontally.

    Args:
        normal: An image of normals, `[batch, 3, height, width]`.
    """
    down = (normal[..., 1:, :] - normal[..., :-1, :]).square().mean()
    across = (normal[..., :, 1:] - normal[..., :, :-1]).square().mean()
    return down + across
