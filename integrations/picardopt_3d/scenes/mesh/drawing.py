"""Renders of triangles, whatever their colours are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.config import Rasterizer
from picardopt_3d.scenes.mesh.geometry import length, unit, vertex_normals
from picardopt_3d.scenes.mesh.rasterize import Fragments, antialias, interpolate, rasterize
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.tiles import joined
from picardopt_3d.scenes.views import Light, Render
from picardopt_3d.scenes.volume import lambert

_PIXELS_AT_ONCE = 1 << 18
"""Pixels that are drawn together when no gradient is needed, or one view."""


@dataclass(frozen=True)
class Covered:
    """The pixels that show a surface.

    Attributes:
        fragments: What the whole picture shows.
        index: Which of all pixels of all views show the surface, ascending, `[count]`.
        points: Points of the surface at their centres, world units, `[count, 3]`.
    """

    fragments: Fragments
    index: Tensor
    points: Tensor


@dataclass(frozen=True)
class Drawable:
    """Triangles, with all that their render depends on.

    Attributes:
        triangles: The triangles.
        colours: Returns the albedo of pixels that show a surface, RGB in [0, 1], `[3, count]`.
        background: Returns the background of views of a height and width, RGB, `[views, height, width, 3]`.
        trained: The parameters that are trained: an empty view has them in its graph, with gradients of 0.
        rasterizer: What draws the triangles.
        samples: Points along each edge of a pixel, whose mean it shows.
    """

    triangles: Triangles
    colours: Callable[[Covered], Tensor]
    background: Callable[[Cameras, tuple[int, int]], Tensor]
    trained: Sequence[Tensor]
    rasterizer: Rasterizer
    samples: int = 1


def draw_mesh(
    mesh: Drawable,
    cameras: Cameras,
    size: int | tuple[int, int],
    *,
    normals: bool,
    normal_smoothness: bool,
    light: Light | None,
    background: Tensor | None,
) -> Render:
    """Draws triangles; see `Scene.render`. Nothing is drawn at random.

    An empty surface leaves the background, with gradients of 0.

    Args:
        mesh: The triangles.
        cameras: See `Scene.render`, as for all that follow.
        size: Pixels along each edge, or (height, width).
        normals: Whether to draw normals.
        normal_smoothness: Refused.
        light: Light on the surface; None: the albedo is shown.
        background: Colour in place of the mesh's own background, RGB in [0, 1], `[batch, 3]`.

    Raises:
        ValueError: The smoothness of normals in space is asked for, which triangles do not have; see `rasterize`.
    """
    if normal_smoothness:
        raise ValueError(
            "a mesh has no normals off its surface: leave weights.normal_smoothness_3d at 0"
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = (height * mesh.samples, width * mesh.samples)

    def draw(part: slice) -> Render:
        lit = light and replace(light, position=light.position[part])
        colour = None if background is None else background[part]
        return _draw(mesh, cameras[part], shape, normals, lit, colour)

    views = max(1, _PIXELS_AT_ONCE // (shape[0] * shape[1]))
    if torch.is_grad_enabled() or len(cameras) <= views:
        return draw(slice(None))
    parts = [draw(slice(first, first + views)) for first in range(0, len(cameras), views)]
    return replace(joined([[part] for part in parts], [1] * len(parts)), triangles=mesh.triangles)


def _draw(
    mesh: Drawable,
    cameras: Cameras,
    shape: tuple[int, int],
    normals: bool,
    light: Light | None,
    background: Tensor | None,
) -> Render:
    """Draws all views at once, from pictures of the height and width `shape`, whose pixels are averaged."""
    triangles = mesh.triangles
    if background is None:
        image = mesh.background(cameras, shape)
    else:
        image = background.to(triangles.vertices)[:, None, None].expand(len(cameras), *shape, 3)
    image = F.pad(image, (0, 5 if normals else 2))  # colour, opacity, depth, normal
    fragments = index = None
    if len(triangles.faces):
        fragments = rasterize(triangles, cameras, *shape, rasterizer=mesh.rasterizer)
        index = (fragments.face.view(-1) >= 0).nonzero().squeeze(1)
    if fragments is not None and index is not None and len(index):
        seen = _seen(mesh, fragments, index, cameras, normals, light)
        image = image.flatten(0, 2).index_copy(0, index, seen).view(image.shape)
        image = antialias(image, fragments, triangles, cameras)
    elif torch.is_grad_enabled():
        for parameter in mesh.trained:
            image = image + 0.0 * parameter.view(-1)[:1].sum()
    image = image.permute(0, 3, 1, 2)
    if mesh.samples > 1:
        image = F.avg_pool2d(image, mesh.samples)
    return Render(
        rgb=image[:, :3],
        opacity=image[:, 3:4],
        depth=image[:, 4:5],
        normal=image[:, 5:] if normals else None,
        triangles=triangles,
    )


def _seen(
    mesh: Drawable,
    fragments: Fragments,
    index: Tensor,
    cameras: Cameras,
    normals: bool,
    light: Light | None,
) -> Tensor:
    """Returns colour, opacity, depth and, if they are drawn, unit normals of pixels, `[count, 5 or 8]`.

    Args:
        mesh: The triangles.
        fragments: What the views show.
        index: Which of their pixels show the surface, `[count]`.
        cameras: The cameras.
        normals: Whether normals are drawn.
        light: The views' lights.
    """
    corners = mesh.triangles.vertices
    if normals or light is not None:
        corners = torch.cat([corners, vertex_normals(mesh.triangles)], 1)
    found = interpolate(fragments, mesh.triangles.faces, corners)
    found = found.flatten(0, 2).index_select(0, index)  # [count, 3 or 6]
    view = index // fragments.face[0].numel()
    points, normal = found[:, :3], unit(found[:, 3:])
    colour = mesh.colours(Covered(fragments, index, points))
    if light is not None:
        towards = F.normalize(light.position.to(points)[view] - points, dim=1)
        colour = lambert(colour, normal.T, towards.T, light)
    depth = length(points - cameras.position[view])[:, None]
    parts = [colour.T, torch.ones_like(depth), depth]
    return torch.cat([*parts, normal] if normals else parts, 1)
