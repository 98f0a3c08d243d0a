"""Extraction of a scene's surface as triangles: marching cubes, clean-up and simplification.

Triangles have the world's axes (right-handed, z up, the front along +x) and world units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from picardopt_3d.scenes.mesh.cleaning import cleaned
from picardopt_3d.scenes.mesh.surfaces import POINTS_AT_ONCE, NoSurfaceError
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.scene import Scene, Surface

_LEAST_RESOLUTION = 8

Progress = Callable[[int], object]
"""A function that is called with the number of points evaluated since the last call."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A surface's level set on a grid around its sphere.

    Attributes:
        radius: Radius of the sphere, world units.
        resolution: Points along each edge.
        spacing: Distance of neighbouring points, world units.
        distance: Distances of the points from the origin, `[points]`.
        within: Indices of the points inside the sphere, `[inside]`.
        inside: The level set there, float64, `[inside]`.
    """

    radius: float
    resolution: int
    spacing: float
    distance: Tensor
    within: Tensor
    inside: Tensor

    def values(self, level: float) -> Tensor:
        """Returns the level set minus `level`, negative outside the sphere, float32, `[x, y, z]`.

        Raises:
            NoSurfaceError: The level set is on one side of `level` everywhere.
        """
        _check(self.inside, level)
        inside = self.inside - level
        # The depth below the sphere, so steep that it matters only within one cell of the sphere.
        steep = float(self.inside.abs().max()) / self.spacing
        values = steep * (self.radius - self.distance)
        values[self.within] = torch.minimum(inside, values[self.within])
        # Marching cubes leaves holes or specks where a sample is exactly at the level.
        values[values == 0] = -1e-12 * steep * self.spacing
        return values.view((self.resolution,) * 3).float()

    def triangles(
        self, level: float, *, components: int | None = None, faces: int | None = None
    ) -> Triangles:
        """Returns the surface at a level; see `extract_triangles`."""
        # Imported here because it takes a second to import.
        from skimage.measure import marching_cubes

        corners, found, _, _ = marching_cubes(
            self.values(level).numpy(),
            0.0,
            spacing=(self.spacing,) * 3,
            gradient_direction="ascent",
            allow_degenerate=False,
        )
        corners = corners - self.spacing * (self.resolution - 1) / 2
        return cleaned(corners, found, components, faces, self.radius)


def check_options(resolution: int, components: int | None, faces: int | None) -> None:
    """Checks the options of an extraction.

    Raises:
        ValueError: One is out of range.
    """
    if resolution < _LEAST_RESOLUTION:
        raise ValueError(f"resolution={resolution}: give at least {_LEAST_RESOLUTION}")
    for name, value, least in (("components", components, 1), ("faces", faces, 4)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: give at least {least}, or leave it out")


@torch.no_grad()
def extract_triangles(
    surface: Surface,
    resolution: int = 128,
    *,
    level: float = 0.0,
    components: int | None = None,
    faces: int | None = None,
    progress: Progress | None = None,
) -> Triangles:
    """Extracts the triangles of a surface.

    Args:
        surface: The surface.
        resolution: Samples of the level set along each edge of the cube around the surface's sphere.
        level: Value of the level set at the surface: above 0 the surface lies deeper, below 0 farther out.
        components: Number of connected pieces to keep, those of largest area; None keeps all.
        faces: Number of triangles to simplify to, approximately, or as few as preserve the shape; None keeps all.
        progress: Called with the number of points evaluated since the last call.

    Returns:
        Closed triangles on the CPU, cut off at the surface's sphere as they are in renders.

    Raises:
        NoSurfaceError: The level set is on one side of `level` everywhere.
        ValueError: An option cannot be used, or the scene holds values that are not finite.
    """
    check_options(resolution, components, faces)
    grid = sample(surface, resolution, progress)
    return grid.triangles(level, components=components, faces=faces)


def triangles_of(
    scene: Scene,
    resolution: int = 128,
    *,
    level: float = 0.0,
    components: int | None = None,
    faces: int | None = None,
    progress: Progress | None = None,
) -> Triangles:
    """Returns the triangles of any scene: its own ones, simplified if they are too many, or those of its surface.

    Args:
        scene: The scene.
        resolution: See `extract_triangles`; of no use for a scene that consists of triangles, like `level`.
        level: See `extract_triangles`.
        components: See `extract_triangles`.
        faces: See `extract_triangles`.
        progress: See `extract_triangles`.

    Raises:
        ValueError: The scene has no surface, or no triangles.
    """
    shell = scene.shell()
    if shell is None:
        return extract_triangles(
            scene.surface(),
            resolution,
            level=level,
            components=components,
            faces=faces,
            progress=progress,
        )
    triangles = Triangles(shell.triangles.vertices.detach().cpu(), shell.triangles.faces.cpu())
    if not len(triangles.faces):
        raise NoSurfaceError("the scene has no triangles: its surface has vanished")
    corners = triangles.vertices.numpy()
    radius = float(np.abs(corners).max())
    return cleaned(corners, triangles.faces.numpy(), components, faces, radius)


def points_of(resolution: int) -> int:
    """Returns the number of points that `extract_triangles` evaluates at a resolution."""
    axis = _axis(resolution).square()
    squared = axis[:, None, None] + axis[:, None] + axis
    return int((squared < 1).sum())


def _axis(resolution: int) -> Tensor:
    """Returns grid coordinates along one edge, in radii; the outermost ones lie outside the sphere."""
    edge = (resolution - 1) / (resolution - 3)
    return torch.linspace(-edge, edge, resolution, dtype=torch.float64)


@torch.no_grad()
def sample(surface: Surface, resolution: int, progress: Progress | None = None) -> Grid:
    """Evaluates a surface's level set on a grid; see `extract_triangles`.

    Raises:
        ValueError: The scene holds values that are not finite.
    """
    axis = _axis(resolution) * surface.radius
    squared = axis.square()
    distance = (squared[:, None, None] + squared[:, None] + squared).sqrt().flatten()
    within = torch.nonzero(distance < surface.radius).squeeze(1)
    found = []
    for part in within.split(POINTS_AT_ONCE):
        x, rest = part // resolution**2, part % resolution**2
        points = torch.stack([axis[x], axis[rest // resolution], axis[rest % resolution]], dim=-1)
        found.append(surface.level_set(points.to(surface.device, torch.float32)).double().cpu())
        if progress is not None:
            progress(len(part))
    inside = torch.cat(found)
    if not bool(inside.isfinite().all()):
        raise ValueError(
            "the scene holds values that are not finite: its optimization diverged; take another checkpoint, or run "
            "it again with a smaller learning rate"
        )
    spacing = 2 * surface.radius / (resolution - 3)
    return Grid(surface.radius, resolution, spacing, distance, within, inside)


def _check(inside: Tensor, level: float) -> None:
    """Checks that the scene has a surface at the level.

    Args:
        inside: Values of the level set within the sphere, `[points]`.
        level: The requested level.

    Raises:
        NoSurfaceError: All values are on one side of the level.
    """
    low, high = float(inside.min()), float(inside.max())
    if high <= level:
        raise NoSurfaceError(
            f"level={level:g}: the scene has no surface there; its level set ranges from {low:.4g} to "
            f"{high:.4g}. Give a lower level (a lower density threshold), such as {high - (high - low) / 4:.4g}, or "
            f"optimize for more steps"
        )
    if low >= level:
        raise NoSurfaceError(
            f"level={level:g}: all of the scene's sphere is inside that surface; its level set ranges "
            f"from {low:.4g} to {high:.4g}. Give a higher level (a higher density threshold), such as "
            f"{(low + high) / 2:.4g}"
        )
