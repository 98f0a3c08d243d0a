"""What every worker of a text-to-3D run does: optimise the scene through picardopt."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from picardopt import (
    AdaptiveTolerance,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
    step_rng,
)

from .cameras import turntable_cameras
from .config import TextTo3DConfig
from .domain import COLOURS, Subject, parse_prompt
from .export.files import replacing
from .export.pictures import rows_of, save_png, tile
from .guidance import ExactScore, RenderedSubjects, ScoreDistillation, ScoreModel
from .methods.dreamfusion import DreamFusion
from .scenes import RadianceField, save_field

SCENE_FILE = "scene.safetensors"


@dataclass(frozen=True)
class Trained:
    """What a finished optimisation tells, beside the scene file.

    Args:
        figures: entries of the report.
        strides: steps made final, one number a sweep.
        residuals: squared distance per parameter of every slot of every sweep.
        tolerances: the thresholds they were held against.
        losses: loss of every step.
    """

    figures: dict[str, Any]
    strides: list[int]
    residuals: list[list[float]]
    tolerances: list[list[float]]
    losses: list[float]


def train(config: TextTo3DConfig, started: float) -> Trained:
    """Optimise the scene; every worker runs this, rank 0 shows progress and writes the files.

    Args:
        config: the run's options.
        started: `time.time()` when the command began.
    """
    torch.set_num_threads(config.threads)
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(_device_name(config))
    guidance = make_guidance(config, device)
    method = DreamFusion(config.method, guidance, config.prompt, config.steps, device)
    base = method.optimizer()
    optimizer = None if config.sequential else _wrap(base, config)

    losses: list[float] = []
    begin = time.time()
    progress = tqdm(total=config.steps, desc=config.prompt, unit="step", disable=rank != 0)
    with progress:
        for step in range(config.steps):
            if optimizer is None:
                loss = sequential_step(base, method.loss, config.seed, step)
            else:
                loss = optimizer.step(picard_closure(base, method.loss))
            losses.append(float(loss))
            progress.update()
            if rank == 0:
                _show(progress, losses, optimizer)
                if config.picture_every and (step + 1) % config.picture_every == 0:
                    picture = config.out / "progress" / f"step_{step + 1:05d}.png"
                    save_progress_picture(method.scene, picture)
    seconds = time.time() - begin
    if rank == 0:
        with replacing(config.out / SCENE_FILE) as temporary:
            save_field(method.scene, temporary)
    figures = _figures(config, optimizer, workers, device)
    figures |= {"seconds": seconds, "startup_seconds": begin - started}
    stats = optimizer.stats if optimizer is not None else None
    return Trained(
        figures=figures,
        strides=stats.strides if stats else [1] * config.steps,
        residuals=stats.residuals if stats else [],
        tolerances=stats.tolerances if stats else [],
        losses=losses,
    )


def sequential_step(
    base: torch.optim.Optimizer, loss_of: Callable[[int], Tensor], seed: int, step: int
) -> Tensor:
    """One step of the sequential run, which a Picard run at tolerance 0 equals bitwise."""
    with step_rng(seed, step):
        loss = picard_closure(base, loss_of)(step)
        base.step()
    return loss.detach()


def picard_closure(
    base: torch.optim.Optimizer, loss_of: Callable[[int], Tensor]
) -> Callable[[int], Tensor]:
    """The drift of a step: gradients of its loss."""

    def closure(step: int) -> Tensor:
        base.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        return loss

    return closure


def make_guidance(config: TextTo3DConfig, device: torch.device) -> ScoreDistillation:
    """Score distillation over the score model that the options name."""
    score: ScoreModel
    if config.guidance == "exact":
        subject = parse_prompt(config.prompt)
        if subject is None:
            raise ValueError(f"prompt={config.prompt!r} is not one that the exact guidance knows")
        # The prompt's shape in every colour, so that there is something to be guided away from.
        known = [Subject(subject.shape, colour) for colour in COLOURS]
        score = ExactScore(RenderedSubjects(known, config.method.size))
    else:
        # Here, not above: diffusers takes seconds to import, and the exact score needs none of it.
        from .guidance.pixel_diffusion import PixelDiffusion

        score = PixelDiffusion.from_pretrained(device=device)
    return ScoreDistillation(score, config.method.sds)


def save_progress_picture(scene: RadianceField, path: Path, size: int = 64) -> None:
    """Four views around the scene: colour, normals and opacity, a row each."""
    cameras = turntable_cameras(4).to(scene.blob.device)
    with torch.no_grad():
        render = scene.render(*cameras.rays(size, size), normals=True)
    save_png(tile(rows_of(render), scale=2), path)


def _wrap(base: torch.optim.Optimizer, config: TextTo3DConfig) -> ParallelPicardOptimizer:
    """The one changed line of the training loop, with what the options say of it."""
    options: dict[str, Any] = {"total_steps": config.steps, "seed": config.seed}
    if config.window is not None:
        options["window"] = config.window
    if config.predictor is not None:
        options["predictor"] = config.predictor
    if config.tolerance == "adaptive":
        options["tolerance"] = AdaptiveTolerance()
    elif config.tolerance == "step-relative":
        options["tolerance"] = StepRelativeTolerance()
    elif config.tolerance is not None:
        options["tolerance"] = config.tolerance
    return ParallelPicardOptimizer(base, **options)


def _show(progress: Any, losses: list[float], optimizer: ParallelPicardOptimizer | None) -> None:
    """Put the mean of the last losses, the last stride and the steps per sweep behind the bar."""
    recent = losses[-20:]
    shown = {"loss": f"{sum(recent) / len(recent):.3g}"}
    if optimizer is not None and optimizer.stats.strides:
        shown["stride"] = str(optimizer.stats.strides[-1])
        shown["steps/sweep"] = f"{optimizer.stats.mean_stride:.2f}"
    progress.set_postfix(shown, refresh=False)


def _figures(
    config: TextTo3DConfig,
    optimizer: ParallelPicardOptimizer | None,
    workers: int,
    device: torch.device,
) -> dict[str, Any]:
    """The report's entries about the optimisation, but for its times."""
    figures: dict[str, Any] = {
        "prompt": config.prompt,
        "seed": config.seed,
        "guidance": config.guidance,
        "sequential": config.sequential,
        "workers": workers,
        "threads_per_worker": torch.get_num_threads(),
        "device": str(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": str(torch.__version__),
        "steps": config.steps,
    }
    if optimizer is None:
        return figures | {
            "window": 1,
            "tolerance": None,
            "predictor": None,
            "sweeps": config.steps,
            "mean_stride": 1.0,
            "drift_evaluations": config.steps,
            "wasted_evaluations": 0,
        }
    stats = optimizer.stats
    return figures | {
        "window": optimizer.window,
        "tolerance": repr(optimizer.tolerance),
        "predictor": config.predictor or "default",
        "sweeps": stats.sweeps,
        "mean_stride": stats.mean_stride,
        "drift_evaluations": stats.drift_evaluations,
        "wasted_evaluations": stats.wasted_evaluations,
        "phase_seconds": dict(stats.seconds),
    }


def _device_name(config: TextTo3DConfig) -> str:
    """This worker's device."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no CUDA device here; use --device auto or cpu")
    return f"cuda:{torch.cuda.current_device()}"
