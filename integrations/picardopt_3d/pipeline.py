"""A text-to-3D run: workers that optimise the scene, then its pictures, film and report."""

from __future__ import annotations

import time
from typing import Any

import torch

from picardopt import launch

from .config import TextTo3DConfig, check_out, default_workers
from .domain import parse_prompt
from .export.files import write_json
from .report import finish
from .worker import train


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
        trained = launch(train, workers=workers, args=(config, started))[0]
    return finish(config, trained, started)


def _accelerators(config: TextTo3DConfig) -> int:
    """Accelerators that the run may use."""
    return 0 if config.device == "cpu" else torch.cuda.device_count()
