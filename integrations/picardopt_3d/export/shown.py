"""What a viewer draws of any scene: triangles or 3D Gaussians, no more of them than it can take.

Both have the world's axes (right-handed, z up, the front along +x) and world units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picardopt_3d.export.mesh import coloured
from picardopt_3d.export.mesh_files import vertex_normals
from picardopt_3d.export.splats import splat_table
from picardopt_3d.export.textured import TexturedFile
from picardopt_3d.scenes import Gaussians, Scene, TexturedMesh
from picardopt_3d.scenes.mesh.extract import triangles_of

_FACES = 60_000
_GAUSSIANS = 100_000


@dataclass(frozen=True, eq=False)
class ShownMesh:
    """Triangles with a colour at each corner, or with a texture.

    Attributes:
        vertices: Positions, world units, float32. [vertices, 3]
        normals: Unit normals, float32. [vertices, 3]
        faces: Indices of three vertices each, counter-clockwise seen from outside, int64. [faces, 3]
        colours: RGB (sRGB), uint8; None: there is a texture. [vertices, 3]
        coordinates: Texture coordinates from the left and from the top, in [0, 1], float32; None without. [vertices, 2]
        texture: The picture (sRGB), row 0 on top, uint8; None: there are colours. [size, size, 3]
    """

    vertices: npt.NDArray[np.float32]
    normals: npt.NDArray[np.float32]
    faces: npt.NDArray[np.int64]
    colours: npt.NDArray[np.uint8] | None = None
    coordinates: npt.NDArray[np.float32] | None = None
    texture: npt.NDArray[np.uint8] | None = None

    @property
    def said(self) -> str:
        """What this is, in a few words."""
        drawn = f"{len(self.faces):,} triangles"
        if self.texture is None:
            return drawn
        return f"{drawn}, texture of {len(self.texture)} pixels"


@dataclass(frozen=True, eq=False)
class ShownSplats:
    """3D Gaussians with colours that do not depend on the direction.

    Attributes:
        means: Centres, world units, float32. [count, 3]
        scales: Standard deviations along the own axes, world units, float32. [count, 3]
        rotations: Unit quaternions w, x, y, z, which turn the own axes into the world's, float32. [count, 4]
        colours: RGB (sRGB), uint8. [count, 3]
        opacities: In [0, 1], float32. [count]
        total: Gaussians of the scene, of which those with least opacity times volume were left out.
    """

    means: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float32]
    rotations: npt.NDArray[np.float32]
    colours: npt.NDArray[np.uint8]
    opacities: npt.NDArray[np.float32]
    total: int

    @property
    def said(self) -> str:
        """What this is, in a few words."""
        count = len(self.means)
        return (
            f"{count:,} Gaussians"
            if count == self.total
            else f"{count:,} of {self.total:,} Gaussians"
        )


def shown(
    scene: Scene, *, resolution: int = 128, faces: int = _FACES, gaussians: int = _GAUSSIANS
) -> ShownMesh | ShownSplats:
    """Returns what a viewer draws of a scene: its Gaussians, its triangles, or a mesh of its surface.

    A mesh with a texture is not simplified, because its texture would no longer fit.

    Args:
        scene: The scene.
        resolution: Samples of a surface along each edge of the cube around the scene's sphere.
        faces: Most triangles, approximately.
        gaussians: Most Gaussians; the smallest and faintest are left out.

    Raises:
        ValueError: The scene is empty, has no surface, or holds values that are not finite.
    """
    if isinstance(scene, Gaussians):
        return _splats(scene, gaussians)
    if isinstance(scene, TexturedMesh):
        return _textured(TexturedFile.of_scene(scene))
    triangles = triangles_of(scene, resolution, faces=faces)
    colour = (scene.shell() or scene.surface()).colour
    mesh = coloured(triangles, colour, scene.device)
    return ShownMesh(
        mesh.vertices,
        vertex_normals(mesh.vertices, mesh.faces),
        mesh.faces,
        colours=np.rint(mesh.colours * 255).astype(np.uint8),
    )


def _textured(mesh: TexturedFile) -> ShownMesh:
    """Returns a mesh whose vertices are split where its texture is cut."""
    vertex = np.zeros(len(mesh.coordinates), np.int64)
    vertex[mesh.coordinate_faces] = mesh.faces
    normals = vertex_normals(mesh.vertices, mesh.faces)
    return ShownMesh(
        mesh.vertices[vertex],
        normals[vertex],
        mesh.coordinate_faces,
        coordinates=mesh.coordinates,
        texture=mesh.texture,
    )


def _splats(scene: Gaussians, most: int) -> ShownSplats:
    """Returns the Gaussians that count most."""
    table = splat_table(scene.splats())
    kept = table.order[:most]
    return ShownSplats(
        table.means[kept].astype(np.float32),
        table.scales[kept].astype(np.float32),
        table.rotations[kept].astype(np.float32),
        np.rint(255 * table.shown[kept]).astype(np.uint8),
        table.opacities[kept].astype(np.float32),
        len(table.means),
    )
