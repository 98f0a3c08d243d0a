"""What a text-to-3D run is told, and how it is kept beside the run."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from .methods.dreamfusion import DreamFusionConfig


@dataclass(frozen=True)
class TextTo3DConfig:
    """One run from a prompt to a 3D object.

    Args:
        prompt: what to make; the shipped guidance knows eight shapes in eight colours.
        out: folder for the run's files; made if absent, must be empty unless `overwrite`.
        seed: of the whole run: the same seed gives the same object.
        steps: optimizer steps.
        workers: processes (one device each); None: one per accelerator, else two if the machine
            has two cores.
        window: steps evaluated by one sweep; None: one per worker.
        tolerance: largest residual accepted (0: exactly the sequential run, inf: everything),
            "adaptive" (the paper's rule), "step-relative", or None: the optimizer's default.
        predictor: what fills new slots of the window; None: the optimizer's default.
        sequential: run the plain loop with the wrapped optimizer alone, in one process.
        guidance: "diffusion" (the shipped model) or "exact" (the closed-form score of the prompt's
            true views; a yardstick that only knows the prompts of the domain).
        method: the recipe: batch, learning rate, losses, the field's resolution.
        picture_every: steps between progress pictures; 0: none.
        threads: CPU threads a process; the same number gives the same bits.
        device: "auto" (accelerators if there are), "cpu" or "cuda".
        overwrite: allow an `out` that holds files of an earlier run.
    """

    prompt: Positional[str]
    out: Path
    seed: int = 0
    steps: int = 300
    workers: int | None = None
    window: int | None = None
    tolerance: float | Literal["adaptive", "step-relative"] | None = None
    predictor: Literal["coast", "hold"] | None = None
    sequential: bool = False
    guidance: Literal["diffusion", "exact"] = "diffusion"
    method: DreamFusionConfig = field(default_factory=DreamFusionConfig)
    picture_every: int = 100
    threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no run can honour, by name, with the remedy."""
        if not self.prompt.strip():
            raise ValueError('prompt is empty: describe an object, e.g. "a red cube"')
        for name, least in (("steps", 1), ("threads", 1), ("picture_every", 0), ("seed", 0)):
            _at_least(name, getattr(self, name), least)
        for name in ("workers", "window"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if isinstance(self.tolerance, float | int) and not self.tolerance >= 0:
            raise ValueError(
                f"tolerance={self.tolerance}: give 0 (exact), a positive number, inf, "
                '"adaptive" or "step-relative"'
            )
        if self.sequential and (self.workers or 1) > 1:
            raise ValueError(
                f"sequential with workers={self.workers}: the sequential run is one process; "
                "leave --workers out or leave --sequential out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON can hold them (an infinite tolerance as the word "inf")."""
        values = dataclasses.asdict(self) | {"out": str(self.out)}
        if self.tolerance == math.inf:
            values["tolerance"] = "inf"
        return values


def _at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError that says what to give."""
    if value < least:
        raise ValueError(f"{name}={value}: give a whole number of at least {least}")


def check_out(config: TextTo3DConfig) -> None:
    """Refuse an output path that is a file, or a folder with files in it.

    Raises:
        FileExistsError: `out` is taken; the message says what to do.
    """
    if config.out.exists() and not config.out.is_dir():
        raise FileExistsError(f"--out {config.out} is a file: give a folder")
    if config.out.is_dir() and any(config.out.iterdir()) and not config.overwrite:
        raise FileExistsError(
            f"--out {config.out} is not empty: give another folder, or add --overwrite to replace "
            "the files of an earlier run"
        )


def default_workers(accelerators: int) -> int:
    """One worker per accelerator if there are any, else two where two cores are available."""
    return accelerators or min(2, len(os.sched_getaffinity(0)))
