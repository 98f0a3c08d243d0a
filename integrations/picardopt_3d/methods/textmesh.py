"""TextMesh (arXiv 2304.12439), its coarse stage: a signed distance field from a text, by score distillation.

The step is DreamFusion's on another scene, with an eikonal loss in place of those for a cloud of density. As in
DreamPropeller, which built on a package without it, TextMesh's refinement of the texture is left out.

`PAPER` has DreamPropeller's settings (its Table 3, threestudio's textmesh-if as released), with one difference: the
surface is rendered with VolSDF's density, where that configuration has NeuS's alpha, annealed over the run. `SMALL` is
the recipe at the size of the shipped guidance: 32 pixels, a small field and one CPU thread. The shipped model's objects
are matt and lit from one side, so that views are not lit a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from picardopt_3d.guidance import SdsConfig
from picardopt_3d.methods import dreamfusion
from picardopt_3d.methods.dreamfusion import DreamFusionConfig, DreamFusionWeights
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.methods.schedules import Points
from picardopt_3d.scenes import WHITE, HashConfig, OccupancyConfig, SdfConfig


@dataclass(frozen=True)
class TextMeshWeights(DreamFusionWeights):
    """Weights of the losses: DreamFusion's, those for a cloud of density being off.

    Args:
        eikonal: of gradients of the signed distance whose length is not 1.
    """

    sparsity: Points = 0.0
    orientation: Points = 0.0
    eikonal: Points = 1000.0


@dataclass(frozen=True, kw_only=True)
class TextMeshConfig(DreamFusionConfig):
    """The recipe's numbers: DreamFusion's, with other weights."""

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
        # Fresh density is everywhere, and the run is short: it has to be forgotten sooner.
        occupancy=OccupancyConfig(resolution=24, threshold=0.3, decay=0.8, every=8),
    ),
    # Slower networks than hash tables, as in the paper: guesses of the next steps are right for longer.
    rates=field_rates(encoding=0.01, networks=0.003),
    sds=SdsConfig(guidance_scale=3.0),
    weights=TextMeshWeights(eikonal=1.0),
    shading=ShadingConfig(diffuse_probability=0.0),
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
