"""What is made of a finished scene: film, contact sheet, plot, report."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.export.pictures import rows_of, save_contact_sheet
from picardopt_3d.export.plots import save_strides_plot
from picardopt_3d.export.turntable import frames_of, save_film
from picardopt_3d.io import write_json
from picardopt_3d.rendering import render_in_parts
from picardopt_3d.run.finished import open_scene
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.scenes import Scene
from picardopt_3d.task import Task

FILM_FRAMES = 120
View = tuple[float, float]
"""Distance of a camera from the origin, scene units, and its vertical field of view, degrees."""


def finish(
    folder: RunFolder, task: Task, view: View, device: str, started: float
) -> dict[str, Any]:
    """Writes everything but scenes, checkpoints and records, which the workers wrote; the report comes last.

    Args:
        folder: Of the run.
        task: What was asked for.
        view: Where the object is seen from.
        device: Where the scene is rendered, as `pick_device` takes it.
        started: `time.time()` when the command began.

    Returns:
        The content of the report.
    """
    record = RunRecord.of_stages([RunRecord.load(stage) for stage in folder.begun()])
    scene = open_scene(folder.scene, device)
    size = int(record.figures["size"])
    yardstick = task.yardstick
    compared = {} if yardstick is None else yardstick.figures(scene, size)
    shown = min(max(size, 96), 256) // 16 * 16
    save_turntable(scene, folder.film, view, shown)
    save_sheet(scene, folder, task, view, shown, compared.get("psnr"))
    save_strides_plot(record, int(record.figures["window"]), folder.plot)
    report = _report(record, task, view, started) | _counts(record) | compared
    write_json(folder.report, report)
    return report


def _report(record: RunRecord, task: Task, view: View, started: float) -> dict[str, Any]:
    """The figures of a run; totals count every sweep, `steps_per_sweep` lists the most recent ones."""
    return record.figures | {
        "prompt": task.caption,
        "view": view,
        "steps_done": record.step,
        "sweeps": record.sweeps,
        "mean_stride": record.mean_stride,
        "drift_evaluations": record.drift_evaluations,
        "wasted_evaluations": record.wasted_evaluations,
        "seconds": record.seconds,
        "startup_seconds": record.startup_seconds,
        "phase_seconds": record.phase_seconds,
        "total_seconds": time.time() - started,
        "steps_per_sweep": record.strides,
        "losses": [loss if math.isfinite(loss) else None for loss in record.losses],
    }


def _counts(record: RunRecord) -> dict[str, Any]:
    """How many parts the scene has of each kind, if it counts them: in the end, and from which step on."""
    if not record.counts:
        return {}
    last = {name: history[-1] for name, history in record.counts.items()}
    kept = {name.lower(): count for name, (steps, _, count) in last.items() if steps == record.step}
    return kept | {
        "counts": {
            name: [[steps, count] for steps, _, count in history]
            for name, history in record.counts.items()
        },
        "restructured": [steps for steps, _ in record.restructured],
    }


def save_turntable(scene: Scene, path: Path, view: View, size: int = 96) -> None:
    """Writes a film of one turn: colour beside normals, 120 frames at 30 a second.

    Args:
        scene: What turns.
        path: The mp4 to write.
        view: Where it is seen from.
        size: Pixels along an edge of a view, which is enlarged to three times that.
    """
    cameras = turntable_cameras(FILM_FRAMES, distance=view[0], fov=view[1])
    renders = render_in_parts(scene, cameras, size, normals=True, at_once=4)
    save_film((frame for render in renders for frame in frames_of(render, scale=3)), path)


def save_sheet(
    scene: Scene, folder: RunFolder, task: Task, view: View, size: int, psnr: float | None
) -> None:
    """Writes six views around the scene, and below them the true ones where they are known.

    Of a run from a picture: the picture on top, and the first view from where it was taken.
    """
    elevation, azimuth = task.sheet_view
    cameras = orbit_cameras(elevation, azimuth + torch.arange(6) * 60.0, *view)
    reference, rows = task.reference(folder.input, *view), []
    if reference is not None:
        rows = [("picture", reference.at(size)[0][None])]
    (render,) = render_in_parts(scene, cameras, size, normals=True, at_once=6)
    rows += zip(("colour", "normals", "opacity"), rows_of(render), strict=True)
    title, yardstick = task.title, task.yardstick
    if yardstick is not None and psnr is not None:
        rows.append(("true views", yardstick.views(cameras, size)))
        title = f"{title}  (PSNR {psnr:.1f} dB)"
    save_contact_sheet(rows, title, folder.sheet, scale=2)
