"""Folders like those of finished runs, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from picardopt_3d.export.turntable import save_film
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import Scene, save_scene

from tests.integrations.helpers.analytic import voxels

FRAMES = 12
REPORT: dict[str, Any] = {
    "title": "a red cube",
    "method": "dreamfusion",
    "preset": "small",
    "size": 16,
    "steps": 30,
    "steps_done": 30,
    "sweeps": 10,
    "mean_stride": 3.0,
    "window": 4,
    "seconds": 8.0,
    "psnr": 20.0,
    "view": [1.65, 42.5],
    "steps_per_sweep": [2, 4] * 5,
}


def scene_of_a_run() -> Scene:
    """Half a cube in red, so that sides can be told apart."""

    def distance(points: Any) -> Any:
        return ((points - points.new_tensor([0.1, 0.2, 0.0])).abs() - 0.18).amax(-1)

    return voxels(distance, (0.9, 0.1, 0.1), 20)


def finished_run(
    folder: Path, scene: Scene, options: dict[str, Any] | None = None, **report: Any
) -> RunFolder:
    """Writes what a page is made of: report, options, scene, and a film whose frames tell their number."""
    files = RunFolder(folder)
    folder.mkdir(parents=True)
    files.report.write_text(json.dumps(REPORT | report))
    files.config.write_text(yaml.safe_dump(options or {"seed": 0, "recipe": {"batch": 4}}))
    save_scene(scene, folder / "scene.safetensors")
    frames = np.full((FRAMES, 48, 96, 3), 255, np.uint8)
    for index in range(FRAMES):
        frames[index, :, :48] = 20 * index  # brighter from frame to frame
        frames[index, :, 48:] = (0, 0, 250)  # the normals
    save_film(iter(frames), files.film)
    return files
