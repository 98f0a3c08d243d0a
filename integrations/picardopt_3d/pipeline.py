"""A run: workers that optimise the scene, then its pictures, film and report."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from picardopt import launch
from picardopt.interrupts import interrupts_deferred

from .config import CONFIG_FILE, ImageTo3DConfig, RunConfig, check_new, default_workers
from .images import prepare_reference
from .report import REPORT_FILE, finish
from .worker import CHECKPOINT_FILE, INPUT_FILE, SCENE_FILE, train, train_launched

OWN_FILES = (
    CONFIG_FILE,
    CHECKPOINT_FILE,
    SCENE_FILE,
    INPUT_FILE,
    REPORT_FILE,
    "contact_sheet.png",
    "turntable.mp4",
    "strides.png",
    "progress",
    "tensorboard",
)
"""Files and folders that a run writes, and that --overwrite replaces."""


def run(config: RunConfig[Any], *, started: float | None = None) -> dict[str, Any]:
    """Make the object and all files of the run.

    Ctrl-C ends the optimisation early; film, pictures and report are made all the same of what there is. What ends it
    before the first step leaves the folder as it was.

    Args:
        config: the run's options.
        started: `time.time()` when the command began; now if None.

    Returns:
        the content of `report.json`.

    Raises:
        FileExistsError: `config.out` is taken.
        ValueError: an option cannot be used, or the exact guidance does not know the prompt.
        FileNotFoundError: a model or a picture cannot be had.
    """
    started = time.time() if started is None else started
    config.check()
    check_new(config)
    if isinstance(config, ImageTo3DConfig):
        config = replace(config, image=config.image.absolute())
    with _room_for(config):
        return _optimise(config, started, resume=False)


def resume(config: RunConfig[Any], *, started: float | None = None) -> dict[str, Any]:
    """Go on with the run in `config.out` from its last checkpoint, and make all its files.

    Args:
        config: the run's own options (`load_config`); workers, window and tolerance may differ, and are kept.
        started: `time.time()` when the command began; now if None.

    Returns:
        the content of `report.json`.

    Raises:
        FileNotFoundError: There is nothing to go on from.
        CheckpointError: The checkpoint cannot be used.
    """
    started = time.time() if started is None else started
    if not (config.out / CHECKPOINT_FILE).exists():
        raise FileNotFoundError(
            f"{config.out} has no {CHECKPOINT_FILE}: it was stopped before the first one was written; start it anew"
        )
    return _optimise(config, started, resume=True)


@contextlib.contextmanager
def _room_for(config: RunConfig[Any]) -> Iterator[None]:
    """A folder without an earlier run's files; they are back where they were if this run ends before its first step."""
    out, made = config.out, not config.out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".replaced-", dir=out) as name:
            old, new = Path(name, "old"), Path(name, "new")
            old.mkdir()
            new.mkdir()
            if isinstance(config, ImageTo3DConfig):
                # Once, to a file that every worker reads, and that a resumed run reads again.
                note = prepare_reference(
                    config.image,
                    new / INPUT_FILE,
                    framed=config.framed,
                    cut_background=config.cut_background,
                )
                if note is not None:
                    print(f"note: {note}", file=sys.stderr)
            try:
                with interrupts_deferred():
                    _move_run(out, old)
                    _move_run(new, out)
                yield
            except BaseException:
                if not (out / CHECKPOINT_FILE).exists():
                    with interrupts_deferred():
                        _move_run(out, new)
                        _move_run(old, out)
                raise
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _move_run(source: Path, target: Path) -> None:
    for name in OWN_FILES:
        if (source / name).exists():
            (source / name).rename(target / name)


def _optimise(config: RunConfig[Any], started: float, resume: bool) -> dict[str, Any]:
    workers = 1 if config.sequential else config.workers or default_workers(_accelerators(config))
    before = torch.get_num_threads()
    try:
        if workers == 1:
            train(config, started, resume)
        else:
            for error in launch(train_launched, workers=workers, args=(config, started, resume)):
                if error is not None:
                    raise error
    except KeyboardInterrupt:
        if (config.out / SCENE_FILE).exists():
            print("\nstopped: writing film and report (Ctrl-C again leaves them)", file=sys.stderr)
            finish(config, started)
        raise
    finally:
        torch.set_num_threads(before)
    return finish(config, started)


def _accelerators(config: RunConfig[Any]) -> int:
    """Accelerators that the run may use."""
    return 0 if config.device == "cpu" else torch.cuda.device_count()
