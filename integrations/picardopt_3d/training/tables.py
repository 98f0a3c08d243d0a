"""The options, views and printing that the evaluations of all shipped models share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.guidance.pixel_diffusion import SHIPPED
from picardopt_3d.training.data import trained_subjects
from picardopt_3d.world import COLOURS, Subject, colourize, held_out_subjects, render_shading


@dataclass(frozen=True)
class EvaluationConfig:
    """Options of an evaluation.

    Attributes:
        folder: Folder of the model.
        levels: Noise levels, as timesteps.
        every: Evaluate every n-th subject of the built-in world.
        views: Number of random cameras, the same for all subjects.
        sample_steps: Denoising steps of samples.
        scales: Strengths of classifier-free guidance of samples.
        seed: Seed of the cameras and the noise.
        device: Device of the model.
    """

    folder: Path = SHIPPED
    levels: tuple[int, ...] = (100, 300, 500, 700, 850, 950)
    every: int = 5
    views: int = 8
    sample_steps: int = 50
    scales: tuple[float, ...] = (1.0, 3.0)
    seed: int = 0
    device: str = "cpu"


def true_views(subjects: Sequence[Subject], cameras: Cameras, size: int) -> Tensor:
    """Renders true views, RGB in [0, 1], `[subjects, cameras, 3, size, size]`; each shape is rendered once."""
    shaded = {
        shape: render_shading(shape, cameras, size, size)
        for shape in dict.fromkeys(subject.shape for subject in subjects)
    }
    return torch.stack(
        [
            colourize(shaded[subject.shape], torch.tensor(COLOURS[subject.colour]))
            for subject in subjects
        ]
    )


def groups(config: EvaluationConfig) -> dict[str, Sequence[Subject]]:
    """Returns the subjects for text models, by name: those that they were trained on, and the held-out ones."""
    return {"trained": trained_subjects()[:: config.every], "held out": held_out_subjects()}


def print_table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], unit: str = "dB"
) -> None:
    """Prints figures as a Markdown table."""
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, values in rows:
        print("| " + " | ".join([name, *(f"{value:.1f} {unit}" for value in values)]) + " |")
    print(flush=True)
