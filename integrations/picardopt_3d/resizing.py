"""Pictures in another size."""

from __future__ import annotations

from torch import Tensor, eye
from torch.nn import functional


def resize(pictures: Tensor, size: int) -> Tensor:
    """Resizes pictures by bilinear interpolation; smaller ones are averages. Bits repeat on every device.

    Args:
        pictures: Float32, `[batch, channels, height, width]`.
        size: Pixels along each edge of the result.

    Returns:
        Differentiable in the pictures, `[batch, channels, size, size]`.
    """
    if pictures.device.type == "cpu":
        return _interpolated(pictures, (size, size))
    return _multiplied(pictures, size)


def _interpolated(pictures: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns pictures of a height and a width."""
    return functional.interpolate(
        pictures, shape, mode="bilinear", align_corners=False, antialias=True
    )


def _multiplied(pictures: Tensor, size: int) -> Tensor:
    """Returns the same by matrix products: the gradient of interpolation adds with atomic operations on CUDA."""
    height, width = pictures.shape[-2:]
    rows, columns = (
        _interpolated(eye(count)[None, None], (size, count))[0, 0].to(pictures)
        for count in (height, width)
    )
    resized: Tensor = rows @ pictures @ columns.T
    return resized
