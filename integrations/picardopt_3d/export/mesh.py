"""A scene's surface as a mesh: marching cubes, colours at the vertices, clean-up.

Meshes are in the world's own axes: right-handed, z up, the front along +x, in world units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from picardopt_3d.scenes import Scene, Surface

POINTS_AT_ONCE = 1 << 17
"""Points that a scene is asked about in one call, for memory's sake."""

_LEAST_RESOLUTION = 8

_AGGRESSIVENESS = 3.0  # by its default, 7, the library keeps to the count at the cost of parts such as a mug's handle

Progress = Callable[[int], object]
"""Called with the number of points that were evaluated since the last call."""


class NoSurfaceError(ValueError):
    """The scene has no surface at the level that was asked for."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles with a colour at each corner.

    Attributes:
        vertices: World units. [vertices, 3], float32
        faces: Three vertices each, counter-clockwise seen from outside. [faces, 3], int64
        colours: RGB in [0, 1], as shown on a screen (sRGB). [vertices, 3], float32
    """

    vertices: npt.NDArray[np.float32]
    faces: npt.NDArray[np.int64]
    colours: npt.NDArray[np.float32]


@torch.no_grad()
def extract_mesh(
    scene: Scene,
    resolution: int = 128,
    *,
    level: float = 0.0,
    components: int | None = None,
    faces: int | None = None,
    progress: Progress | None = None,
) -> Mesh:
    """Cuts a mesh out of a scene.

    Args:
        scene: What to cut it out of.
        resolution: Samples of the scene's level set along each edge of the cube about the scene's sphere.
        level: The surface is where the scene's level set has this value: above 0 it lies deeper, below 0 farther out.
        components: Keep this many connected pieces, the ones of largest area; None keeps all.
        faces: Simplify to about this many triangles, or as few as leave the shape what it is; None leaves them all.
        progress: Told how many points were evaluated.

    Returns:
        A closed mesh: what reaches out of the scene's sphere is cut off there, as it is in renders.

    Raises:
        NoSurfaceError: the scene's level set is on one side of `level` everywhere.
        ValueError: An option cannot be used, or the scene holds values that are not finite.
    """
    if resolution < _LEAST_RESOLUTION:
        raise ValueError(f"resolution={resolution}: give at least {_LEAST_RESOLUTION}")
    for name, value, least in (("components", components, 1), ("faces", faces, 4)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: give at least {least}, or leave it out")
    surface = scene.surface()
    values, spacing = _sample(surface, resolution, level, progress)
    # Here, not above: it takes a second to import.
    from skimage.measure import marching_cubes

    corners, triangles, _, _ = marching_cubes(
        values, 0.0, spacing=(spacing,) * 3, gradient_direction="ascent", allow_degenerate=False
    )
    corners = corners - spacing * (resolution - 1) / 2
    if components is not None:
        corners, triangles = largest_components(corners, triangles, components)
    if faces is not None and faces < len(triangles):
        corners, triangles = _simplified(corners / surface.radius, triangles, faces)
        corners = corners * surface.radius
    corners = corners.astype(np.float32)
    return Mesh(corners, triangles.astype(np.int64), _colours(surface, corners))


def points_of(resolution: int) -> int:
    """Returns how many points of the grid `extract_mesh` evaluates at a resolution."""
    axis = _axis(resolution).square()
    squared = axis[:, None, None] + axis[:, None] + axis
    return int((squared < 1).sum())


def largest_components(
    vertices: npt.NDArray[np.floating], faces: npt.NDArray[np.integer], count: int
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """Returns the connected pieces of largest area.

    Args:
        vertices: [vertices, 3]
        faces: [faces, 3]
        count: How many pieces to keep.

    Returns:
        Vertices and faces of what is kept, in their old order.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    starts, ends = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    graph = coo_matrix((np.ones(len(starts), bool), (starts, ends)), shape=(len(vertices),) * 2)
    pieces, piece = connected_components(graph, directed=False)
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    areas = np.bincount(
        piece[faces[:, 0]], np.linalg.norm(np.cross(b - a, c - a), axis=1), minlength=pieces
    )
    kept = np.isin(piece, np.argsort(-areas, kind="stable")[:count])
    numbers = np.cumsum(kept) - 1
    return vertices[kept], numbers[faces[kept[faces[:, 0]]]]


def _axis(resolution: int) -> Tensor:
    """Grid coordinates along one edge in radii: the outermost ones lie outside of the sphere."""
    edge = (resolution - 1) / (resolution - 3)
    return torch.linspace(-edge, edge, resolution, dtype=torch.float64)


def _sample(
    surface: Surface, resolution: int, level: float, progress: Progress | None
) -> tuple[npt.NDArray[np.float32], float]:
    """The surface's level set less `level` on the grid, negative outside of the sphere; and the grid's spacing.

    Returns:
        [x, y, z], and world units.
    """
    axis = _axis(resolution) * surface.radius
    spacing = 2 * surface.radius / (resolution - 3)
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
    _check(inside, level)
    inside -= level
    # The sphere's own distance, so steep that it only counts within a cell of the sphere.
    steep = float(inside.abs().max()) / spacing
    values = steep * (surface.radius - distance)
    values[within] = torch.minimum(inside, values[within])
    # Marching cubes makes holes or specks where a sample is exactly at the level.
    values[values == 0] = -1e-12 * steep * spacing
    return values.view((resolution,) * 3).float().numpy(), spacing


def _check(inside: Tensor, level: float) -> None:
    """Raises an error if the scene has no surface there."""
    if not bool(inside.isfinite().all()):
        raise ValueError(
            "the scene holds values that are not finite: its optimization diverged; take another checkpoint, or run "
            "it again with a smaller learning rate"
        )
    low, high = float(inside.min()), float(inside.max())
    if high <= level:
        raise NoSurfaceError(
            f"level={level:g}: the scene has no surface there; how far inside a point is goes from {low:.4g} to "
            f"{high:.4g}. Give a lower level (a lower density threshold), such as {high - (high - low) / 4:.4g}, or "
            f"optimize for more steps"
        )
    if low >= level:
        raise NoSurfaceError(
            f"level={level:g}: all of the scene's sphere is inside of that surface; how far inside a point is goes "
            f"from {low:.4g} to {high:.4g}. Give a higher level (a higher density threshold), such as "
            f"{(low + high) / 2:.4g}"
        )


def _simplified(
    vertices: npt.NDArray[np.floating], faces: npt.NDArray[np.integer], count: int
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """About `count` triangles, by quadric edge collapse (Garland and Heckbert, 1997).

    Args:
        vertices: In radii of the scene: the library's thresholds are for objects of about that size. [vertices, 3]
        faces: [faces, 3]
        count: How many triangles to go for.
    """
    import fast_simplification

    fewer: tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]] = fast_simplification.simplify(
        np.ascontiguousarray(vertices, np.float32),
        np.ascontiguousarray(faces, np.int32),
        target_count=count,
        agg=_AGGRESSIVENESS,
    )
    return fewer


def _colours(surface: Surface, vertices: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The scene's colour at the vertices. [vertices, 3]."""
    parts = torch.from_numpy(vertices).split(POINTS_AT_ONCE)
    colours = torch.cat([surface.colour(part.to(surface.device)).float().cpu() for part in parts])
    found: npt.NDArray[np.float32] = colours.clamp(0, 1).numpy()
    return found
