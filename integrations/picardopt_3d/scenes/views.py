"""How a scene is looked at: lights, and what a batch of rays sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Light:
    """A point light a view, and what is to be seen of the surface under it (DreamFusion, section 3.1).

    Args:
        position: where the lights are, world units. # [batch, 3]
        ambient: share of the colour that is there without the light.
        diffuse: share that falls off with the cosine between normal and light.
        textureless: show the shading alone, as if all albedo were white.
    """

    position: Tensor
    ambient: float = 0.1
    diffuse: float = 0.9
    textureless: bool = False


@dataclass(frozen=True)
class Render:
    """What a batch of rays sees.

    Args:
        rgb: colour over the background. # [batch, 3, height, width], in [0, 1]
        opacity: accumulated alpha. # [batch, 1, height, width], in [0, 1]
        depth: expected distance from the camera, world units. # [batch, 1, height, width]
        normal: expected outward normal, not normalised; None if not asked for.
            # [batch, 3, height, width]
        back_facing: mean over rays that see something of the weight on normals that face away from the camera,
            sum_i w_i max(0, n_i . d)^2 (Ref-NeRF's orientation penalty); None without normals.
        roughness: mean over samples and axes of |n(x) - n(x + 0.01 noise)|, the 3D normal smoothness penalty of
            threestudio's Zero-1-to-3; None if not asked for.
        eikonal: mean over samples of (|grad sdf| - 1)^2; None unless the scene is a signed distance
            and normals were asked for.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None = None
    back_facing: Tensor | None = None
    roughness: Tensor | None = None
    eikonal: Tensor | None = None
