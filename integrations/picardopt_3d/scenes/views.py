"""How a scene is looked at: lights, and what a batch of views shows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

WHITE = (1.0, 1.0, 1.0)
"""The plain background of the presets, RGB."""


@dataclass(frozen=True)
class Light:
    """A point light a view, and what is to be seen of the surface under it (DreamFusion, section 3.1).

    Attributes:
        position: Where the lights are, world units. [batch, 3]
        ambient: Share of the colour that is there without the light.
        diffuse: Share that falls off with the cosine between normal and light.
        textureless: Show the shading alone, as if all albedo were white.
    """

    position: Tensor
    ambient: float = 0.1
    diffuse: float = 0.9
    textureless: bool = False


@dataclass(frozen=True)
class Render:
    """What a batch of views shows.

    Attributes:
        rgb: Colour over the background, in [0, 1]. [batch, 3, height, width]
        opacity: Accumulated alpha, in [0, 1]. [batch, 1, height, width]
        depth: Expected distance from the camera, world units. [batch, 1, height, width]
        normal: Expected outward normal, not normalized; None if not asked for. [batch, 3, height, width]
        orientation_penalty: Mean over the pixels that see something of the weight on normals that face away from the
            camera, sum_i w_i max(0, n_i . d)^2 (Ref-NeRF); None without normals.
        normal_smoothness: Mean over samples and axes of |n(x) - n(x + 0.01 noise)|, the 3D normal smoothness penalty of
            threestudio's Zero-1-to-3; None if not asked for.
        eikonal: Mean over samples of (|grad sdf| - 1)^2; None unless the scene is a signed distance and normals were
            asked for.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None = None
    orientation_penalty: Tensor | None = None
    normal_smoothness: Tensor | None = None
    eikonal: Tensor | None = None
