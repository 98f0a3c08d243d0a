"""A run: workers that optimise the scene, then its pictures, film and report."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from picardopt import launch

from .config import CONFIG_FILE, ImageTo3DConfig, RunConfig, check_out, default_workers, save_config
from .images import prepare_reference
from .report import REPORT_FILE, finish
from .worker import CHECKPOINT_FILE, INPUT_FILE, SCENE_FILE, train


def run(config: RunConfig[Any], *, started: float | None = None) -> dict[str, Any]:
    """Make the object and all files of the run.

    Ctrl-C ends the optimisation early; film, pictures and report are made all the same of what there is.

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
    check_out(config)
    config.out.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT_FILE, SCENE_FILE, REPORT_FILE):
        (config.out / name).unlink(missing_ok=True)
    if isinstance(config, ImageTo3DConfig):
        # Once, to a file that every worker reads, and that a resumed run reads again.
        prepare_reference(config.image, config.out / INPUT_FILE, framed=config.framed)
    save_config(config, config.out / CONFIG_FILE)
    return _optimise(config, started, resume=False)


def resume(config: RunConfig[Any], *, started: float | None = None) -> dict[str, Any]:
    """Go on with the run in `config.out` from its last checkpoint, and make all its files.

    Args:
        config: the run's own options (`load_config`); workers, window and tolerance may differ.
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


def _optimise(config: RunConfig[Any], started: float, resume: bool) -> dict[str, Any]:
    workers = 1 if config.sequential else config.workers or default_workers(_accelerators(config))
    before = torch.get_num_threads()
    try:
        if workers == 1:
            train(config, started, resume)
        else:
            launch(train, workers=workers, args=(config, started, resume))
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
