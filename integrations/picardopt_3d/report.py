"""What is made of a finished scene: film, contact sheet, plot, report."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cameras import Cameras, random_cameras, turntable_cameras
from .config import TextTo3DConfig
from .domain import Subject, parse_prompt
from .domain import render as render_truth
from .export.files import write_json
from .export.pictures import rows_of, save_contact_sheet
from .export.plots import save_strides_plot
from .export.turntable import frames_of, save_film
from .scenes import RadianceField, Render, load_field
from .worker import SCENE_FILE, Trained

FILM_FRAMES = 120
HELD_OUT_VIEWS = 32
_HELD_OUT_SEED = 20_231_117


def finish(config: TextTo3DConfig, trained: Trained, started: float) -> dict[str, Any]:
    """Write everything but the scene, which the workers wrote; the report comes last.

    Returns:
        the content of `report.json`.
    """
    scene = load_field(config.out / SCENE_FILE)
    subject = parse_prompt(config.prompt)
    psnr = None if subject is None else psnr_against_truth(scene, subject, config.method.size)
    save_turntable(scene, config.out / "turntable.mp4")
    save_sheet(scene, config.prompt, subject, psnr, config.out / "contact_sheet.png")
    save_strides_plot(
        trained.strides,
        trained.residuals,
        trained.tolerances,
        int(trained.figures["window"]),
        config.out / "strides.png",
    )
    losses = [loss if math.isfinite(loss) else None for loss in trained.losses]
    report = trained.figures | {
        "total_seconds": time.time() - started,
        "psnr": psnr,
        "psnr_note": (
            f"mean over {HELD_OUT_VIEWS} held-out views at {config.method.size} pixels, dB"
            if subject is not None
            else "the prompt is not one of the built-in world's: no true views to compare with"
        ),
        "steps_per_sweep": trained.strides,
        "losses": losses,
    }
    write_json(config.out / "report.json", report)
    return report


def held_out_cameras(count: int = HELD_OUT_VIEWS) -> Cameras:
    """Cameras of the training distribution, always the same ones, drawn apart from any run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HELD_OUT_SEED)
        return random_cameras(count)


def psnr_against_truth(scene: RadianceField, subject: Subject, size: int) -> float:
    """Mean peak signal-to-noise ratio over the held-out views, in dB."""
    cameras = held_out_cameras()
    with torch.no_grad():
        seen = scene.render(*cameras.rays(size, size)).rgb.clamp(0.0, 1.0)
    return psnr(seen, render_truth(subject, cameras, size, size)[0])


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean over the batch of -10 log10(mean squared error), dB; both [batch, 3, height, width]."""
    error = (images - truth).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10.0 * error.log10()).mean())


def render_in_parts(
    scene: RadianceField, cameras: Cameras, size: int, part: int = 4
) -> list[Render]:
    """Render many views with normals, a few at a time, for memory's sake."""
    with torch.no_grad():
        return [
            scene.render(*cameras[i : i + part].rays(size, size), normals=True)
            for i in range(0, len(cameras), part)
        ]


def save_turntable(scene: RadianceField, path: Path, size: int = 96) -> None:
    """A film of one turn: colour beside normals, 120 frames at 30 a second."""
    renders = render_in_parts(scene, turntable_cameras(FILM_FRAMES), size)
    save_film((frame for render in renders for frame in frames_of(render, scale=3)), path)


def save_sheet(
    scene: RadianceField,
    prompt: str,
    subject: Subject | None,
    psnr_value: float | None,
    path: Path,
    size: int = 96,
) -> None:
    """Six views around the scene, and the true ones below them where they are known."""
    cameras = turntable_cameras(6, elevation=20.0)
    with torch.no_grad():
        render = scene.render(*cameras.rays(size, size), normals=True)
    rows = list(zip(("colour", "normals", "opacity"), rows_of(render), strict=True))
    title = prompt
    if subject is not None and psnr_value is not None:
        rows.append(("true views", render_truth(subject, cameras, size, size)[0]))
        title = f"{prompt}  (PSNR {psnr_value:.1f} dB)"
    save_contact_sheet(rows, title, path, scale=2)
