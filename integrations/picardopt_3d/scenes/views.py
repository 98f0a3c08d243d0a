"""Lights, and rendered views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from picardopt_3d.scenes.mesh.triangles import Triangles

WHITE = (1.0, 1.0, 1.0)
"""The plain background of the presets, RGB in [0, 1]."""


@dataclass(frozen=True)
class Light:
    """A point light for each view, and how it shades the surface (DreamFusion, section 3.1).

    Attributes:
        position: Positions of the lights, world units, `[batch, 3]`.
        ambient: Weight of the albedo that does not depend on the light.
        diffuse: Weight that is multiplied by the cosine between normal and light.
        textureless: Whether to show the shading alone, as if the albedo were white.
    """

    position: Tensor
    ambient: float = 0.1
    diffuse: float = 0.9
    textureless: bool = False


@dataclass(frozen=True)
class Render:
    """A batch of rendered views.

    Attributes:
        rgb: Colour over the background, in [0, 1], `[batch, 3, height, width]`.
        opacity: Accumulated alpha, in [0, 1], `[batch, 1, height, width]`.
        depth: Expected distance from the camera, world units, `[batch, 1, height, width]`.
        normal: Expected outward normal, not normalized, `[batch, 3, height, width]`; None if not requested.
        orientation_penalty: Penalty on normals that face away from the camera, sum_i w_i max(0, n_i . d)^2 (Ref-NeRF),
            averaged over the pixels that are not empty; None without normals.
        normal_smoothness: Mean over samples and axes of |n(x) - n(x + 0.01 noise)|, the 3D normal smoothness penalty of
            threestudio's Zero-1-to-3; None if not requested.
        eikonal: Mean over samples of (|grad sdf| - 1)^2; None unless the scene is a signed distance and normals were
            requested.
        triangles: What was drawn, in the graph of the parameters; None unless the scene consists of triangles.
        drawn: What the scene's `measure` needs of a view; None for most scenes.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None = None
    orientation_penalty: Tensor | None = None
    normal_smoothness: Tensor | None = None
    eikonal: Tensor | None = None
    triangles: Triangles | None = None
    drawn: Any = None
