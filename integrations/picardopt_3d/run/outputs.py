"""What is made of a finished scene: film, contact sheet, plot, page, report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.config import RunConfig
from picardopt_3d.export.pictures import rows_of, save_contact_sheet
from picardopt_3d.export.plots import save_strides_plot
from picardopt_3d.export.turntable import film_pixels, frames_of, save_film
from picardopt_3d.io import write_json
from picardopt_3d.methods import NamedStage
from picardopt_3d.pages.viewer import save_viewer
from picardopt_3d.rendering import render_in_parts
from picardopt_3d.run.drifts import figures_of
from picardopt_3d.run.finished import open_scene
from picardopt_3d.run.folder import RunFolder, StageFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.scenes import Scene
from picardopt_3d.task import Task

FILM_FRAMES = 120
View = tuple[float, float]
"""Distance of a camera from the origin, scene units, and its vertical field of view, degrees."""


class _Begun(NamedTuple):
    """A stage that has begun."""

    stage: NamedStage
    folder: StageFolder
    record: RunRecord


def finish(config: RunConfig[Any], started: float) -> dict[str, Any]:
    """Writes everything but scenes, checkpoints and records, which the workers wrote; the report comes last.

    Film, sheet and comparison are of the last stage that has begun; earlier ones have a sheet in their own folders.

    Args:
        config: The run's options.
        started: `time.time()` when the command began.

    Returns:
        The content of the report.
    """
    folder, task, stages = RunFolder(config.out), config.task, config.recipe.stages()
    begun = _begun(folder, stages)
    record = RunRecord.of_stages([each.record for each in begun])
    size, view = int(record.figures["size"]), begun[-1].stage.config.cameras.middle
    scene, yardstick = open_scene(folder.scene, config.device), task.yardstick
    compared = {} if yardstick is None else yardstick.figures(scene, size)
    shown = film_pixels(size)
    save_turntable(scene, folder.film, view, shown)
    save_sheet(scene, folder.sheet, folder.input, task, view, shown, compared.get("psnr"))
    sweeps = [(each.stage.name, each.record.sweeps) for each in begun] if len(stages) > 1 else []
    save_strides_plot(record, int(record.figures["window"]), folder.plot, sweeps)
    report = _report(record, task, view, started) | _counts(record) | compared
    if len(stages) > 1:
        each = [_figures_of(one) for one in begun]
        for one, figures in zip(begun[:-1], each, strict=False):
            figures |= _sheet_of_earlier(one, config, size)
        each[-1] |= {name: compared[name] for name in ("psnr",) if compared}
        report |= {"steps": sum(stage.config.steps for stage in stages), "stages": each}
    save_viewer(folder, scene, report)
    write_json(folder.report, report)
    return report


def _begun(folder: RunFolder, stages: Sequence[NamedStage]) -> list[_Begun]:
    """The stages of a recipe that have a checkpoint."""
    folders = [folder.stage(index, stage.name) for index, stage in enumerate(stages)]
    return [
        _Begun(stage, own, RunRecord.load(own))
        for stage, own in zip(stages, folders, strict=True)
        if own.checkpoint.exists()
    ]


def _figures_of(begun: _Begun) -> dict[str, Any]:
    """The figures of one of several stages; the lists of the report are those of all."""
    name, record = begun.stage.name, begun.record
    kept = (
        "steps",
        "size",
        "guidance",
        "guidance_source",
        "window",
        "tolerance",
        "predictor",
        "secants",
    )
    return {
        "name": name,
        **{key: record.figures.get(key) for key in kept},
        **_totals(record),
    }


def _sheet_of_earlier(begun: _Begun, config: RunConfig[Any], size: int) -> dict[str, Any]:
    """Writes the sheet of a stage before the last one; returns its comparison at the size of the last one."""
    task, view = config.task, begun.stage.config.cameras.middle
    scene, yardstick = open_scene(begun.folder.scene, config.device), task.yardstick
    found = None if yardstick is None else yardstick.psnr(scene, size)
    picture, shown = RunFolder(config.out).input, film_pixels(size)
    save_sheet(scene, begun.folder.sheet, picture, task, view, shown, found, begun.stage.name)
    return {} if found is None else {"psnr": found}


def _report(record: RunRecord, task: Task, view: View, started: float) -> dict[str, Any]:
    """The figures of a run; totals count every sweep, `steps_per_sweep` lists the most recent ones."""
    return record.figures | {
        "prompt": task.caption,
        "view": view,
        **_totals(record),
        "phase_seconds": record.phase_seconds,
        "total_seconds": time.time() - started,
        "steps_per_sweep": record.strides,
        "losses": [loss if math.isfinite(loss) else None for loss in record.losses],
    }


def _totals(record: RunRecord) -> dict[str, Any]:
    """What a run, or one of its stages, took in all, and how far its drifts were off."""
    return {
        "steps_done": record.step,
        "sweeps": record.sweeps,
        "mean_stride": record.mean_stride,
        "drift_evaluations": record.drift_evaluations,
        "wasted_evaluations": record.wasted_evaluations,
        "joined_calls": record.joined_calls,
        "calls_saved": record.calls_saved,
        "seconds": record.seconds,
        "startup_seconds": record.startup_seconds,
        **figures_of(record.drifts),
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
    scene: Scene,
    path: Path,
    picture: Path,
    task: Task,
    view: View,
    size: int,
    psnr: float | None,
    stage: str = "",
) -> None:
    """Writes six views around the scene, and below them the true ones where they are known.

    Of a run from a picture: the picture on top, and the first view from where it was taken.

    Args:
        scene: What is seen.
        path: The PNG to write.
        picture: The prepared picture, of a task that has one.
        task: What was asked for.
        view: Where the object is seen from.
        size: Pixels along an edge of a view.
        psnr: From the comparison with the true views, dB; None: there was none.
        stage: Name of the stage, for the title.
    """
    elevation, azimuth = task.sheet_view
    cameras = orbit_cameras(elevation, azimuth + torch.arange(6) * 60.0, *view)
    reference, rows = task.reference(picture, *view), []
    if reference is not None:
        rows = [("picture", reference.at(size)[0][None])]
    (render,) = render_in_parts(scene, cameras, size, normals=True, at_once=6)
    rows += zip(("colour", "normals", "opacity"), rows_of(render), strict=True)
    title, yardstick = f"{task.title}, {stage}" if stage else task.title, task.yardstick
    if yardstick is not None and psnr is not None:
        rows.append(("true views", yardstick.views(cameras, size)))
        title = f"{title}  (PSNR {psnr:.1f} dB)"
    save_contact_sheet(rows, title, path, scale=2)
