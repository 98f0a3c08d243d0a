"""Stands for ashawkey/diff-gaussian-rasterization: the same interface over the rasterizer of picardopt-3d, in torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.gaussians.harmonics import view_colours
from picardopt_3d.scenes.gaussians.projection import project
from picardopt_3d.scenes.gaussians.splats import Splats
from picardopt_3d.scenes.gaussians.tiles import composite
from torch import Tensor, nn


class GaussianRasterizationSettings(NamedTuple):
    """A view: its size, its camera and what is behind the Gaussians."""

    image_height: int
    image_width: int
    tanfovx: float
    tanfovy: float
    bg: Tensor
    scale_modifier: float
    viewmatrix: Tensor
    projmatrix: Tensor
    sh_degree: int
    campos: Tensor
    prefiltered: bool
    debug: bool


class GaussianRasterizer(nn.Module):
    """Renders Gaussians from one camera."""

    def __init__(self, raster_settings: GaussianRasterizationSettings) -> None:
        super().__init__()
        self.raster_settings = raster_settings

    def forward(
        self,
        means3D: Tensor,
        means2D: Tensor,
        opacities: Tensor,
        shs: Tensor,
        scales: Tensor,
        rotations: Tensor,
        colors_precomp: None = None,
        cov3D_precomp: None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns colour, radii in pixels, depth and opacity; `means2D` receives the gradient of the screen's centres.

        As in the extension that gradient is per half an edge of the screen.
        """
        view = self.raster_settings
        height, width = view.image_height, view.image_width
        splats = Splats(
            means3D,
            (scales * view.scale_modifier).log(),
            rotations,
            opacities[:, 0],
            shs[:, 0],
            shs[:, 1:],
        )
        cameras = _cameras(view)
        projected = project(splats, opacities[:, 0], cameras, height, width)
        edges = means2D.new_tensor([width / 2, height / 2])
        projected = projected._replace(means2d=projected.means2d + means2D[None, :, :2] * edges)
        offsets = means3D[None] - cameras.position[:, None]
        colours = view_colours(splats.colours, splats.harmonics, offsets, view.sh_degree)
        depths = projected.depths[..., None]
        features = torch.cat([colours, torch.ones_like(depths), depths], dim=-1)
        pictures = composite(projected, opacities[:, 0], features, height, width)
        colour, opacity, depth = pictures[0].split((3, 1, 1))
        radii = projected.extents[0].amax(-1).ceil().int()
        return colour + (1 - opacity) * view.bg[:, None, None], radii, depth, opacity


def _cameras(view: GaussianRasterizationSettings) -> Cameras:
    """Returns the camera: its matrix goes from the world to x right, y down, z forward, and is transposed."""
    pose = torch.linalg.inv(view.viewmatrix.mT.float())
    pose = pose * pose.new_tensor([1.0, -1.0, -1.0, 1.0])
    unused = pose.new_zeros(1)
    fov = pose.new_tensor([math.degrees(2 * math.atan(view.tanfovy))])
    return Cameras(pose[None], fov, unused, unused, unused)
