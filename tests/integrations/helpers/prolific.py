"""ProlificDreamer's recipe at sizes that a CPU does in seconds, with random models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from picardopt_3d.guidance.loading import ModelOptions
from picardopt_3d.guidance.schedule import TimestepSchedule
from picardopt_3d.methods import Stage, StageConfig, stage_seed
from picardopt_3d.methods.prolificdreamer import PAPER, ProlificDreamerConfig
from picardopt_3d.picard import PicardConfig, PicardOptions, make_optimizer
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.scenes import HashConfig, OccupancyConfig, Scene
from picardopt_3d.task import TextTask
from picardopt_3d.tolerances import TolConfig
from torch import Tensor
from torch.utils import _pytree as pytree

from picardopt import ParallelPicardOptimizer

CPU, SEED, CHANGE = torch.device("cpu"), 3, 4
TASK = TextTask("a red mug")
PLAIN = PicardConfig()
NAMES = ("nerf", "geometry", "texture")


def models(config: Any, folders: dict[str, Path]) -> Any:
    """A stage with the random models in place of the published ones."""
    guidance = replace(
        config.guidance, source=str(folders["epsilon"]), options=ModelOptions(embeddings=None)
    )
    if guidance.lora_source is not None:
        guidance = replace(guidance, lora_source=str(folders["v_prediction"]))
    return replace(config, guidance=guidance)


def published(folders: dict[str, Path]) -> ProlificDreamerConfig:
    """The published settings, with their schedules, at sizes that a CPU does in seconds."""
    table = HashConfig(levels=4, log2_size=8, base=4, scale=1.6)
    nerf: Any = PAPER.nerf.scene
    field = replace(
        nerf, encoding=table, width=8, samples=12, occupancy=replace(nerf.occupancy, resolution=8)
    )
    nerf = replace(PAPER.nerf, scene=field, batch=((0, 3), (5000, 2)), pixels=((0, 6), (5000, 8)))
    rest = {}
    for name in ("geometry", "texture"):
        config = getattr(PAPER, name)
        mesh = replace(config.scene, resolution=8, encoding=table, width=8)
        rest[name] = models(replace(config, scene=mesh, pixels=8, batch=1), folders)
    return ProlificDreamerConfig(nerf=models(nerf, folders), **rest)


def tiny(folders: dict[str, Path], steps: int = 8) -> ProlificDreamerConfig:
    """The same with all changes at one step, and rates at which a few steps matter."""
    recipe = published(folders)
    falling = TimestepSchedule(high=(0.98, 0.5), between=(CHANGE, CHANGE + 1))
    field: Any = recipe.nerf.scene
    occupancy = OccupancyConfig(resolution=6, threshold=0.5, every=2)
    nerf = replace(
        recipe.nerf,
        steps=steps,
        scene=replace(field, occupancy=occupancy, radius=0.6),
        batch=((0, 3), (CHANGE, 2)),
        pixels=((0, 6), (CHANGE, 8)),
        timesteps=falling,
        weights=replace(
            recipe.nerf.weights,
            sparsity=((0, 10.0), (steps, 1.0)),
            opaque=((CHANGE, 0.0), (CHANGE + 1, 1000.0)),
        ),
    )
    meshes = {
        name: replace(
            getattr(recipe, name),
            steps=steps,
            timesteps=falling,
            scene=replace(getattr(recipe, name).scene, radius=0.6),
        )
        for name in ("geometry", "texture")
    }
    return ProlificDreamerConfig(nerf=nerf, **meshes)


def build(config: StageConfig, index: int, previous: Scene | None) -> Stage:
    return build_problem(config, TASK, Path("none"), CPU, stage_seed(SEED, index), previous)


def wrapped(
    stage: Stage, config: StageConfig, index: int, window: int, tolerance: TolConfig | None
) -> ParallelPicardOptimizer:
    """The optimizer as a run has it."""
    options = PicardOptions(config.picard, window, tolerance)
    return make_optimizer(stage, options, config.steps, stage_seed(SEED, index))


def bits(stage: Stage) -> list[Tensor]:
    """The scene with its carry, the LoRA, and the state of every optimizer."""
    states = [base.state_dict()["state"] for base in stage.optimizers()]
    found = pytree.tree_flatten([stage.state_dict(), states])[0]
    return [each.detach().clone() for each in found if isinstance(each, Tensor)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


def before(recipe: ProlificDreamerConfig, name: str) -> tuple[StageConfig, int, Scene | None]:
    """A stage's configuration and index, and the scene that it begins with: no stage before has been trained."""
    previous: Scene | None = None
    for index, (stage, config) in enumerate(recipe.stages()):
        if stage == name:
            return config, index, previous
        previous = build(config, index, previous).scene
    raise KeyError(name)
