"""Extraction of a scene's surface as a mesh with colours at the vertices.

Meshes have the world's axes (right-handed, z up, the front along +x) and world units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from picardopt_3d.scenes import Scene
from picardopt_3d.scenes.mesh.extract import Progress, extract_triangles
from picardopt_3d.scenes.mesh.surfaces import POINTS_AT_ONCE
from picardopt_3d.scenes.mesh.triangles import Triangles


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles with a colour at each corner.

    Attributes:
        vertices: Positions, world units, float32, `[vertices, 3]`.
        faces: Indices of three vertices each, counter-clockwise seen from outside, int64, `[faces, 3]`.
        colours: RGB in [0, 1], as shown on a screen (sRGB), float32, `[vertices, 3]`.
    """

    vertices: npt.NDArray[np.float32]
    faces: npt.NDArray[np.int64]
    colours: npt.NDArray[np.float32]


def extract_mesh(
    scene: Scene,
    resolution: int = 128,
    *,
    level: float = 0.0,
    components: int | None = None,
    faces: int | None = None,
    progress: Progress | None = None,
) -> Mesh:
    """Extracts a mesh from a scene's surface, whether or not it has triangles of its own.

    Args:
        scene: The scene.
        resolution: Samples of the scene's level set along each edge of the cube around the scene's sphere.
        level: Value of the scene's level set at the surface: above 0 the surface lies deeper, below 0 farther out.
        components: Number of connected pieces to keep, those of largest area; None keeps all.
        faces: Number of triangles to simplify to, approximately, or as few as preserve the shape; None keeps all.
        progress: Called with the number of points evaluated since the last call.

    Returns:
        A closed mesh, cut off at the scene's sphere as it is in renders.

    Raises:
        NoSurfaceError: The scene's level set is on one side of `level` everywhere.
        ValueError: An option cannot be used, or the scene holds values that are not finite.
    """
    surface = scene.surface()
    triangles = extract_triangles(
        surface, resolution, level=level, components=components, faces=faces, progress=progress
    )
    return coloured(triangles, surface.colour, surface.device)


@torch.no_grad()
def coloured(
    triangles: Triangles, colour: Callable[[Tensor], Tensor], device: torch.device
) -> Mesh:
    """Returns triangles with colours at their vertices.

    Args:
        triangles: The triangles.
        colour: Maps points `[count, 3]` to RGB, `[count, 3]`.
        device: Device that the points must be on.
    """
    vertices = triangles.vertices.float()
    parts = [colour(part.to(device)) for part in vertices.split(POINTS_AT_ONCE)]
    colours = torch.cat([part.float().cpu() for part in parts]).clamp(0, 1)
    return Mesh(vertices.cpu().numpy(), triangles.faces.cpu().numpy(), colours.numpy())
