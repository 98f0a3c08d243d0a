"""What is made of a finished scene: film, contact sheet, plot, report."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from .cameras import Cameras, orbit_cameras, random_cameras, turntable_cameras
from .config import ImageTo3DConfig, RunConfig, TextTo3DConfig
from .domain import Subject, parse_prompt
from .domain import render as render_truth
from .evaluate.pictures import psnr, render_views
from .evaluate.runs import open_scene
from .export.files import write_json
from .export.pictures import rows_of, save_contact_sheet
from .export.plots import save_strides_plot
from .export.turntable import frames_of, save_film
from .record import Trained
from .scenes import Render, Scene
from .worker import CHECKPOINT_FILE, SCENE_FILE, middle_view, reference_of

FILM_FRAMES = 120
HELD_OUT_VIEWS = 32
REPORT_FILE = "report.json"
_HELD_OUT_SEED = 20_231_117


def finish(config: RunConfig[Any], started: float) -> dict[str, Any]:
    """Write everything but the scene and the checkpoint, which the workers wrote; the report comes last.

    Returns:
        the content of `report.json`.
    """
    trained = Trained.from_checkpoint(config.out / CHECKPOINT_FILE)
    scene = open_scene(config.out / SCENE_FILE, config.device)
    subject = subject_of(config)
    size = config.recipe.final_pixels
    found = None if subject is None else psnr_against_truth(scene, subject, size)
    view, shown = middle_view(config), min(max(size, 96), 256) // 16 * 16
    save_turntable(scene, config.out / "turntable.mp4", view, shown)
    save_sheet(scene, config, subject, found, config.out / "contact_sheet.png", view, shown)
    save_strides_plot(
        trained.strides,
        trained.residuals,
        trained.tolerances,
        int(trained.figures["window"]),
        config.out / "strides.png",
    )
    report = trained.figures | {
        "prompt": _prompt(config, subject),
        "subject": None if subject is None else subject.caption,
        "view": view,
        "steps_done": trained.step,
        "sweeps": len(trained.strides),
        "mean_stride": trained.mean_stride,
        "drift_evaluations": trained.drift_evaluations,
        "wasted_evaluations": trained.wasted_evaluations,
        "seconds": trained.seconds,
        "startup_seconds": trained.startup_seconds,
        "phase_seconds": trained.phase_seconds,
        "total_seconds": time.time() - started,
        "psnr": found,
        "psnr_note": (
            f"mean over {HELD_OUT_VIEWS} held-out views at {size} pixels, dB"
            if subject is not None
            else "nothing of the built-in world was asked for: no true views to compare with"
        ),
        "steps_per_sweep": trained.strides,
        "losses": [loss if math.isfinite(loss) else None for loss in trained.losses],
    }
    write_json(config.out / REPORT_FILE, report)
    return report


def subject_of(config: RunConfig[Any]) -> Subject | None:
    """The built-in world's subject that a run is about, if it is about one."""
    if isinstance(config, TextTo3DConfig):
        return parse_prompt(config.prompt)
    if isinstance(config, ImageTo3DConfig) and config.subject is not None:
        return parse_prompt(config.subject)
    return None


def _prompt(config: RunConfig[Any], subject: Subject | None) -> str | None:
    """The text that pictures of the result can be held against."""
    if isinstance(config, TextTo3DConfig):
        return config.prompt
    return None if subject is None else subject.caption


def held_out_cameras(count: int = HELD_OUT_VIEWS) -> Cameras:
    """Cameras of the training distribution, always the same ones, drawn apart from any run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HELD_OUT_SEED)
        return random_cameras(count)


def psnr_against_truth(scene: Scene, subject: Subject, size: int) -> float:
    """Mean peak signal-to-noise ratio over the held-out views, in dB."""
    cameras = held_out_cameras()
    truth = render_truth(subject, cameras, size, size)[0]
    return psnr(render_views(scene, cameras, size), truth)


def render_in_parts(scene: Scene, cameras: Cameras, size: int, part: int = 4) -> list[Render]:
    """Render many views with normals, a few at a time, for memory's sake."""
    with torch.no_grad():
        return [
            scene.render(cameras[i : i + part].to(scene.device), size, normals=True)
            for i in range(0, len(cameras), part)
        ]


def save_turntable(
    scene: Scene, path: Path, view: tuple[float, float] | None = None, size: int = 96
) -> None:
    """A film of one turn: colour beside normals, 120 frames at 30 a second.

    Args:
        scene: what turns.
        path: the mp4 to write.
        view: distance of the camera and its field of view, degrees; None: the usual ones.
        size: pixels along an edge of a view, which is enlarged to three times that.
    """
    seen = {} if view is None else {"distance": view[0], "fov": view[1]}
    renders = render_in_parts(scene, turntable_cameras(FILM_FRAMES, **seen), size)
    save_film((frame for render in renders for frame in frames_of(render, scale=3)), path)


def save_sheet(
    scene: Scene,
    config: RunConfig[Any],
    subject: Subject | None,
    psnr_value: float | None,
    path: Path,
    view: tuple[float, float],
    size: int = 96,
) -> None:
    """Six views around the scene, and the true ones below them where they are known.

    Of a run from a picture: the picture on top, and the first view from where it was taken.
    """
    elevation, azimuth, rows = 20.0, 0.0, []
    if isinstance(config, ImageTo3DConfig):
        elevation, azimuth = config.elevation, config.azimuth
        rows = [("picture", reference_of(config).at(size)[0][None])]
    cameras = orbit_cameras(elevation, azimuth + torch.arange(6) * 60.0, *view)
    (render,) = render_in_parts(scene, cameras, size, part=6)
    rows += zip(("colour", "normals", "opacity"), rows_of(render), strict=True)
    title = config.title
    if subject is not None and psnr_value is not None:
        rows.append(("true views", render_truth(subject, cameras, size, size)[0]))
        title = f"{title}  (PSNR {psnr_value:.1f} dB)"
    save_contact_sheet(rows, title, path, scale=2)
