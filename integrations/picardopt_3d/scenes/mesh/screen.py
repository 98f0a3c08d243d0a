"""Triangles as a camera sees them: homogeneous coordinates in pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras

NEAR = 0.01
"""Least depth that is seen, world units; what is nearer, or behind the camera, is cut off."""


class Screen(NamedTuple):
    """Points on the screens of cameras: (x / depth, y / depth) are pixels right of and below the picture's middle.

    Attributes:
        x: Columns times depths. [views, points]
        y: Rows times depths. [views, points]
        depth: Distances along the camera's axis, world units. [views, points]
    """

    x: Tensor
    y: Tensor
    depth: Tensor


def on_screen(points: Tensor, cameras: Cameras, height: int) -> Screen:
    """Returns points on the screens of cameras, differentiable in the points.

    Each view has the bits that it has alone: no matrix product, whose order of sums depends on its size.

    Args:
        points: Positions, world units, `[points, 3]`.
        cameras: The cameras, on the device of the points.
        height: Rows of pixels.
    """
    cameras = cameras.to(points.dtype)
    focal = 0.5 * height / torch.tan(torch.deg2rad(cameras.fov) / 2)  # [views]
    turn = cameras.camera_to_world[:, :3, :3] * torch.stack(
        [focal, -focal, -torch.ones_like(focal)], dim=-1
    ).unsqueeze(1)  # [views, 3 (axis of the world), 3 (axis of the screen)]
    away = points.T[None] - cameras.position[..., None]  # [views, 3, points]
    axes = (
        away[:, 0] * turn[:, 0, i, None]
        + away[:, 1] * turn[:, 1, i, None]
        + away[:, 2] * turn[:, 2, i, None]
        for i in range(3)
    )
    return Screen(*axes)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Returns `values[..., index]`; its gradient is summed in an order that no thread changes.

    Args:
        values: Numbers, `[..., count]`.
        index: Places along the last dimension, int64, `[taken]`.
    """
    if values.device.type != "cpu":
        return values[
            ..., index
        ]  # its gradient sorts, where that of gather adds with atomic operations
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Returns `values[index]`; its gradient is summed in an order that no thread changes.

    Args:
        values: Numbers, `[rows, ...]`.
        index: Rows, int64, `[taken]`.
    """
    return values.index_select(0, index) if values.device.type == "cpu" else values[index]


def add_rows(values: Tensor, index: Tensor, more: Tensor) -> Tensor:
    """Returns the values after rows were added to some of theirs, in an order that no thread changes.

    Args:
        values: Numbers, `[rows, channels]`.
        index: Rows of `values`, int64, with repetitions, `[added]`.
        more: What is added, `[added, channels]`.
    """
    if values.device.type == "cpu":
        return values.index_add(0, index, more)
    return values.index_put((index,), more, accumulate=True)
