"""Magic3D (arXiv 2211.10440): a radiance field from a text, then a mesh of it that a latent model refines.

The coarse stage is DreamFusion's, with lights of its own and score distillation that weights all noise levels alike.
The refinement starts from the field's surface and colours, on a tetrahedral grid, and sees larger views.

`PAPER` has DreamPropeller's settings (its Table 3, threestudio's magic3d-coarse-if and magic3d-refine-sd as released).
`SMALL` is the recipe at the scale of the models that ship: the pixel model at 32 pixels, then the latent one at 64. Its
noise levels are low and its guidance is weak, because the latent model does not take the camera: at strong noise it
draws any view that its words allow, at weak noise it sharpens the one it sees. Its views are not lit, because the
model's objects are already lit, from one side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from picardopt_3d.guidance import SdsConfig, TimestepSchedule
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import dreamfusion
from picardopt_3d.methods.dreamfusion import DreamFusionConfig
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.optim import mesh_rates
from picardopt_3d.methods.recipe import RecipeConfig
from picardopt_3d.methods.refine import RefineConfig, RefineWeights
from picardopt_3d.prompts import ViewWords
from picardopt_3d.scenes import WHITE, HashConfig, NerfConfig, OccupancyConfig
from picardopt_3d.scenes.mesh.config import TetrahedralConfig


@dataclass(frozen=True, kw_only=True)
class Magic3DConfig(RecipeConfig):
    """The configuration of Magic3D.

    Attributes:
        coarse: The radiance field.
        refine: The mesh that is made of it.
    """

    coarse: DreamFusionConfig
    refine: RefineConfig


SMALL = Magic3DConfig(
    coarse=dreamfusion.SMALL_NERF,
    refine=RefineConfig(
        steps=60,
        batch=4,
        pixels=64,
        scene=TetrahedralConfig(
            resolution=24,
            radius=0.55,
            encoding=HashConfig(levels=6, log2_size=15, base=8, scale=1.5),
            width=32,
            background="solid",
            background_colour=WHITE,
        ),
        rates=mesh_rates(shape=0.01, encoding=0.005, networks=0.005),
        guidance=GuidanceConfig("stable-diffusion", views=ViewWords()),
        sds=SdsConfig(guidance_scale=1.0, weighting="uniform"),
        timesteps=TimestepSchedule(low=(0.02, 0.02), high=(0.2, 0.2)),
        weights=RefineWeights(normal_consistency=100.0),
        shading=ShadingConfig(diffuse_probability=0.0),
    ),
)

PAPER = Magic3DConfig(
    coarse=replace(
        dreamfusion.PAPER,
        scene=NerfConfig(occupancy=OccupancyConfig(threshold=dreamfusion.OCCUPIED)),
        sds=replace(dreamfusion.PAPER.sds, weighting="uniform"),
        shading=ShadingConfig(soft=True, placement="magic3d"),
    ),
    refine=RefineConfig(
        steps=5000,
        batch=16,
        pixels=512,
        # As many vertices as the released code's table of tetrahedra of "resolution 128".
        scene=TetrahedralConfig(resolution=52),
        rates=mesh_rates(),
        guidance=dreamfusion.PAPER_SD.guidance,
        sds=SdsConfig(guidance_scale=100.0, guidance_form="cond", weighting="sds"),
        timesteps=TimestepSchedule(low=(0.02, 0.02), high=(0.5, 0.5)),
        cameras=replace(dreamfusion.PAPER_SD.cameras, fov=(30.0, 45.0)),
        shading=ShadingConfig(ambient_steps=0, soft=True, placement="magic3d"),
        picard=dreamfusion.PAPER.picard,
    ),
)

PRESETS = {"small": SMALL, "paper": PAPER}
