"""Zero-1-to-3 (arXiv 2303.11328) with a radiance field: an object from one picture, by score distillation.

Every step renders the object twice: from random cameras, for the score model, and from the picture's camera, for a
comparison with the picture. `PAPER` has DreamPropeller's settings (its Table 4 and appendix D, threestudio's zero123
system). `SMALL` is the recipe at the scale of the shipped model: the cameras it was trained on, views of at most 64
pixels, a small field and one CPU thread. It leaves out the smoothness of normals in space, which doubles the cost of a
view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.cameras import CameraConfig, Cameras, random_cameras
from picardopt_3d.guidance import SdsConfig, TimestepSchedule
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.methods import losses
from picardopt_3d.methods.dreamfusion import OCCUPIED
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.methods.recipe import Context, StageConfig
from picardopt_3d.methods.reference import Reference
from picardopt_3d.methods.schedules import Milestones, Points, Weights, check_milestones, current
from picardopt_3d.methods.stage import Stage
from picardopt_3d.picard import PicardConfig
from picardopt_3d.problem import Losses
from picardopt_3d.scenes import (
    WHITE,
    GaussiansConfig,
    HashConfig,
    NerfConfig,
    OccupancyConfig,
    Render,
    Scene,
)
from picardopt_3d.tolerances import AdaptiveTol


@dataclass(frozen=True)
class Zero123Weights(Weights):
    """Weights of the losses; those on opaqueness and normals are sums over both renders.

    Attributes:
        sds: Weight of score distillation of the random views.
        rgb: Weight of the squared difference from the picture, over white, at its camera.
        mask: Weight of the squared difference between the opacity and the picture's alpha.
        normal_smoothness: Weight of the difference between normals of neighbouring pixels (as a normal map over black).
        normal_smoothness_3d: Weight of the difference between normals at neighbouring points in space.
        orientation: Weight of the penalty on visible normals that face away.
        sparsity: Weight of the mean of sqrt(opacity^2 + 0.01) in the random views, which removes floaters.
        opaque: Weight of the binary entropy of the opacity, which makes pixels opaque or empty.
    """

    sds: Points = 0.1
    rgb: Points = 500.0
    mask: Points = 50.0
    normal_smoothness: Points = 8.0
    normal_smoothness_3d: Points = 8.0
    orientation: Points = 1.0
    sparsity: Points = 0.1
    opaque: Points = 0.1


@dataclass(frozen=True, kw_only=True)
class Zero123Config(StageConfig):
    """The configuration of Zero-1-to-3.

    Attributes:
        reference_pixels: Pixels along each edge of the render at the picture's camera: a number, or (first step,
            number) pairs.
        weights: Weights of the losses.
    """

    reference_pixels: Milestones
    weights: Zero123Weights = field(default_factory=Zero123Weights)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range, or the scene has no normals in space; the message names it.
        """
        super().__post_init__()
        check_milestones("reference_pixels", self.reference_pixels)
        points = self.weights.normal_smoothness_3d
        numbers = [points] if isinstance(points, float | int) else [value for _, value in points]
        if isinstance(self.scene, GaussiansConfig) and any(numbers):
            raise ValueError(
                f"weights.normal_smoothness_3d={points}: 3D Gaussians have no normals in space; give 0"
            )

    def build(self, context: Context, previous: Scene | None = None) -> Zero123Stage:
        """Builds the stage; see `StageConfig.build`."""
        return Zero123Stage(self, context, previous)


class Zero123Stage(Stage):
    """The stage of Zero-1-to-3: a scene and the loss of each step.

    Args:
        config: The configuration.
        context: Guidance, prompt, device and reference picture of the run.
        previous: The scene of the previous stage; None: a new scene.

    Raises:
        ValueError: The context has no reference picture.
    """

    def __init__(
        self, config: Zero123Config, context: Context, previous: Scene | None = None
    ) -> None:
        if context.image is None:
            raise ValueError("context.image is None: give the picture, `load_reference(path, ...)`")
        super().__init__(config, context, previous)
        self.config = config
        self.reference = Reference(context.image, config.reference_pixels, context.device)

    def loss(self, step: int) -> Losses:
        """Evaluates the losses of one step, a function of the parameters, the step and its randomness."""
        config = self.config
        weights = config.weights.at(step)
        batch, size = current(config.batch, step), current(config.pixels, step)
        cameras = random_cameras(batch, config.cameras, self.device)
        around = self._render(cameras, size, weights, step)
        levels = config.timesteps.at(step, config.steps)
        terms = {"sds": self.guidance(around.rgb, self.prompt, cameras, levels)}
        if "sparsity" in weights:
            terms["sparsity"] = losses.sparsity(around.opacity)

        reference = self.reference
        front = self._render(reference.camera, reference.size(step), weights, step)
        terms |= reference.losses(front, step)
        for name, value in _regularity(around, weights).items():
            terms[name] = value + _regularity(front, weights)[name]
        return self.total(terms, weights, step, around, front)

    def _render(self, cameras: Cameras, size: int, weights: dict[str, float], step: int) -> Render:
        """Renders the albedo over white, with normals if a loss needs them."""
        return self.scene.render(
            cameras,
            size,
            jitter=True,
            normals=bool(_OF_NORMALS & weights.keys()),
            normal_smoothness="normal_smoothness_3d" in weights,
            step=step,
        )


_OF_NORMALS = {"normal_smoothness", "normal_smoothness_3d", "orientation"}


def _regularity(render: Render, weights: dict[str, float]) -> dict[str, Tensor]:
    """Returns the losses that apply to both renders, by name."""
    terms = {}
    if render.normal is not None and "normal_smoothness" in weights:
        normal = F.normalize(render.normal, dim=1, eps=1e-6)
        terms["normal_smoothness"] = losses.image_smoothness((normal + 1) / 2 * render.opacity)
    if render.normal_smoothness is not None:
        terms["normal_smoothness_3d"] = render.normal_smoothness
    if render.orientation_penalty is not None and "orientation" in weights:
        terms["orientation"] = render.orientation_penalty
    if "opaque" in weights:
        terms["opaque"] = losses.opaqueness(render.opacity)
    return terms


SMALL = Zero123Config(
    steps=220,
    batch=((0, 4), (110, 3), (170, 2)),
    pixels=((0, 16), (110, 32), (170, 64)),
    reference_pixels=((0, 32), (170, 64)),
    scene=NerfConfig(
        encoding=HashConfig(levels=6, log2_size=15, base=8, scale=1.5),
        width=32,
        radius=0.55,
        samples=24,
        background="solid",
        background_colour=WHITE,
        # At first there is density everywhere; in a short run the grid must forget it sooner.
        occupancy=OccupancyConfig(resolution=24, threshold=0.3, decay=0.8, every=8),
    ),
    eps=1e-8,
    guidance=GuidanceConfig("zero123"),
    sds=SdsConfig(guidance_scale=3.0, guidance_form="uncond", weighting="sds"),
    timesteps=TimestepSchedule(low=(0.4, 0.2), high=(0.85, 0.5), between=(0, 110)),
    cameras=CameraConfig(
        elevation=(-10.0, 80.0), distance=(1.5, 1.8), fov=(42.5, 42.5), stratified=False
    ),
    weights=Zero123Weights(normal_smoothness_3d=0.0),
)

PAPER = Zero123Config(
    steps=1200,
    batch=((0, 16), (600, 16), (900, 10)),
    pixels=((0, 64), (600, 128), (900, 256)),
    reference_pixels=((0, 128), (600, 256), (900, 512)),
    scene=NerfConfig(depth=2, background="solid", occupancy=OccupancyConfig(threshold=OCCUPIED)),
    eps=1e-8,
    rates=field_rates(encoding=0.01, networks=0.01),
    guidance=GuidanceConfig(
        "zero123", "ashawkey/zero123-xl-diffusers", ModelOptions(dtype="float16")
    ),
    sds=SdsConfig(guidance_scale=3.0, guidance_form="uncond", weighting="sds"),
    timesteps=TimestepSchedule(low=(0.4, 0.2), high=(0.85, 0.5), between=(0, 600)),
    cameras=CameraConfig(
        elevation=(-10.0, 80.0), distance=(3.8, 3.8), fov=(20.0, 20.0), stratified=False
    ),
    picard=PicardConfig(window=7, tolerance=AdaptiveTol(30e-6, 0.9, "median"), predictor="hold"),
)

PRESETS = {"small": SMALL, "paper": PAPER}
