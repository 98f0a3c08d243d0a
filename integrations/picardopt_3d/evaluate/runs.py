"""The folder of a finished run: its report and its scene."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..domain import Subject, parse_prompt
from ..scenes import Scene, load_scene

SCENE_FILE = "scene.safetensors"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Run:
    """What a finished run says of itself.

    Attributes:
        folder: Where it is.
        report: The content of `report.json`.
        prompt: What its pictures are to be recognised as; None if nothing is known.
        subject: What its pictures show, if that is something of the built-in world.
    """

    folder: Path
    report: dict[str, Any]
    prompt: str | None
    subject: Subject | None

    @property
    def view(self) -> tuple[float, float] | None:
        """Distance and vertical field of view (degrees) that the run was made for, if its report says."""
        match self.report.get("view"):
            case [int() | float() as distance, int() | float() as fov]:
                return float(distance), float(fov)
        return None

    @property
    def seconds(self) -> float | None:
        """Seconds of the optimization alone."""
        return _number(self.report.get("seconds"))

    @property
    def seconds_with_startup(self) -> float | None:
        """Seconds from the command to the finished optimization: imports, models and workers too."""
        alone, startup = self.seconds, _number(self.report.get("startup_seconds"))
        return None if alone is None or startup is None else alone + startup


def read_run(folder: Path) -> Run:
    """Read the report of a run.

    Args:
        folder: The run's.

    Raises:
        FileNotFoundError: It is no folder, or not that of a finished run.
        ValueError: Its report cannot be read.
    """
    scene_file(folder)
    path = folder / REPORT_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {REPORT_FILE}: the run has not finished; go on with it by `picardopt resume {folder}`"
        )
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise ValueError(f"{path} is no report: it holds no names and values")
    # Of a run from a picture the report has a prompt only if that is a caption of the built-in world.
    prompt = report.get("prompt") or None
    return Run(folder, report, prompt, parse_prompt(report.get("subject") or prompt or ""))


def scene_file(run: Path) -> Path:
    """The scene of a run.

    Args:
        run: The run's folder, or the scene file itself.

    Raises:
        FileNotFoundError: There is no scene.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: there is no such folder; give the folder of a run")
    if not (run / SCENE_FILE).is_file():
        raise FileNotFoundError(
            f"{run} is no finished run: it has no {SCENE_FILE}; give the folder that --out named"
        )
    return run / SCENE_FILE


def open_scene(path: Path, device: str = "auto") -> Scene:
    """Load a scene to look at it: without gradients, on a device.

    Args:
        path: Of the scene file.
        device: "auto" (an accelerator if there is one) or a device of torch's.

    Raises:
        ValueError: The file holds no scene, or there is no such device.
    """
    place = torch.device(pick_device(device))
    try:
        scene = load_scene(path)
    except (RuntimeError, KeyError, TypeError) as error:  # tensors or entries that do not fit
        raise ValueError(f"{path} holds no scene that can be loaded: {error}") from error
    return scene.to(place).eval().requires_grad_(False)


def pick_device(name: str) -> str:
    """The device that a name stands for.

    Raises:
        ValueError: torch does not see it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch sees no CUDA device here; use --device auto or cpu")
    return name


def _number(value: object) -> float | None:
    """A number of the report, or None."""
    return float(value) if isinstance(value, int | float) else None
