"""A run's folder as a viewer shows it: the scene that was written last, and the log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from picardopt import load_checkpoint
from picardopt_3d.config import RunConfig
from picardopt_3d.config_files import load_config
from picardopt_3d.devices import pick_device
from picardopt_3d.run.finished import open_scene
from picardopt_3d.run.folder import RunFolder, StageFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.scenes import Scene, build_scene


@dataclass(frozen=True)
class Found:
    """What a look at a folder has found.

    Attributes:
        scene: The scene, if another one was written since the last look.
        record: The record of all stages, likewise.
        picture: The newest progress picture, likewise.
        stage: Name of the stage that the scene is of.
    """

    scene: Scene | None
    record: RunRecord | None
    picture: Path | None
    stage: str


class FollowedRun:
    """A run's folder, of a run that goes on or has ended.

    Args:
        path: The folder.
        device: As `pick_device` takes it.

    Attributes:
        config: The run's options.

    Raises:
        FileNotFoundError: It is no run's folder.
        ValueError: Its configuration cannot be read, or there is no such device.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        self.folder, self._device = RunFolder(path), device
        pick_device(device)
        if not self.folder.config.is_file():
            raise FileNotFoundError(
                f"{path} is no run's folder: it has no {self.folder.config.name}; give the folder that --out named"
            )
        self.config: RunConfig[Any] = load_config(self.folder.config)
        self._seen: dict[str, tuple[Path, int]] = {}

    def look(self) -> Found:
        """Reads what was written since the last look.

        Raises:
            CheckpointError: A checkpoint cannot be used.
            ValueError, RuntimeError: A scene file holds none, or is of another configuration.
        """
        begun = self.folder.begun()
        scene, record = None, None
        stage = begun[-1] if begun else None
        if stage is not None and self._is_new("scene", newest(stage)):
            scene = self._scene(stage)
        if stage is not None and self._is_new("record", stage.record):
            record = RunRecord.of_stages([RunRecord.load(each) for each in begun])
        pictures = sorted(self.folder.path.glob("**/progress/step_*.png"), key=_written)
        picture = pictures[-1] if pictures and self._is_new("picture", pictures[-1]) else None
        name = "" if stage is None or stage.path == self.folder.path else stage.path.name
        return Found(scene, record, picture, name)

    def _is_new(self, kind: str, path: Path) -> bool:
        """Returns whether a file is there and was not seen yet, and sees it."""
        found = path, _written(path)
        new = found[1] > 0 and self._seen.get(kind) != found
        self._seen[kind] = found
        return new

    def _scene(self, folder: StageFolder) -> Scene:
        """Reads a stage's scene from its file, or from its checkpoint if that was written later."""
        if newest(folder) == folder.scene:
            return open_scene(folder.scene, self._device)
        state = load_checkpoint(folder.checkpoint)["scene"]
        for index, (name, stage) in enumerate(self.config.recipe.stages()):
            if self.folder.stage(index, name) == folder:
                with torch.random.fork_rng(devices=[]):
                    scene = build_scene(stage.scene)
                scene.load_state_dict(state)
                return scene.to(pick_device(self._device)).eval().requires_grad_(False)
        raise ValueError(
            f"{folder.path} is no stage of the run: its configuration names no such stage"
        )


def newest(folder: StageFolder) -> Path:
    """Returns the file of a stage that has its latest scene."""
    return max(folder.checkpoint, folder.scene, key=_written)


def _written(path: Path) -> int:
    """Returns when a file was written, nanoseconds; 0: never."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
