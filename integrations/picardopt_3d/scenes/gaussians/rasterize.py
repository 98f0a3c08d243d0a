"""Rasterizes 3D Gaussians, with gsplat on CUDA or in plain torch on any device."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.gaussians.config import Rasterizer
from picardopt_3d.scenes.gaussians.gsplat_backend import (
    installed,
    rasterize_gsplat,
    why_not,
)
from picardopt_3d.scenes.gaussians.harmonics import MOST_DEGREE, count_higher, view_colours
from picardopt_3d.scenes.gaussians.projection import project
from picardopt_3d.scenes.gaussians.splats import Splats, check_finite
from picardopt_3d.scenes.gaussians.tiles import composite


class Rasterized(NamedTuple):
    """Pictures of 3D Gaussians.

    Attributes:
        colour: RGB, multiplied by the opacity, without a background. [views, 3, height, width]
        opacity: What the Gaussians cover of a pixel, 0 to 1. [views, 1, height, width]
        depth: Sum of the Gaussians' distances from the camera times their weights, world units: divided by the opacity
            it is the mean distance. [views, 1, height, width]
        means2d: Centres on the screen, pixels; a hook on it receives their gradient. [views, count, 2]
        radii: Half of the longer edge of the box in which a Gaussian covers at least 1/255 of a pixel, whole pixels; 0:
            not seen. [views, count]
    """

    colour: Tensor
    opacity: Tensor
    depth: Tensor
    means2d: Tensor
    radii: Tensor


def rasterize(
    splats: Splats,
    cameras: Cameras,
    height: int,
    width: int,
    *,
    degree: int,
    rasterizer: Rasterizer = "auto",
) -> Rasterized:
    """Renders 3D Gaussians.

    Args:
        splats: The Gaussians.
        cameras: The cameras, on the device of the Gaussians.
        height: Rows of pixels.
        width: Columns of pixels; pixels are square.
        degree: Degree of the spherical harmonics that are used, 0 to 3.
        rasterizer: "gsplat" (CUDA), "torch" (any device), or "auto": gsplat on CUDA if it is installed.

    Raises:
        ValueError: A number is not finite, the degree or the size cannot be, or the rasterizer cannot be used here.
    """
    _check(splats, cameras, degree, height, width)
    cameras = cameras.to(splats.means.dtype)
    opacities = torch.sigmoid(splats.opacity_logits)
    offsets = splats.means[None] - cameras.position[:, None]
    colours = view_colours(splats.colours, splats.harmonics, offsets, degree)
    distances = offsets.norm(dim=-1, keepdim=True)
    if chosen(rasterizer, splats.means.device) == "gsplat" and len(splats.means):
        features = torch.cat([colours, distances], dim=-1)
        pictures, opacity, means2d, extents = rasterize_gsplat(
            splats, opacities, features, cameras, height, width
        )
        return Rasterized(
            pictures[:, :3], opacity, pictures[:, 3:], means2d, extents.amax(-1).ceil()
        )
    features = torch.cat([colours, torch.ones_like(distances), distances], dim=-1)
    projected = project(splats, opacities, cameras, height, width)
    pictures = composite(projected, opacities, features, height, width)
    colour, opacity, depth = pictures.split((3, 1, 1), dim=1)
    return Rasterized(colour, opacity, depth, projected.means2d, projected.extents.amax(-1).ceil())


def chosen(rasterizer: Rasterizer, device: torch.device) -> Literal["torch", "gsplat"]:
    """Returns the rasterizer that is used on a device; the same one in every process of a run.

    Raises:
        ValueError: gsplat is asked for, or installed for this device, and cannot be used.
    """
    automatic = rasterizer == "auto"
    if rasterizer == "torch" or (automatic and (device.type != "cuda" or not installed())):
        return "torch"
    reason = why_not(device)
    if reason is None:
        return "gsplat"
    remedy = 'give rasterizer="torch"'
    if automatic:  # to go on with torch would let one process draw otherwise than the others
        remedy = f"build it in one process with `picardopt doctor`, or {remedy}"
    raise ValueError(f'rasterizer="{rasterizer}": {reason}; {remedy}')


def _check(splats: Splats, cameras: Cameras, degree: int, height: int, width: int) -> None:
    """Refuses what has no picture.

    Raises:
        ValueError: See `rasterize`.
    """
    if not 0 <= degree <= MOST_DEGREE:
        raise ValueError(f"degree={degree}: give 0 to {MOST_DEGREE}")
    rows = splats.harmonics.shape[1]
    if rows < count_higher(degree):
        raise ValueError(
            f"degree={degree} needs {count_higher(degree)} rows of harmonics, and there are {rows}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width}: give at least one pixel")
    check_finite(splats, cameras)
