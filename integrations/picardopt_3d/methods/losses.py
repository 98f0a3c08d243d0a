"""What recipes ask of a render besides the guidance, each a scalar to be weighted."""

from __future__ import annotations

import torch
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


def masked_colour(rgb: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error inside of a mask, against a picture that is cut out by it.

    Args:
        rgb: what is seen. # [batch, 3, height, width]
        truth: what is to be seen. # the same
        mask: where it counts, in [0, 1]. # [batch, 1, height, width]
    """
    return F.mse_loss(rgb * mask, truth * mask)


def resized(picture: Tensor, size: int) -> Tensor:
    """A picture at another size, smoothed where it shrinks. [batch, channels, ...] -> [..., size, size]."""
    if picture.shape[-2:] == (size, size):
        return picture
    return torch.clamp(
        F.interpolate(picture, (size, size), mode="bilinear", align_corners=False, antialias=True),
        0.0,
        1.0,
    )
