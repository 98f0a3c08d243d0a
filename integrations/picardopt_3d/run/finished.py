"""A finished run, as evaluation and export read it: its report and its scene."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picardopt_3d.devices import pick_device
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import Scene, load_scene
from picardopt_3d.task import yardstick_of

if TYPE_CHECKING:
    from picardopt_3d.world.yardstick import Yardstick


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run reports.

    Attributes:
        folder: Where it is.
        scene: Its scene file.
        report: The content of `report.json`.
        prompt: What its pictures are to be recognized as; None if nothing is known.
        yardstick: The true views of what they show, if the built-in world has them.
    """

    folder: Path
    scene: Path
    report: dict[str, Any]
    prompt: str | None
    yardstick: Yardstick | None

    @property
    def view(self) -> tuple[float, float] | None:
        """Distance and vertical field of view (degrees) that the run was made for, if its report has them."""
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


def read_run(folder: Path) -> FinishedRun:
    """Reads the report of a run.

    Args:
        folder: The run's.

    Raises:
        FileNotFoundError: It is no folder, or not that of a finished run.
        ValueError: Its report cannot be read.
    """
    scene, path = scene_file(folder), RunFolder(folder).report
    if not path.is_file():
        quoted = shlex.quote(str(folder))
        raise FileNotFoundError(
            f"{folder} has no {path.name}: the run has not finished; go on with it by `picardopt resume {quoted}`"
        )
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise ValueError(f"{path} is no report: it holds no names and values")
    # Of a run from a picture the report has a prompt only if that is a caption of the built-in world.
    prompt = report.get("prompt") or None
    yardstick = yardstick_of(report.get("subject") or prompt or "")
    return FinishedRun(folder, scene, report, prompt, yardstick)


def scene_file(run: Path) -> Path:
    """Returns the scene file of a run.

    Args:
        run: The run's folder, or the scene file itself.

    Raises:
        FileNotFoundError: There is no scene.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: there is no such folder; give the folder of a run")
    return RunFolder(run).scene


def open_scene(path: Path, device: str = "auto") -> Scene:
    """Loads a scene to look at it: without gradients, on a device.

    Args:
        path: Of the scene file.
        device: As `pick_device` takes it.

    Raises:
        ValueError: The file holds no scene, or there is no such device.
    """
    chosen = pick_device(device)
    try:
        scene = load_scene(path)
    except (RuntimeError, KeyError, TypeError) as error:  # tensors or entries that do not fit
        raise ValueError(f"{path} holds no scene that can be loaded: {error}") from error
    return scene.to(chosen).eval().requires_grad_(False)


def _number(value: object) -> float | None:
    """A number of the report, or None."""
    return float(value) if isinstance(value, int | float) else None
