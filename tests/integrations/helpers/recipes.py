"""Recipes at sizes that a CPU does in seconds, and law 1's sequential run of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.guidance import DenoiseConfig, Guidance, ScoreDistillation, TimestepSchedule
from picardopt_3d.guidance.choose import GuidanceConfig, load_score
from picardopt_3d.guidance.denoise import Denoising
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.methods import METHODS, Context, Stage, StageConfig
from picardopt_3d.methods.dreamfusion import DreamFusionConfig, DreamFusionWeights
from picardopt_3d.methods.dreamgaussian import DreamGaussianConfig, DreamGaussianWeights
from picardopt_3d.methods.dreamgaussian_texture import DreamGaussianTextureConfig, TextureWeights
from picardopt_3d.methods.lighting import ShadingConfig
from picardopt_3d.methods.optim import gaussian_rates, texture_rates
from picardopt_3d.methods.textmesh import TextMeshConfig, TextMeshWeights
from picardopt_3d.methods.zero123 import Zero123Config, Zero123Weights
from picardopt_3d.problem import Losses
from picardopt_3d.run.loop import closure_of
from picardopt_3d.scenes import (
    Gaussians,
    GaussiansConfig,
    HashConfig,
    NerfConfig,
    OccupancyConfig,
    Scene,
    SdfConfig,
    StrategyConfig,
    TexturedMeshConfig,
)
from picardopt_3d.world import Subject
from picardopt_3d.world.pictures import true_reference

from picardopt import ParallelPicardOptimizer, step_rng
from tests.integrations.helpers.splats import shell
from tests.integrations.helpers.tiny_pipelines import (
    save_deepfloyd,
    save_stable_diffusion,
    save_zero123,
)

CPU = torch.device("cpu")
COMMANDS = ("text-to-3d", "image-to-3d")
CHAIR = Subject("chair", "red")
ENCODING = HashConfig(levels=3, log2_size=8, base=4, scale=1.6)
SIZES: dict[str, Any] = {
    "encoding": ENCODING,
    "width": 8,
    "radius": 0.6,
    "samples": 8,
    "background": "solid",
}
OCCUPANCY = OccupancyConfig(resolution=6, threshold=0.5, every=2)
CHANGING = StrategyConfig(
    start=2,
    stop=9,
    every=2,
    gradient=1e-3,
    split_scale=0.12,
    least_opacity=0.08,
    reset_every=5,
    reset_opacity=0.15,
)
"""Adds and removes Gaussians of `FEW` after steps 1, 3, 5 and 7, and resets opacities after step 4."""

FEW = GaussiansConfig(count=12, strategy=CHANGING)
RATES = gaussian_rates(means=((0, 0.02), (8, 0.002)), opacity_logits=0.2)

OF_ONE_STAGE = [
    (command, name)
    for command, methods in METHODS.items()
    for name, entry in methods.items()
    if issubclass(entry.config, StageConfig)
]
"""Commands and methods of one stage; recipes of several have tests of their own."""


def save_pipelines(root: Path) -> dict[str, Path]:
    """Random models of the real classes, by kind."""
    return {
        "stable-diffusion": save_stable_diffusion(root / "stable-diffusion"),
        "deepfloyd": save_deepfloyd(root / "deepfloyd"),
        "zero123": save_zero123(root / "zero123"),
    }


def build(
    config: StageConfig, seed: int = 0, picture: int = 32, previous: Scene | None = None
) -> Stage:
    """The recipe on a red chair, from a picture of so many pixels where its score model takes one.

    Args:
        config: The recipe, of one stage.
        seed: Of what is drawn before its first step.
        picture: Pixels along each edge of the picture.
        previous: The scene of the stage before.
    """
    image = None
    prompt: Any = config.guidance.text_prompt(CHAIR.caption)
    if config.guidance.model == "zero123":
        image = true_reference(CHAIR, orbit_cameras(20.0, 30.0), picture)
        prompt = image.prompt()
    score = load_score(config.guidance, CHAIR.caption, config.final_pixels, CPU)
    guidance: Guidance = ScoreDistillation(score, config.sds)
    if config.guidance.loss == "denoise":
        guidance = Denoising(score, config.denoise)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(Context(guidance, prompt, CPU, image), previous)


def tiny(command: str, name: str, folders: dict[str, Path]) -> StageConfig:
    """A recipe of few numbers, all of whose losses count, and whose batch and size change at step 3."""
    changing: dict[str, Any] = {
        "steps": 6,
        "batch": ((0, 2), (3, 3)),
        "pixels": ((0, 6), (3, 8)),
    }
    exact = GuidanceConfig("exact")
    zero123 = GuidanceConfig("zero123", str(folders["zero123"]))
    lit = ShadingConfig(ambient_steps=2, diffuse_probability=0.8)
    gaussians: dict[str, Any] = {"scene": FEW, "rates": RATES, "geometric": ("means",)}
    from_picture: dict[str, Any] = {"reference_pixels": ((0, 8), (3, 10)), "guidance": zero123}
    if name == "dreamgaussian":
        image = command == "image-to-3d"
        return DreamGaussianConfig(
            **changing | {"steps": 9},
            **gaussians,
            **from_picture if image else {"guidance": exact},
            weights=DreamGaussianWeights(
                rgb=((0, 0.0), (9, 90.0)) if image else 0.0, mask=5.0 if image else 0.0
            ),
        )
    if name == "zero123-gaussians":
        return Zero123Config(
            **changing | {"steps": 9},
            **gaussians,
            **from_picture,
            weights=Zero123Weights(normal_smoothness=0.0, normal_smoothness_3d=0.0),
        )
    if name == "dreamfusion":
        return DreamFusionConfig(
            **changing,
            scene=NerfConfig(**SIZES, occupancy=OCCUPANCY),
            guidance=exact,
            shading=lit,
            random_background=0.5,
            weights=DreamFusionWeights(orientation=((0, 1.0), (8, 9.0))),
        )
    if name == "textmesh":
        return TextMeshConfig(
            **changing,
            scene=SdfConfig(**SIZES, surface_radius=0.4, occupancy=OCCUPANCY),
            guidance=exact,
            shading=lit,
            weights=TextMeshWeights(eikonal=2.0),
        )
    assert (command, name) == ("image-to-3d", "zero123")
    return Zero123Config(**changing, **from_picture, scene=NerfConfig(**SIZES, occupancy=OCCUPANCY))


def tiny_text(folders: dict[str, Path], **options: Any) -> DreamGaussianConfig:
    """DreamGaussian's first stage from a text, of few numbers, with other options."""
    config = tiny("text-to-3d", "dreamgaussian", folders)
    assert isinstance(config, DreamGaussianConfig)
    return replace(config, **options)


def tiny_texture(command: str, folders: dict[str, Path]) -> DreamGaussianTextureConfig:
    """DreamGaussian's second stage of few numbers; its batch and size change at step 3."""
    image = command == "image-to-3d"
    zero123 = GuidanceConfig("zero123", str(folders["zero123"]), loss="denoise")
    return DreamGaussianTextureConfig(
        steps=6,
        batch=((0, 2), (3, 3)),
        pixels=((0, 6), (3, 8)),
        reference_pixels=((0, 8), (3, 10)),
        facing=0.8,
        supersampling=(1.0, 2.0),
        scene=TexturedMeshConfig(
            resolution=12, faces=60, texture=16, view_pixels=16, trained="all"
        ),
        rates=texture_rates(texture=0.1, offsets=((0, 0.01), (6, 0.001))),
        guidance=zero123 if image else GuidanceConfig("exact", loss="denoise"),
        denoise=DenoiseConfig(guidance_scale=2.0, steps=6),
        timesteps=TimestepSchedule(low=(0.3, 0.1), high=(0.8, 0.3)),
        weights=TextureWeights(rgb=3.0 if image else 0.0),
    )


def ball() -> Gaussians:
    """Gaussians as a first stage may end with: a sphere whose colour changes with the place."""
    splats = shell(150, 0.35, 0.06)
    return Gaussians(GaussiansConfig(count=150, strategy=None), splats)


def textured(config: DreamGaussianTextureConfig, previous: Scene | None = None) -> Stage:
    """DreamGaussian's second stage on a mesh of the ball, or of another scene."""
    return build(config, previous=previous or ball())


def small(scene: Any) -> Any:
    """A scene of the published settings with smaller tables, fewer samples, cells or Gaussians."""
    if isinstance(scene, GaussiansConfig):
        return replace(scene, count=60)
    if isinstance(scene, TexturedMeshConfig):
        return replace(scene, resolution=12, faces=60, texture=32, view_pixels=16)
    return replace(
        scene,
        encoding=replace(scene.encoding, log2_size=6),
        samples=12,
        occupancy=replace(scene.occupancy, resolution=8),
    )


def shrunk(config: StageConfig, folders: dict[str, Path]) -> StageConfig:
    """Published settings at sizes that a CPU can do in seconds: views, batch, samples, tables."""
    sizes: dict[str, Any] = {"batch": 2, "pixels": 8}
    if hasattr(config, "reference_pixels"):
        few = {"batch": (3, 3, 2), "pixels": (6, 8, 10), "reference_pixels": (8, 10, 12)}
        sizes = {}
        for name, values in few.items():
            given = getattr(config, name)
            if isinstance(given, int):
                sizes[name] = values[0]
            else:
                sizes[name] = tuple(
                    (step, value) for (step, _), value in zip(given, values, strict=True)
                )
    guidance = replace(
        config.guidance,
        source=str(folders[config.guidance.model]),
        options=ModelOptions(embeddings=None),
    )
    return replace(config, scene=small(config.scene), guidance=guidance, **sizes)


def sequential(stage: Stage, steps: int, seed: int) -> Iterator[Losses]:
    """Law 1: for every step, under its randomness, the gradient, the bases' steps, the carry, the restructuring."""
    carry, change = stage.carry(), stage.restructure()
    closure, scheduler = closure_of(stage), stage.lr_scheduler()
    for step in range(steps):
        with step_rng(seed, step):
            losses = closure(step)
            for base in stage.optimizers():
                base.step()
            if carry is not None:
                assert carry.update is not None
                with torch.no_grad():
                    carry.update(losses)
            if change is not None and change.due(step):
                change.function(step)
        if scheduler is not None:
            scheduler.step()
        yield losses


def wrapped(stage: Stage, steps: int, seed: int, **options: Any) -> ParallelPicardOptimizer:
    """The optimizer that runs a stage ahead, as a run has it."""
    return ParallelPicardOptimizer(
        stage.optimizers(),
        carry=stage.carry(),
        restructure=stage.restructure(),
        lr_scheduler=stage.lr_scheduler(),
        total_steps=steps,
        seed=seed,
        **options,
    )


def ahead(stage: Stage, optimizer: ParallelPicardOptimizer, steps: int) -> Iterator[Losses]:
    """The same steps, run ahead."""
    closure, scheduler = closure_of(stage), stage.lr_scheduler()
    for _ in range(steps):
        losses = optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
        yield losses


def count_of(stage: Stage) -> int:
    """The number of Gaussians; 0 of other scenes."""
    return stage.scene.count if isinstance(stage.scene, Gaussians) else 0
