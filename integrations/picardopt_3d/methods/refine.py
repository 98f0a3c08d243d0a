"""The refinement of a mesh by score distillation of its colours or its normals, as Magic3D and ProlificDreamer have it.

A step is that of DreamFusion on triangles, with a loss that keeps the surface smooth. Normals are shown to the guidance
as colours, (normal + 1) / 2, over the plain background of the scene; a scene whose background is a network has black
there, as in threestudio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from picardopt_3d.methods.dreamfusion import DreamFusion, DreamFusionConfig, DreamFusionWeights
from picardopt_3d.methods.recipe import Context
from picardopt_3d.methods.schedules import Points
from picardopt_3d.scenes import Render, Scene
from picardopt_3d.scenes.mesh.config import TetrahedralConfig, TexturedMeshConfig
from picardopt_3d.scenes.mesh.geometry import laplacian, normal_consistency

Shows = Literal["colour", "normals"]
"""What the guidance sees of a mesh."""


@dataclass(frozen=True)
class RefineWeights(DreamFusionWeights):
    """Weights of the losses: DreamFusion's, with those for a density off.

    Attributes:
        normal_consistency: Weight of the mean of 1 - cosine between the normals at both ends of an edge.
        laplacian: Weight of the mean over vertices of |sum over neighbours (vertex - neighbour)|, world units.
    """

    sparsity: Points = 0.0
    orientation: Points = 0.0
    normal_consistency: Points = 1e4
    laplacian: Points = 0.0


@dataclass(frozen=True, kw_only=True)
class RefineConfig(DreamFusionConfig):
    """The configuration of a mesh's refinement.

    Attributes:
        weights: Weights of the losses.
        shows: What the guidance sees: the colours, or the normals as colours.
    """

    weights: RefineWeights = field(default_factory=RefineWeights)
    shows: Shows = "colour"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range, or the scene cannot give what a loss needs; the message names it.
        """
        super().__post_init__()
        if self.shows not in get_args(Shows):
            raise ValueError(f"shows={self.shows!r}: give one of {', '.join(get_args(Shows))}")
        names: tuple[str, ...] = ("normal_consistency", "laplacian")
        lacks = "triangles"
        if isinstance(self.scene, TetrahedralConfig | TexturedMeshConfig):
            names, lacks = ("orientation",), "normals within a volume"
        for name in names:
            points = getattr(self.weights, name)
            if points != 0:
                kind = type(self.scene).__name__
                raise ValueError(
                    f"weights.{name}={points}: a {kind} has no {lacks}; give 0, or another scene"
                )

    def build(self, context: Context, previous: Scene | None = None) -> Refine:
        """Builds the stage; see `StageConfig.build`."""
        return Refine(self, context, previous)


class Refine(DreamFusion):
    """The refinement of a mesh: a scene and the loss of each step.

    Args:
        config: The configuration.
        context: Guidance, prompt and device of the run.
        previous: The scene of the previous stage; None: a new scene.
    """

    config: RefineConfig

    def __init__(
        self, config: RefineConfig, context: Context, previous: Scene | None = None
    ) -> None:
        super().__init__(config, context, previous)
        self._plain = torch.tensor(_plain(config.scene), device=self.device)[:, None, None]

    def shown(self, render: Render) -> Tensor:
        """Returns the colours, or the normals as colours, RGB in [0, 1], `[batch, 3, height, width]`."""
        if self.config.shows == "colour":
            return render.rgb
        normal: Any = render.normal  # `needs_normals` has asked for it
        shown: Tensor = (normal + render.opacity) / 2 + (1 - render.opacity) * self._plain
        return shown

    def needs_normals(self, weights: Mapping[str, float]) -> bool:
        """Returns whether views without a light need normals; see `DreamFusion.needs_normals`."""
        return self.config.shows == "normals" or super().needs_normals(weights)

    def terms(self, render: Render, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the losses besides the guidance, by name; see `DreamFusion.terms`."""
        terms = super().terms(render, weights)
        if render.triangles is None:
            return terms
        if "normal_consistency" in weights:
            terms["normal_consistency"] = normal_consistency(render.triangles)
        if "laplacian" in weights:
            terms["laplacian"] = laplacian(render.triangles)
        return terms


def _plain(scene: Any) -> tuple[float, ...]:
    """Returns the colour around normals: that of the scene's plain background, else black."""
    if isinstance(scene.background, str):
        return tuple(scene.background_colour) if scene.background == "solid" else (0.0, 0.0, 0.0)
    return tuple(scene.background)
