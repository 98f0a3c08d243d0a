"""What clients draw themselves: Gaussians as viser takes them, triangles as a GLB."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from picardopt_3d.export.mesh import coloured
from picardopt_3d.export.mesh_files import mesh_bytes
from picardopt_3d.export.textured import TexturedFile, textured_glb
from picardopt_3d.scenes import Scene, TexturedMesh
from picardopt_3d.scenes.gaussians.splats import SH_C0, Splats, rotation_matrices

Array = npt.NDArray[np.float32]

UPRIGHT = (0.5, 0.5, 0.5, 0.5)
"""Turns the axes of a GLB into the world's, a quaternion w, x, y, z: x, y, z become y, z, x."""


def splats_of(splats: Splats) -> tuple[Array, Array, Array, Array]:
    """Returns centres, covariances, colours (without the part that depends on the direction) and opacities."""
    means, log_scales, rotations, logits, colours, _ = (each.detach().cpu() for each in splats)
    axes = rotation_matrices(rotations) * log_scales.exp()[:, None]
    shown = (0.5 + SH_C0 * colours).clamp(0, 1)
    return _array(means), _array(axes @ axes.mT), _array(shown), _array(logits.sigmoid()[:, None])


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.float().numpy()
    return array


def glb_of(scene: Scene) -> bytes:
    """Returns a scene's own triangles with their colours, y up.

    Raises:
        ValueError: There are none: the surface has vanished.
    """
    if isinstance(scene, TexturedMesh):
        return textured_glb(TexturedFile.of_scene(scene))
    shell = scene.shell()
    if shell is None or not len(shell.triangles.faces):
        raise ValueError("the scene has no triangles: its surface has vanished")
    return mesh_bytes(coloured(shell.triangles, shell.colour, scene.device), "glb", "y")
