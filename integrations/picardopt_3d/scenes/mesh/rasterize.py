"""Draws triangles, in plain torch on any device or with nvdiffrast on CUDA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.antialias import blend
from picardopt_3d.scenes.mesh.config import Rasterizer
from picardopt_3d.scenes.mesh.nvdiffrast_backend import (
    Rasterized,
    antialias_nvdiffrast,
    rasterize_nvdiffrast,
    why_not,
)
from picardopt_3d.scenes.mesh.screen import on_screen, take
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.z_buffer import nearest_faces, weights


class Fragments(NamedTuple):
    """What a picture of triangles shows at each pixel's centre.

    Attributes:
        face: Index of the nearest face, -1: none, int64. [views, height, width]
        barycentric: Perspective-correct weights of its three corners, differentiable in the vertices; 0 where there is
            no face. [views, height, width, 3]
        raw: What nvdiffrast needs to blend silhouettes; None: drawn in plain torch.
    """

    face: Tensor
    barycentric: Tensor
    raw: Rasterized | None = None


def rasterize(
    triangles: Triangles,
    cameras: Cameras,
    height: int,
    width: int,
    *,
    rasterizer: Rasterizer = "torch",
) -> Fragments:
    """Finds the nearest triangle at each pixel's centre, and where on it the pixel lies.

    Both sides of a triangle are drawn. What is nearer than `screen.NEAR`, or behind the camera, is cut off. The two
    rasterizers agree to rounding, but `antialias` finds fewer silhouettes with nvdiffrast: it does not see those of
    faces smaller than a pixel.

    Args:
        triangles: The triangles.
        cameras: The cameras, on the device of the triangles.
        height: Rows of pixels.
        width: Columns of pixels; pixels are square.
        rasterizer: "torch" (any device) or "nvdiffrast" (CUDA).

    Raises:
        ValueError: A vertex is not finite, the size cannot be, or the rasterizer cannot be used here.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width}: give at least one pixel")
    if not bool(triangles.vertices.isfinite().all()):
        raise ValueError(
            "a vertex of the mesh is not finite: the optimization diverged; lower the learning rate of its shape "
            "(rates.shape of a tetrahedral grid, rates.offsets of a textured mesh)"
        )
    check_usable(rasterizer, triangles.vertices.device)
    screen = on_screen(triangles.vertices, cameras, height)
    if rasterizer == "nvdiffrast" and len(triangles.faces) and len(cameras):
        return Fragments(*rasterize_nvdiffrast(screen, triangles.faces, height, width))
    face = nearest_faces(screen, triangles.faces, height, width)
    return Fragments(face, weights(screen, triangles.faces, face))


def interpolate(fragments: Fragments, faces: Tensor, values: Tensor) -> Tensor:
    """Returns values of the corners of faces, interpolated at each pixel; 0 where there is no face.

    Differentiable in the values and, through the weights, in the vertices.

    Args:
        fragments: What the picture shows.
        faces: Rows of `values` at the corners of each face, int64, `[faces, 3]`; not always the faces that were drawn:
            texture coordinates have rows of their own.
        values: The values, `[rows, channels]`.

    Returns:
        `[views, height, width, channels]`.
    """
    shape = fragments.face.shape
    place = (fragments.face.reshape(-1) >= 0).nonzero().squeeze(-1)
    rows = faces[fragments.face.reshape(-1)[place]].T.reshape(-1)
    corners = take(values.T, rows).view(values.shape[1], 3, -1)  # [channels, 3, pixels]
    shares = fragments.barycentric.reshape(-1, 3).index_select(0, place).T
    mixed = corners[:, 0] * shares[0] + corners[:, 1] * shares[1] + corners[:, 2] * shares[2]
    empty = mixed.new_zeros(fragments.face.numel(), values.shape[1])
    return empty.index_copy(0, place, mixed.T).view(*shape, values.shape[1])


def antialias(
    image: Tensor, fragments: Fragments, triangles: Triangles, cameras: Cameras
) -> Tensor:
    """Blends pixels across silhouettes, so that what a picture shows depends smoothly on the vertices.

    Args:
        image: The picture, with its background, `[views, height, width, channels]`.
        fragments: What the picture shows.
        triangles: The triangles that were drawn.
        cameras: The cameras they were drawn for.

    Returns:
        The picture, differentiable in `image` and in the vertices: `[views, height, width, channels]`.
    """
    if fragments.raw is not None:
        return antialias_nvdiffrast(image, fragments.raw)
    screen = on_screen(triangles.vertices, cameras, fragments.face.shape[1])
    depth = _depths(fragments, triangles.faces, screen.depth)
    return blend(image, fragments.face, depth, screen, triangles.faces)


@torch.no_grad()
def _depths(fragments: Fragments, faces: Tensor, depths: Tensor) -> Tensor:
    """Returns the depth at each pixel, infinite where there is no face: `[views, height, width]`.

    Args:
        fragments: What the picture shows.
        faces: The faces that were drawn, `[faces, 3]`.
        depths: Depths of the vertices, world units, `[views, vertices]`.
    """
    view, row, column = (fragments.face >= 0).nonzero(as_tuple=True)
    w = depths[view[:, None], faces[fragments.face[view, row, column]]]  # [pixels, 3]
    b = fragments.barycentric[view, row, column]
    depth = depths.new_full(fragments.face.shape, torch.inf)
    depth[view, row, column] = w[:, 0] * b[:, 0] + w[:, 1] * b[:, 1] + w[:, 2] * b[:, 2]
    return depth


def check_usable(rasterizer: Rasterizer, device: torch.device) -> None:
    """Checks that a rasterizer can be used on a device.

    Raises:
        ValueError: nvdiffrast is asked for, and cannot be used.
    """
    reason = why_not(device) if rasterizer == "nvdiffrast" else None
    if reason is not None:
        raise ValueError(f'rasterizer="{rasterizer}": {reason}; give rasterizer="torch"')
