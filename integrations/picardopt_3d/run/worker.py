"""What every worker of a run does: build each stage, train it, and keep its checkpoint."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from picardopt import ParallelPicardOptimizer
from picardopt_3d.config import RunConfig
from picardopt_3d.config_files import save_config
from picardopt_3d.devices import pick_device
from picardopt_3d.guidance.choose import load_guidance
from picardopt_3d.io import replacing
from picardopt_3d.methods import Context, Stage, StageConfig, stage_seed
from picardopt_3d.picard import PicardOptions, make_optimizer
from picardopt_3d.run.checkpoint import load_stage, save_stage
from picardopt_3d.run.folder import RunFolder, StageFolder
from picardopt_3d.run.loop import train as train_stage
from picardopt_3d.run.progress import Progress, save_progress_picture
from picardopt_3d.run.record import Recorder, RunRecord
from picardopt_3d.run.signals import first_signal_only
from picardopt_3d.scenes import Scene, load_scene, save_scene
from picardopt_3d.task import Task


@dataclass(frozen=True, eq=False)
class PreparedStage:
    """A stage that is about to begin or to go on.

    Attributes:
        name: As the recipe calls it.
        config: Its numbers.
        problem: What is trained.
        optimizer: Wraps the problem's optimizers.
        record: What has happened so far.
        folder: Its files.
        first_step: Steps of the stages before.
    """

    name: str
    config: StageConfig
    problem: Stage
    optimizer: ParallelPicardOptimizer
    record: RunRecord
    folder: StageFolder
    first_step: int = field(default=0)


def train(config: RunConfig[Any], started: float, resume: bool = False) -> RunRecord:
    """Trains the scene; every worker runs this, rank 0 shows progress and writes the files.

    Whatever ends it early, Ctrl-C or an error, leaves the last committed step in the checkpoint, if there is one.

    Args:
        config: The run's options, which are kept in its folder once they have proved usable.
        started: `time.time()` when the command began.
        resume: Go on from the checkpoint of the last stage that has one.

    Returns:
        The record of the last stage.
    """
    return _train_from(config, _first_stage(config, resume), started)


def train_launched(config: RunConfig[Any], started: float, resume: bool) -> Exception | None:
    """`train` as a worker of `launch`.

    Returns user errors instead of raising them: the elastic launcher would bury the message in tracebacks.
    """
    try:
        prepared = _first_stage(config, resume)
    except (ValueError, OSError) as error:
        return error
    _train_from(config, prepared, started)
    return None


def _train_from(config: RunConfig[Any], prepared: PreparedStage, started: float) -> RunRecord:
    """Trains a stage and all that come after it."""
    if _rank() == 0:
        save_config(config, RunFolder(config.out).config)
    stages = config.recipe.stages()
    begin = next(index for index, stage in enumerate(stages) if stage.name == prepared.name)
    for index in range(begin, len(stages)):
        if index > begin:
            prepared = _prepare(config, index, resume=False)
        _train_stage(config, prepared, started)
        if dist.is_initialized():
            dist.barrier()  # the next stage reads the scene that rank 0 has written
        started = time.time()
    return prepared.record


def _first_stage(config: RunConfig[Any], resume: bool) -> PreparedStage:
    """Prepares the stage that a run begins or goes on with."""
    torch.set_num_threads(config.threads)
    if not resume:
        return _prepare(config, 0, resume=False)
    folder, stages = RunFolder(config.out), config.recipe.stages()
    begun = [i for i, each in enumerate(stages) if folder.stage(i, each.name).checkpoint.exists()]
    last = begun[-1] if begun else 0
    if last + 1 < len(stages):
        done = RunRecord.load(folder.stage(last, stages[last].name)).step
        if done >= stages[last].config.steps:
            return _prepare(config, last + 1, resume=False)
    return _prepare(config, last, resume=True)


def _prepare(config: RunConfig[Any], index: int, resume: bool) -> PreparedStage:
    """Does all that unusable options or files can make fail; nothing is written."""
    stages, folder = config.recipe.stages(), RunFolder(config.out)
    name, stage = stages[index]
    seed = stage_seed(config.seed, index)
    with _agreed():
        device, previous = pick_device(config.device), None
        if index:
            before = folder.stage(index - 1, stages[index - 1].name)
            previous = load_scene(before.scene).to(device)
        problem = build_problem(stage, config.task, folder.input, device, seed, previous)
    with _agreed():
        options = PicardOptions(
            stage.picard, config.window, config.tolerance, config.predictor, config.sequential
        )
        optimizer = make_optimizer(problem, options, stage.steps, seed)
        figures = _figures(config, stage, device) | {
            "predictor": options.arguments()["predictor"],
            "window": optimizer.window,
            "tolerance": None if config.sequential else repr(optimizer.tolerance),
        }
        record = RunRecord(figures)
        if resume:
            load_stage(folder.stage(index, name), problem, optimizer, record)
    first = sum(each.config.steps for each in stages[:index])
    return PreparedStage(
        name, stage, problem, optimizer, record, folder.stage(index, name), first_step=first
    )


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
        stage.guidance, prompt, stage.final_pixels, device, sds=stage.sds, vsd=stage.vsd
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return stage.build(Context(guidance, prompt, device, reference), previous)


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Raises a user error of one worker in all of them, so that none waits for the other."""
    found: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        found = error
    if dist.is_initialized():
        everyones: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, found)
        found = found or next(filter(None, everyones), None)
    if found is not None:
        raise found


def _train_stage(config: RunConfig[Any], prepared: PreparedStage, started: float) -> None:
    """Trains one stage; rank 0 shows it and keeps it."""
    problem, optimizer, record = prepared.problem, prepared.optimizer, prepared.record
    recorder = Recorder(record, optimizer, started)
    if _rank() != 0:
        with first_signal_only():
            steps = prepared.config.steps
            train_stage(problem, optimizer, recorder, steps, lambda *_: None, lambda: None)
        return

    def picture(step: int) -> Path:
        path, view = prepared.folder.picture(step), prepared.config.cameras.middle
        save_progress_picture(problem.scene, path, step, view)
        return path

    def view(step: int, losses: Any) -> None:
        progress.step(step, losses)
        if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
            recorder.count()
            save_stage(prepared.folder, problem, optimizer, record)

    def save() -> None:
        save_stage(prepared.folder, problem, optimizer, record)
        with replacing(prepared.folder.scene) as temporary:
            save_scene(problem.scene, temporary)

    progress = Progress(
        recorder,
        config.task.title,
        prepared.config.steps,
        config.picture_every,
        picture,
        RunFolder(config.out).tensorboard if config.tensorboard else None,
        prepared.first_step,
    )
    with progress, first_signal_only():
        train_stage(problem, optimizer, recorder, prepared.config.steps, view, save)


def _figures(config: RunConfig[Any], stage: StageConfig, device: torch.device) -> dict[str, Any]:
    """Entries of the report that are known before the first step."""
    return {
        "title": config.task.title,
        "method": config.method,
        "preset": config.preset,
        "seed": config.seed,
        "guidance": stage.guidance.model,
        "guidance_source": stage.guidance.source or "shipped",
        "sequential": config.sequential,
        "workers": dist.get_world_size() if dist.is_initialized() else 1,
        "threads_per_worker": torch.get_num_threads(),
        "device": str(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": str(torch.__version__),
        "steps": stage.steps,
        "size": stage.final_pixels,
    }


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
