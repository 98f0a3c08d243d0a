"""What every worker of a run does: train one stage after the other, and keep their checkpoints."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from picardopt_3d.config import RunConfig
from picardopt_3d.config_files import plain, save_config
from picardopt_3d.io import replacing
from picardopt_3d.problem import Losses
from picardopt_3d.run.checkpoint import save_stage
from picardopt_3d.run.curves import WandbCurves
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.loop import train as train_problem
from picardopt_3d.run.observer import Observer, observing
from picardopt_3d.run.prepare import PreparedStage, prepared_stages
from picardopt_3d.run.progress import Progress, save_progress_picture
from picardopt_3d.run.record import Recorder, RunRecord
from picardopt_3d.run.signals import first_signal_only
from picardopt_3d.scenes import save_scene


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
    with observing(config) as observer:
        for prepared in prepared_stages(config, resume):
            started = _train_stage(config, prepared, started, observer)
    return prepared.record


def train_launched(config: RunConfig[Any], started: float, resume: bool) -> Exception | None:
    """`train` as a worker of `launch`.

    Returns user errors instead of raising them: the elastic launcher would bury the message in tracebacks.
    """
    stages = prepared_stages(config, resume)
    with contextlib.ExitStack() as stack:
        try:
            observer = stack.enter_context(observing(config))
        except (ValueError, OSError) as error:
            return error
        while True:
            try:
                prepared = next(stages, None)
            except (ValueError, OSError) as error:
                return error
            if prepared is None:
                return None
            started = _train_stage(config, prepared, started, observer)


def _train_stage(
    config: RunConfig[Any], prepared: PreparedStage, started: float, observer: Observer
) -> float:
    """Trains one stage, which rank 0 shows and keeps; returns when the next one begins, `time.time()`."""
    recorder = Recorder(prepared.record, prepared.problem, prepared.optimizer, started)
    if dist.is_initialized() and dist.get_rank() != 0:
        with first_signal_only():
            problem, steps = prepared.problem, prepared.config.steps
            observer.begin(prepared, recorder, None)

            def view(step: int, losses: Losses) -> None:
                observer.stepped(step)

            train_problem(problem, prepared.optimizer, recorder, steps, view, _nothing)
    else:
        _train_and_keep(config, prepared, recorder, observer)
    if dist.is_initialized():
        dist.barrier()  # the next stage reads the scene that rank 0 has written
    return time.time()


def _nothing() -> None:
    """What other ranks keep."""


def _train_and_keep(
    config: RunConfig[Any], prepared: PreparedStage, recorder: Recorder, observer: Observer
) -> None:
    """Trains one stage, shows its progress and writes its files."""
    problem, optimizer, record = prepared.problem, prepared.optimizer, prepared.record
    save_config(config, RunFolder(config.out).config)

    def picture(step: int) -> Path:
        path, view = prepared.folder.picture(step), prepared.config.cameras.middle
        save_progress_picture(problem.scene, path, step, view)
        return path

    def view(step: int, losses: Losses) -> None:
        progress.step(step, losses)
        if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
            checkpoint()
        observer.stepped(step)

    def checkpoint() -> None:
        recorder.count()
        save_stage(prepared.folder, problem, optimizer, record)

    def save() -> None:
        save_stage(prepared.folder, problem, optimizer, record)
        with replacing(prepared.folder.scene) as temporary:
            save_scene(problem.scene, temporary)

    stages, title = config.recipe.stages(), config.task.title
    if len(stages) > 1:
        title = f"{title}, {stages[prepared.index].name} ({prepared.index + 1}/{len(stages)})"
    curves = None
    if config.wandb:
        curves = WandbCurves(RunFolder(config.out).wandb, title, prepared.index, plain(config))
    progress = Progress(
        recorder,
        title,
        prepared.config.steps,
        config.picture_every,
        picture,
        RunFolder(config.out).tensorboard if config.tensorboard else None,
        prepared.first_step,
        curves,
    )
    observer.begin(prepared, recorder, checkpoint)
    with progress, first_signal_only():
        train_problem(problem, optimizer, recorder, prepared.config.steps, view, save)
