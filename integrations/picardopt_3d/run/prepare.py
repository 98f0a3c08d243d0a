"""From a run's options to a stage that can be trained: everything that unusable options or files can make fail."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from picardopt import ParallelPicardOptimizer, __version__
from picardopt_3d.config import RunConfig
from picardopt_3d.devices import pick_device
from picardopt_3d.guidance.choose import load_guidance
from picardopt_3d.methods import Context, Stage, StageConfig, stage_seed
from picardopt_3d.picard import PicardOptions, make_optimizer
from picardopt_3d.run.agreement import agreed, check_same_scene
from picardopt_3d.run.checkpoint import load_stage
from picardopt_3d.run.folder import RunFolder, StageFolder
from picardopt_3d.run.later_stages import check_later_stages, explained_stage
from picardopt_3d.run.memory import check_memory
from picardopt_3d.run.record import RunRecord
from picardopt_3d.scenes import Scene, load_scene
from picardopt_3d.task import Task


@dataclass(frozen=True, eq=False)
class PreparedStage:
    """A stage that is about to begin or to go on.

    Attributes:
        index: Of the stage, from 0.
        config: Its numbers.
        problem: What is trained.
        optimizer: Wraps the problem's optimizers.
        record: What has happened so far.
        folder: Its files.
        first_step: Steps of the stages before.
    """

    index: int
    config: StageConfig
    problem: Stage
    optimizer: ParallelPicardOptimizer
    record: RunRecord
    folder: StageFolder
    first_step: int


def prepared_stages(config: RunConfig[Any], resume: bool) -> Iterator[PreparedStage]:
    """Prepares one stage after the other: each once the one before is trained and its scene is written.

    Args:
        config: The run's options.
        resume: Begin with the last stage that has a checkpoint, where that was written.

    Raises:
        ValueError, OSError: An option or a file cannot be used; on all ranks alike.
    """
    torch.set_num_threads(config.threads)
    first, goes_on = _first_stage(config) if resume else (0, False)
    with agreed():
        check_later_stages(config, first)
    for index in range(first, len(config.recipe.stages())):
        yield _prepared(config, index, resume=goes_on and index == first)


def _first_stage(config: RunConfig[Any]) -> tuple[int, bool]:
    """The stage that a resumed run begins with, and whether that has a checkpoint."""
    folder, stages = RunFolder(config.out), config.recipe.stages()
    begun = [i for i, each in enumerate(stages) if folder.stage(i, each.name).checkpoint.exists()]
    last = begun[-1] if begun else 0
    if last + 1 < len(stages):
        done = RunRecord.load(folder.stage(last, stages[last].name)).step
        if done >= stages[last].config.steps:
            return last + 1, False
    return last, True


def _prepared(config: RunConfig[Any], index: int, resume: bool) -> PreparedStage:
    """Does all that unusable options or files can make fail; nothing is written."""
    stages, folder = config.recipe.stages(), RunFolder(config.out)
    name, stage = stages[index]
    seed = stage_seed(config.seed, index)
    with agreed(), explained_stage(config, index):
        device, previous = pick_device(config.device), None
        if index:
            before = folder.stage(index - 1, stages[index - 1].name)
            _say(_what_is_made(config, index))
            previous = load_scene(before.scene).to(device)
        problem = build_problem(stage, config.task, folder.input, device, seed, previous)
    with agreed():
        options = PicardOptions(
            stage.picard,
            config.window,
            config.tolerance,
            config.predictor,
            config.secants,
            config.sequential,
        )
        optimizer = make_optimizer(problem, options, stage.steps, seed)
        _say(check_memory(optimizer, device, _processes()))
        figures = _figures(config, stage, device) | {
            "predictor": options.arguments()["predictor"],
            "secants": options.arguments().get("secants"),
            "window": optimizer.window,
            "tolerance": None if config.sequential else repr(optimizer.tolerance),
        }
        record = RunRecord(figures)
        if resume:
            load_stage(folder.stage(index, name), problem, optimizer, record)
    with explained_stage(config, index):
        check_same_scene(problem)
    first = sum(each.config.steps for each in stages[:index])
    return PreparedStage(index, stage, problem, optimizer, record, folder.stage(index, name), first)


def _what_is_made(config: RunConfig[Any], index: int) -> str:
    """Says that a stage's scene is made of the one before, which may take minutes."""
    stages = config.recipe.stages()
    return (
        f"making the scene of stage {stages[index].name} ({index + 1}/{len(stages)}) from that of stage "
        f"{stages[index - 1].name} ..."
    )


def _say(text: str | None) -> None:
    """Prints a line, once for all workers."""
    if text is not None and not (dist.is_initialized() and dist.get_rank() != 0):
        print(text, file=sys.stderr)


def _processes() -> int:
    """Returns the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def build_problem(
    stage: StageConfig,
    task: Task,
    picture: Path,
    device: torch.device,
    seed: int,
    previous: Scene | None = None,
) -> Stage:
    """Builds a stage on a new scene, or on that of the stage before.

    Args:
        stage: Its numbers.
        task: What is asked for.
        picture: The prepared picture, of a task that has one.
        device: Where the scene lives.
        seed: Of the scene's first weights, which are drawn before step 0.
        previous: The scene of the stage before.
    """
    reference = task.reference(picture, *stage.cameras.middle)
    prompt = task.prompt(stage.guidance, reference)
    guidance = load_guidance(
        stage.guidance,
        prompt,
        stage.final_pixels,
        device,
        sds=stage.sds,
        vsd=stage.vsd,
        denoise=stage.denoise,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return stage.build(Context(guidance, prompt, device, reference), previous)


def _figures(config: RunConfig[Any], stage: StageConfig, device: torch.device) -> dict[str, Any]:
    """Entries of the report that are known before the first step."""
    return {
        "title": config.task.title,
        "method": config.method,
        "preset": config.preset,
        "seed": config.seed,
        "guidance": stage.guidance.model,
        "guidance_source": stage.guidance.source or "shipped",
        "guidance_loss": stage.guidance.loss,
        "sequential": config.sequential,
        "workers": _processes(),
        "threads_per_worker": torch.get_num_threads(),
        "device": str(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "picardopt": __version__,
        "torch": str(torch.__version__),
        "steps": stage.steps,
        "size": stage.final_pixels,
    } | ({} if config.sequential or stage.caution is None else {"caution": stage.caution})
