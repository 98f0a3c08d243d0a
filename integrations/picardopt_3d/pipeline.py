"""A text-to-3D run: workers that optimise the scene, then its pictures, film and report."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException

from picardopt import launch

from .config import TextTo3DConfig, check_out, default_workers
from .domain import parse_prompt
from .export.files import write_json
from .report import finish
from .worker import Trained, train


def run(config: TextTo3DConfig, *, started: float | None = None) -> dict[str, Any]:
    """Make the object and all files of the run.

    Args:
        config: the run's options.
        started: `time.time()` when the command began; now if None.

    Returns:
        the content of `report.json`.

    Raises:
        FileExistsError: `config.out` is taken.
        ValueError: the exact guidance does not know the prompt.
    """
    started = time.time() if started is None else started
    check_out(config)
    if config.guidance == "exact" and parse_prompt(config.prompt) is None:
        raise ValueError(
            f"prompt={config.prompt!r}: the exact guidance only knows the built-in shapes and "
            'colours; ask for one of those, e.g. "a red cube", or use --guidance diffusion'
        )
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "config.json", config.to_dict())
    workers = 1 if config.sequential else config.workers or default_workers(_accelerators(config))
    if workers == 1:
        before = torch.get_num_threads()
        try:
            trained = train(config, started)
        finally:
            torch.set_num_threads(before)
    else:
        trained = _launch(config, workers, started)
    return finish(config, trained, started)


def _launch(config: TextTo3DConfig, workers: int, started: float) -> Trained:
    """Train in worker processes; Ctrl-C is a KeyboardInterrupt then and afterwards, as anywhere."""
    # torch's elastic agent leaves its own signal handlers in place when it is done.
    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in handled]
    try:
        result: Trained = launch(train, workers=workers, args=(config, started))[0]
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(handled, before, strict=True):
                signal.signal(number, handler)
    return result


def _accelerators(config: TextTo3DConfig) -> int:
    """Accelerators that the run may use."""
    return 0 if config.device == "cpu" else torch.cuda.device_count()
