"""The level at which a surface has the outlines that its scene shows.

What a scene calls its surface need not be what its views show. Gaussians are blurred by the pixels that they are drawn
on, and those that were trained on few pixels look larger there than their density is; a soft field seems to end where
its opacity has added up. The views decide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.config import TexturedMeshConfig
from picardopt_3d.scenes.mesh.extract import Grid, sample, triangles_of
from picardopt_3d.scenes.mesh.surfaces import FAINT, NoSurfaceError, empty_scene
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.viewpoints import views_around
from picardopt_3d.scenes.scene import Scene

_FINER = 2  # rays along each edge of a pixel
_SAMPLES = 2  # along a ray for each spacing of the grid
_RAYS = 1 << 13  # that are followed at once, to limit memory


def outlined(scene: Scene, config: TexturedMeshConfig) -> Triangles:
    """Returns the triangles of any scene: its own, or those of its surface, at the level that fits its views.

    Args:
        scene: The scene.
        config: What is wanted of the mesh.

    Raises:
        ValueError: The scene has no surface, or is empty.
    """
    if scene.shell() is not None or config.level is not None:
        return triangles_of(scene, config.resolution, level=config.level or 0.0, faces=config.faces)
    grid = sample(scene.surface(), config.resolution)
    return grid.triangles(level_of(scene, grid, config), faces=config.faces)


@torch.no_grad()
def level_of(scene: Scene, grid: Grid, config: TexturedMeshConfig) -> float:
    """Returns the level at which outlines differ least from the opacity of a scene's views.

    A ray meets the inside of the surface at every level below its largest value. Of all levels this is the one with the
    least squared difference between whether rays do, and how opaque the scene is there.

    Args:
        scene: The scene.
        grid: Its level set.
        config: Which views are taken.

    Raises:
        NoSurfaceError: The scene is empty.
    """
    lowest = float(grid.inside.min())
    block = torch.full_like(grid.distance, lowest)
    block[grid.within] = grid.inside
    block = block.float().view(1, 1, *(grid.resolution,) * 3)
    solid = grid.within[grid.inside > 0]
    reach = float(grid.distance[solid].max()) if len(solid) else grid.radius
    cameras = views_around(reach, config.view_distance, config.view_fov)
    highest, opacity = [], []
    for index in range(0, len(cameras), 2):
        camera = cameras[index : index + 1]
        alpha = scene.render(camera.to(scene.device), config.view_pixels).opacity
        fine = F.interpolate(alpha, scale_factor=_FINER, mode="bilinear", align_corners=False)
        opacity.append(fine.flatten().cpu())
        highest.append(_highest(block, grid, camera, fine.shape[-1]))
    return best_level(torch.cat(highest), torch.cat(opacity))


def best_level(highest: Tensor, opacity: Tensor) -> float:
    """Returns the level above which rays are opaque, as nearly as may be; the one nearest to 0 of those that are.

    Args:
        highest: The largest value on each ray, `[rays]`.
        opacity: How opaque each is, `[rays]`.

    Raises:
        NoSurfaceError: At no level is it better to say that rays are opaque than that none is, or that some are not
            than that all are.
    """
    order = highest.argsort(descending=True, stable=True)
    found, alpha = highest[order].double(), opacity[order].double()
    change = (1 - 2 * alpha).cumsum(0)  # of the squared difference, by calling so many rays opaque
    count = int(change.argmin()) + 1
    if float(opacity.max()) < FAINT or float(change[count - 1]) >= 0:
        raise empty_scene()
    if count == len(found):
        raise NoSurfaceError(
            "the scene before has no outlines: it is opaque all over its views. Give a larger view_distance or "
            "view_fov, so that they show where it ends, or the surface's level"
        )
    high, low = float(found[count - 1]), float(found[count])
    return min(max(0.0, low + (high - low) / 4), high - (high - low) / 4)


def _highest(block: Tensor, grid: Grid, camera: Cameras, size: int) -> Tensor:
    """Returns the largest value of a grid's level set on the ray through each pixel, `[size^2]`.

    Args:
        block: The values, `[1, 1, x, y, z]`.
        grid: The grid.
        camera: One camera.
        size: Pixels along each edge.
    """
    origins, directions = (part.reshape(-1, 3) for part in camera.rays(size, size))
    count = _SAMPLES * grid.resolution
    steps = torch.linspace(-grid.radius, grid.radius, count)
    middle = -(origins * directions).sum(1)
    edge = grid.spacing * (grid.resolution - 1) / 2
    found = []
    for part in torch.arange(len(origins)).split(_RAYS):
        along = middle[part, None] + steps
        points = origins[part, None] + along[:, :, None] * directions[part, None]
        places = points.flip(-1)[None, None] / edge  # its last axis is the grid's first
        values = F.grid_sample(block, places, padding_mode="border", align_corners=True)
        found.append(values[0, 0, 0].amax(1))
    return torch.cat(found)
