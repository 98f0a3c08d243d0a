"""The coarse stage of TextMesh (arXiv 2304.12439): a signed distance field from a text, by score distillation.

A step is that of DreamFusion on another scene, with an eikonal loss instead of the losses for a density. TextMesh's
refinement of the texture is left out, as in DreamPropeller, whose code base does not have it.

`PAPER` has DreamPropeller's settings (its Table 3, threestudio's textmesh-if as released), with one difference: the
surface is rendered with VolSDF's density instead of NeuS's alpha with annealing. `SMALL` is the recipe at the scale of
the shipped guidance: 32 pixels, a small field and one CPU thread. Its views are not lit, because the shipped model's
objects are already lit, from one side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from picardopt_3d.guidance import SdsConfig
from picardopt_3d.methods import dreamfusion
from picardopt_3d.methods.dreamfusion import DreamFusionConfig, DreamFusionWeights
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.methods.schedules import Points
from picardopt_3d.picard import PicardConfig
from picardopt_3d.scenes import WHITE, HashConfig, OccupancyConfig, SdfConfig
from picardopt_3d.tolerances import DriftTol


@dataclass(frozen=True)
class TextMeshWeights(DreamFusionWeights):
    """Weights of the losses: DreamFusion's, with those for a density off.

    Attributes:
        eikonal: Weight of the penalty on gradients of the signed distance whose length is not 1.
    """

    sparsity: Points = 0.0
    orientation: Points = 0.0
    eikonal: Points = 1000.0


@dataclass(frozen=True, kw_only=True)
class TextMeshConfig(DreamFusionConfig):
    """The configuration of TextMesh: DreamFusion's, with other weights."""

    weights: TextMeshWeights = field(default_factory=TextMeshWeights)


SMALL = TextMeshConfig(
    steps=220,
    batch=3,
    pixels=32,
    scene=SdfConfig(
        encoding=HashConfig(levels=6, log2_size=15, base=8, scale=1.5),
        width=32,
        radius=0.55,
        samples=24,
        surface_radius=0.4,
        normals="analytic",
        background="solid",
        background_colour=WHITE,
        # At first there is density everywhere; in a short run the grid must forget it sooner.
        occupancy=OccupancyConfig(resolution=24, threshold=0.3, decay=0.8, every=8),
    ),
    # Lower rate for networks than for hash tables, as in the paper: strides are longer.
    rates=field_rates(encoding=0.01, networks=0.003),
    sds=SdsConfig(guidance_scale=3.0),
    weights=TextMeshWeights(eikonal=1.0),
    shading=ShadingConfig(diffuse_probability=0.0),
    # The signed distance's own loss is stiff, and drifts are soon off by as much as their noise: by the default strides
    # are short, while longer ones cost less than another seed does (docs/tolerances.md).
    picard=PicardConfig(tolerance=DriftTol(noise=1.0)),
)

PAPER = TextMeshConfig(
    steps=10_000,
    batch=16,
    pixels=64,
    scene=SdfConfig(
        encoding=HashConfig(scale=1.381912879967776, start_level=8, after=2000, every=500),
        occupancy=OccupancyConfig(threshold=dreamfusion.OCCUPIED),
    ),
    rates=field_rates(encoding=0.01, networks=0.001, background=0.001),
    guidance=dreamfusion.PAPER.guidance,
    sds=dreamfusion.PAPER.sds,
    cameras=dreamfusion.PAPER.cameras,
    picard=dreamfusion.PAPER.picard,
)

PRESETS = {"small": SMALL, "paper": PAPER}
