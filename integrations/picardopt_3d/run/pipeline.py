"""A run from its options to its report: workers that train the scene, then pictures, film and figures."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from picardopt import launch
from picardopt.interrupts import interrupts_deferred
from picardopt_3d.config import RunConfig
from picardopt_3d.devices import default_workers
from picardopt_3d.run.choice import with_choice
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.outputs import finish
from picardopt_3d.run.worker import train, train_launched
from picardopt_3d.task import Task


def run(config: RunConfig[Any], *, started: float | None = None) -> dict[str, Any]:
    """Makes the object and all files of the run.

    Ctrl-C ends the optimization early; film, pictures and report are made all the same of what there is. What ends it
    before the first step leaves the folder as it was.

    Args:
        config: The run's options.
        started: `time.time()` when the command began; now if None.

    Returns:
        The content of `report.json`.

    Raises:
        FileExistsError: `config.out` is taken.
        ValueError: An option cannot be used, or the exact guidance does not know the prompt.
        FileNotFoundError: A model or a picture cannot be had.
    """
    config.check()
    config.check_new()
    return run_checked(config, time.time() if started is None else started)


def run_checked(config: RunConfig[Any], started: float) -> dict[str, Any]:
    """`run`, of options that were checked."""
    config = config.with_absolute_paths()
    with _room_for(RunFolder(config.out), config.task):
        return _train(config, started, resume=False)


def resume(config: RunConfig[Any], *, started: float | None = None) -> dict[str, Any]:
    """Goes on with the run in `config.out` from its last checkpoint, and makes all its files.

    Args:
        config: The run's own options (`load_config`); workers, window and tolerance may differ, and are kept.
        started: `time.time()` when the command began; now if None.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: An option cannot be used.
        FileNotFoundError: There is nothing to go on from.
        CheckpointError: The checkpoint cannot be used.
    """
    config.check()
    return resume_checked(config, time.time() if started is None else started)


def resume_checked(config: RunConfig[Any], started: float) -> dict[str, Any]:
    """`resume`, of options that were checked."""
    if not RunFolder(config.out).begun():
        raise FileNotFoundError(
            f"{config.out} has no checkpoint: it was stopped before the first one was written; start it anew"
        )
    return _train(config, started, resume=True)


@contextlib.contextmanager
def _room_for(folder: RunFolder, task: Task) -> Iterator[None]:
    """Moves an earlier run's files away, and back if this run ends before its first step."""
    out, made = folder.path, not folder.path.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".replaced-", dir=out) as name:
            old, new = RunFolder(Path(name, "old")), RunFolder(Path(name, "new"))
            old.path.mkdir()
            new.path.mkdir()
            # Once, to a file that every worker reads, and that a resumed run reads again.
            note = task.prepare(new.input)
            if note is not None:
                print(f"note: {note}", file=sys.stderr)
            try:
                with interrupts_deferred():
                    _move(folder, old)
                    _move(new, folder)
                yield
            except BaseException:
                if not folder.begun():
                    with interrupts_deferred():
                        _move(folder, new)
                        _move(old, folder)
                raise
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _move(source: RunFolder, target: RunFolder) -> None:
    """Moves all files of a run to another folder."""
    for path in source.own:
        if path.exists():
            path.rename(target.path / path.name)


def _train(config: RunConfig[Any], started: float, resume: bool) -> dict[str, Any]:
    """Starts the workers, waits for them, and makes the files of what they have made."""
    folder = RunFolder(config.out)
    if not resume:  # which goes on with what was chosen, and is in its configuration
        config, why = with_choice(config)
        if why is not None:
            print(f"note: {why}", file=sys.stderr)
    workers = 1 if config.sequential else config.workers or default_workers(config.device)
    before = torch.get_num_threads()
    try:
        if workers == 1:
            train(config, started, resume)
        else:
            for error in launch(train_launched, workers=workers, args=(config, started, resume)):
                if error is not None:
                    raise error
    except KeyboardInterrupt:
        if any(stage.scene.is_file() for stage in folder.begun()):
            print("\nstopped: writing film and report (Ctrl-C again leaves them)", file=sys.stderr)
            finish(config, started)
        raise
    except (ValueError, OSError):  # a later stage cannot begin
        if _has_trained(folder, started):
            print("writing film and report of what is there (Ctrl-C leaves them)", file=sys.stderr)
            with contextlib.suppress(ValueError, OSError):  # the first error is the one to mend
                finish(config, started)
        raise
    finally:
        torch.set_num_threads(before)
    return finish(config, started)


def _has_trained(folder: RunFolder, started: float) -> bool:
    """Returns whether a scene was written since the command began: an option that no stage can use changes nothing."""
    scenes = [stage.scene for stage in folder.begun() if stage.scene.is_file()]
    return any(scene.stat().st_mtime >= started for scene in scenes)
