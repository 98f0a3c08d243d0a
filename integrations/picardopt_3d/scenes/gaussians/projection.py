"""3D Gaussians projected onto the screen (arXiv 2308.04079, section 4; EWA splatting)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.gaussians.splats import Splats

BLUR = 0.3
"""Variance that is added on the screen, square pixels, so that no Gaussian falls between the pixels."""

LEAST_ALPHA = 1 / 255
"""What covers less of a pixel is left out."""

NEAR, FAR = 0.01, 1e10
"""Depths between which Gaussians are seen, both excluded."""

_SLOPE_LIMIT = 1.3
"""The projection is made linear at most this far out, as a multiple of the picture's edge."""
_WIDEST = 1e6
"""Centres further off the camera's axis than this multiple of their depth are not seen."""
_LARGEST_SCALE = 1e3
"""Larger standard deviations, world units, are treated as this one, so that squares of squares stay finite."""


class Projected(NamedTuple):
    """3D Gaussians on the screen. Pixel (column, row) has its centre at (column + 0.5, row + 0.5), row 0 on top.

    Attributes:
        means2d: Centres, pixels. [views, count, 2]
        covariances: xx, xy and yy, square pixels, with the blur. [views, count, 3]
        depths: Distances along the camera's axis, world units. [views, count]
        extents: Half the edges of the box in which they cover at least `LEAST_ALPHA`, pixels; 0: not seen.
            [views, count, 2]
    """

    means2d: Tensor
    covariances: Tensor
    depths: Tensor
    extents: Tensor


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Returns the rotations of quaternions w, x, y, z of any length; that of 0 is the identity.

    Args:
        quaternions: Quaternions. [count, 4]

    Returns:
        Matrices. [count, 3, 3]
    """
    w, x, y, z = functional.normalize(quaternions, dim=-1).unbind(-1)
    xx, yy, zz, xy, xz, yz = x * x, y * y, z * z, x * y, x * z, y * z
    wx, wy, wz = w * x, w * y, w * z
    entries = [
        *(1 - 2 * (yy + zz), 2 * (xy - wz), 2 * (xz + wy)),
        *(2 * (xy + wz), 1 - 2 * (xx + zz), 2 * (yz - wx)),
        *(2 * (xz - wy), 2 * (yz + wx), 1 - 2 * (xx + yy)),
    ]
    return torch.stack(entries, dim=-1).view(-1, 3, 3)


def axes(splats: Splats) -> Tensor:
    """Returns the Gaussians' own axes in the world, times their standard deviations; a covariance is axes @ axes.mT.

    Args:
        splats: The Gaussians.

    Returns:
        One axis a column. [count, 3, 3]
    """
    scales = splats.log_scales.clamp(max=math.log(_LARGEST_SCALE)).exp()
    return rotation_matrices(splats.rotations) * scales[:, None]


def world_to_camera(cameras: Cameras) -> Tensor:
    """Returns the matrices into the axes of computer vision: x right, y down, z forward: `[views, 4, 4]`."""
    pose = cameras.camera_to_world
    turn = (pose[:, :3, :3] * pose.new_tensor([1.0, -1.0, -1.0])).mT
    matrix = torch.eye(4, dtype=pose.dtype, device=pose.device).repeat(len(pose), 1, 1)
    matrix[:, :3, :3] = turn
    matrix[:, :3, 3:] = -turn @ pose[:, :3, 3:]
    return matrix


def focal_lengths(cameras: Cameras, height: int) -> Tensor:
    """Returns the focal lengths, pixels; pixels are square: `[views]`."""
    return 0.5 * height / torch.tan(torch.deg2rad(cameras.fov) / 2)


def project(
    splats: Splats, opacities: Tensor, cameras: Cameras, height: int, width: int
) -> Projected:
    """Projects Gaussians onto the screens of cameras.

    Those that are not seen (behind the near plane, beside the picture, too transparent) get an extent of 0.

    Args:
        splats: The Gaussians.
        opacities: Their opacities, 0 to 1. [count]
        cameras: The cameras, of the same dtype and device.
        height: Rows of pixels.
        width: Columns of pixels.
    """
    matrix = world_to_camera(cameras)
    turn = matrix[:, None, :3, :3]  # [views, 1, 3, 3]
    centres = splats.means @ matrix[:, :3, :3].mT + matrix[:, None, :3, 3]  # [views, count, 3]
    focal = focal_lengths(cameras, height)[:, None, None]  # [views, 1, 1]
    with torch.no_grad():
        depths = centres[..., 2]
        before = (depths > NEAR) & (depths < FAR)
        before &= centres[..., :2].abs().amax(-1) <= _WIDEST * depths
    ahead = centres.new_tensor([0.0, 0.0, 1.0])
    x, y, z = torch.where(before[..., None], centres, ahead).split(1, dim=-1)
    across, down = x / z, y / z  # [views, count, 1]
    middle = centres.new_tensor([0.5 * width, 0.5 * height])
    means2d = focal * torch.cat([across, down], dim=-1) + middle
    limit_y = _SLOPE_LIMIT * 0.5 * height / focal
    limit_x = limit_y * (width / height)
    columns = turn @ axes(splats)[None]  # [views, count, 3 (camera's axis), 3 (own axis)]
    ratio = focal / z
    row_x = ratio * (columns[..., 0, :] - across.clamp(-limit_x, limit_x) * columns[..., 2, :])
    row_y = ratio * (columns[..., 1, :] - down.clamp(-limit_y, limit_y) * columns[..., 2, :])
    covariances = torch.stack(
        [(row_x * row_x).sum(-1) + BLUR, (row_x * row_y).sum(-1), (row_y * row_y).sum(-1) + BLUR],
        dim=-1,
    )
    with torch.no_grad():
        sigmas = (2 * torch.log(opacities / LEAST_ALPHA)).clamp_min(0).sqrt()  # [count]
        extents = sigmas[:, None] * covariances[..., ::2].sqrt()
        size = means2d.new_tensor([width, height])
        seen = before & (sigmas > 0)
        radii = extents.ceil()  # whole pixels, as gsplat counts
        seen &= ((means2d + radii > 0) & (means2d - radii < size)).all(-1)
        extents = extents * seen[..., None]
    return Projected(means2d, covariances, depths, extents)
