"""DreamGaussian (arXiv 2309.16653), second stage: a mesh made of the Gaussians, whose texture is refined.

A step renders the mesh, lets the score model refine the views by image-to-image denoising, and pulls them towards what
came out by a squared difference. From a picture, what is seen of the mesh from the picture's camera is compared with
it, where the surface faces that camera.

DreamPropeller runs ahead in the first stage alone. `PAPER` and `PAPER_IMAGE` have the second stage of the DreamGaussian
that it carries, and the first stage's window and tolerance. They differ in one point: views are never rendered smaller
than they are, to an eighth there, because textures here have no smaller versions to look up. Later releases of
DreamGaussian let the noise fall: `TimestepSchedule(low=(0.2, 0.05), high=(0.2, 0.05))`.

`SMALL` and `SMALL_IMAGE` are the recipe at the scale of the shipped models. Their meshes are of views of few pixels,
so that they train the shape too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from picardopt_3d.cameras import Cameras, random_cameras
from picardopt_3d.guidance import DenoiseConfig, TimestepSchedule
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import dreamgaussian
from picardopt_3d.methods.optim import texture_rates
from picardopt_3d.methods.recipe import Context, StageConfig
from picardopt_3d.methods.reference import Reference
from picardopt_3d.methods.schedules import Milestones, Points, Weights, check_milestones, current
from picardopt_3d.methods.stage import Stage
from picardopt_3d.problem import Losses
from picardopt_3d.resizing import resize
from picardopt_3d.scenes import Render, Scene, TexturedMeshConfig
from picardopt_3d.scenes.gaussians.density import THRESHOLD

_MULTIPLE = 8  # pixels; what a supersampled view is rounded up to


@dataclass(frozen=True)
class TextureWeights(Weights):
    """Weights of the losses; that on the reference view counts only in runs from a picture.

    Attributes:
        sds: Weight of the guidance, the squared difference from the refined views.
        rgb: Weight of the squared difference from the picture, over white, at its camera.
    """

    rgb: Points = 0.0


@dataclass(frozen=True, kw_only=True)
class DreamGaussianTextureConfig(StageConfig):
    """The configuration of DreamGaussian's second stage.

    Attributes:
        weights: Weights of the losses.
        reference_pixels: Pixels along each edge of the render at the picture's camera: a number, or (first step,
            number) pairs.
        facing: Cosine of the angle between surface and camera from which on a pixel is compared with the picture.
        supersampling: Smallest and largest factor by which a view is rendered larger, and then resized: a uniform
            number from 0 to the largest, but no less than the smallest. 1 and 1 renders the view as it is.
    """

    weights: TextureWeights = field(default_factory=TextureWeights)
    reference_pixels: Milestones = 256
    facing: float = 0.5
    supersampling: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A value is out of range; the message names it.
        """
        super().__post_init__()
        check_milestones("reference_pixels", self.reference_pixels)
        if not -1 <= self.facing <= 1:
            raise ValueError(f"facing={self.facing}: give a cosine, from -1 to 1")
        least, most = self.supersampling
        if not 0 < least <= most:
            raise ValueError(
                f"supersampling={self.supersampling}: give two positive factors, the smaller one first"
            )

    def build(self, context: Context, previous: Scene | None = None) -> DreamGaussianTexture:
        """Builds the stage; see `StageConfig.build`."""
        return DreamGaussianTexture(self, context, previous)


class DreamGaussianTexture(Stage):
    """The second stage of DreamGaussian: a textured mesh and the loss of each step.

    Args:
        config: The configuration.
        context: Guidance, prompt and device of the run; with a reference picture, of a run from one.
        previous: The scene of the previous stage, which the mesh is made of.
    """

    def __init__(
        self,
        config: DreamGaussianTextureConfig,
        context: Context,
        previous: Scene | None = None,
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
        views = self._render(cameras, size, step)
        levels = config.timesteps.at(step, config.steps)
        terms = {"sds": self.guidance(views.rgb, self.prompt, cameras, levels)}
        renders = [views]
        if self.reference is not None:
            camera = self.reference.camera
            front = self._render(camera, self.reference.size(step), step, normals=True)
            seen = facing(front, camera, config.facing)
            terms["rgb"] = self.reference.losses(front, step, seen)["rgb"]
            renders.append(front)
        return self.total(terms, weights, step, *renders)

    def _render(self, cameras: Cameras, size: int, step: int, *, normals: bool = False) -> Render:
        """Renders the mesh over white, larger or smaller by a random factor, and resizes it."""
        least, most = self.config.supersampling
        factor = max(least, most * torch.rand(()).item())
        drawn = size
        if least != 1 or most != 1:
            drawn = math.ceil(size * factor / _MULTIPLE) * _MULTIPLE
        white = torch.ones(len(cameras), 3, device=self.device)
        render = self.scene.render(
            cameras, drawn, jitter=True, normals=normals, background=white, step=step
        )
        if drawn == size:
            return render
        return replace(
            render,
            rgb=resize(render.rgb, size),
            opacity=resize(render.opacity, size),
            depth=resize(render.depth, size),
            normal=None if render.normal is None else resize(render.normal, size),
        )


def facing(render: Render, cameras: Cameras, least: float) -> Tensor:
    """Returns where the surface is seen and faces the camera, 0 or 1, `[batch, 1, height, width]`.

    Args:
        render: The views, with normals.
        cameras: Their cameras.
        least: Smallest cosine between the normal and the camera's axis.

    Raises:
        ValueError: The views have no normals.
    """
    if render.normal is None:
        raise ValueError("render.normal is None: render with normals=True")
    with torch.no_grad():
        normal = functional.normalize(render.normal, dim=1, eps=1e-6)
        axis = cameras.camera_to_world[:, :3, 2, None, None].to(normal)  # cameras look down -z
        cosine = (normal * axis).sum(1, keepdim=True)
        return ((cosine > least) & (render.opacity > 0)).to(normal)


def _refined(stage: StageConfig) -> GuidanceConfig:
    """Returns the guidance of the first stage, by another loss."""
    return replace(stage.guidance, loss="denoise")


_PAPER_MESH = TexturedMeshConfig(
    faces=100_000,
    level=1 - THRESHOLD,  # a density of 1
    view_pixels=512,
    view_distance=2.5,
    view_fov=49.1,
)

PAPER = DreamGaussianTextureConfig(
    steps=50,
    batch=1,
    pixels=512,
    supersampling=(1.0, 2.0),
    scene=_PAPER_MESH,
    rates=texture_rates(texture=0.2, offsets=1e-4),
    betas=(0.9, 0.999),
    eps=1e-8,
    guidance=_refined(dreamgaussian.PAPER),
    denoise=DenoiseConfig(guidance_scale=100.0, guidance_form="uncond"),
    timesteps=TimestepSchedule(low=(0.4, 0.4), high=(0.4, 0.4)),
    cameras=dreamgaussian.PAPER.cameras,
    picard=dreamgaussian.PAPER.picard,
)

PAPER_IMAGE = replace(
    PAPER,
    scene=replace(_PAPER_MESH, view_distance=2.0),
    guidance=_refined(dreamgaussian.PAPER_IMAGE),
    denoise=DenoiseConfig(guidance_scale=5.0, guidance_form="uncond"),
    cameras=dreamgaussian.PAPER_IMAGE.cameras,
    weights=TextureWeights(rgb=1.0),
)

_SMALL_MESH = TexturedMeshConfig(
    resolution=48,
    faces=3000,
    texture=128,
    # Size and distance at which the Gaussians were trained, and look as they should.
    view_pixels=32,
    view_distance=1.65,
    samples=2,
    trained="all",
)

SMALL = DreamGaussianTextureConfig(
    steps=75,
    batch=8,
    pixels=32,
    scene=_SMALL_MESH,
    rates=texture_rates(texture=((0, 0.03), (75, 0.003)), offsets=((0, 1e-3), (75, 1e-4))),
    guidance=_refined(dreamgaussian.SMALL),
    denoise=DenoiseConfig(guidance_scale=3.0, steps=8),
    timesteps=TimestepSchedule(low=(0.4, 0.1), high=(0.4, 0.1)),
    cameras=dreamgaussian.SMALL.cameras,
)

SMALL_IMAGE = replace(
    SMALL,
    batch=4,
    pixels=64,
    reference_pixels=64,
    scene=replace(_SMALL_MESH, view_pixels=64),
    guidance=_refined(dreamgaussian.SMALL_IMAGE),
    cameras=dreamgaussian.SMALL_IMAGE.cameras,
    weights=TextureWeights(rgb=1.0),
)
