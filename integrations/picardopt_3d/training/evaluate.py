"""How well a text-to-view model denoises true views: the table of its model card.

python -m picardopt_3d.training.evaluate [--folder FOLDER]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from picardopt_3d.cameras import random_cameras
from picardopt_3d.domain import all_subjects, render
from picardopt_3d.guidance.pixel_diffusion import SHIPPED, PixelDiffusion
from picardopt_3d.guidance.protocol import ScoreModel


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated.

    Attributes:
        folder: The pipeline folder.
        levels: Noise levels, as timesteps.
        every: Every n-th subject of the built-in world.
        views: Random cameras, the same for all subjects.
        seed: Of the cameras and the noise.
    """

    folder: Path = SHIPPED
    levels: tuple[int, ...] = (100, 300, 500, 700, 850, 950)
    every: int = 5
    views: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Denoising:
    """PSNR of denoised views at one noise level, dB.

    Attributes:
        right: With the caption and the view's own camera.
        no_caption: Without the caption.
        wrong_camera: With another view's camera.
    """

    right: float
    no_caption: float
    wrong_camera: float


def denoising(score: ScoreModel, level: int, config: EvaluationConfig) -> Denoising:
    """Denoise true views from one noise level.

    Args:
        score: The model.
        level: The timestep.
        config: Which views.
    """
    torch.manual_seed(config.seed)
    cameras = random_cameras(config.views)
    turned = cameras[torch.arange(config.views).roll(config.views // 2)]
    timesteps = torch.full((config.views,), level)
    abar = score.alphas_cumprod[level]
    errors: list[Tensor] = []
    for subject in all_subjects()[:: config.every]:
        clean = 2 * render(subject, cameras, score.size, score.size)[0] - 1
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * torch.randn(clean.shape)
        prompt = score.encode(subject.caption)
        right = score.predict_noise(noisy, timesteps, prompt, cameras)
        wrong = score.predict_noise(noisy, timesteps, prompt, turned)
        guesses = torch.stack([right.conditional, right.unconditional, wrong.conditional])
        denoised = (noisy - (1 - abar).sqrt() * guesses) / abar.sqrt()
        errors.append(((denoised - clean) / 2).square().mean(dim=(1, 2, 3, 4)))
    return Denoising(*(-10 * torch.stack(errors).mean(0).log10()).tolist())


def main(config: EvaluationConfig) -> None:
    """Print the table."""
    score = PixelDiffusion.from_pretrained(config.folder)
    print("| noise level (abar) | right | no caption | wrong camera |\n| --- | --- | --- | --- |")
    for level in config.levels:
        found = denoising(score, level, config)
        values = (found.right, found.no_caption, found.wrong_camera)
        cells = " | ".join(f"{value:.1f} dB" for value in values)
        print(f"| {level} ({score.alphas_cumprod[level].item():.3f}) | {cells} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(EvaluationConfig, description=__doc__))
