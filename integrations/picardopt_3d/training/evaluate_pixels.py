"""The tables of the text-to-view model: PSNR of denoised views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt_3d.cameras import random_cameras
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.guidance.protocol import ScoreModel
from picardopt_3d.training.data import WIDE_CAMERAS
from picardopt_3d.training.tables import EvaluationConfig, groups, print_table, true_views
from picardopt_3d.world import Subject, all_subjects


@dataclass(frozen=True)
class Denoising:
    """PSNRs of denoised views at one noise level, dB.

    Attributes:
        right: PSNR with the caption and the view's own camera.
        no_caption: PSNR without the caption.
        wrong_camera: PSNR with another view's camera.
    """

    right: float
    no_caption: float
    wrong_camera: float


def denoising(
    score: ScoreModel,
    level: int,
    config: EvaluationConfig,
    subjects: Sequence[Subject] | None = None,
) -> Denoising:
    """Denoises true views from one noise level.

    Args:
        score: The model.
        level: The noise level, as a timestep.
        config: The views.
        subjects: The subjects of the views; by default every n-th of all subjects.
    """
    torch.manual_seed(config.seed)
    cameras = random_cameras(config.views, WIDE_CAMERAS)
    turned = cameras[torch.arange(config.views).roll(config.views // 2)]
    timesteps = torch.full((config.views,), level)
    abar = score.alphas_cumprod[level]
    errors: list[Tensor] = []
    chosen = all_subjects()[:: config.every] if subjects is None else subjects
    views = true_views(chosen, cameras, score.size)
    for subject, clean in zip(chosen, 2 * views - 1, strict=True):
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * torch.randn(clean.shape)
        prompt = score.encode(subject.caption)
        right = score.predict_noise(noisy, timesteps, prompt, cameras)
        wrong = score.predict_noise(noisy, timesteps, prompt, turned)
        guesses = torch.stack([right.conditional, right.unconditional, wrong.conditional])
        denoised = (noisy - (1 - abar).sqrt() * guesses) / abar.sqrt()
        errors.append(((denoised - clean) / 2).square().mean(dim=(1, 2, 3, 4)))
    return Denoising(*(-10 * torch.stack(errors).mean(0).log10()).tolist())


def print_pixel_tables(config: EvaluationConfig) -> None:
    """Prints the PSNR of denoised views by noise level, for subjects that the model was trained on and for others."""
    score = PixelDiffusion.from_pretrained(config.folder)
    for name, subjects in groups(config).items():
        rows = []
        for level in config.levels:
            found = denoising(score, level, config, subjects)
            values = [found.right, found.no_caption, found.wrong_camera]
            rows.append((f"{level} ({score.alphas_cumprod[level].item():.3f})", values))
        heads = [f"noise level (abar), {name} subjects", "right", "no caption", "wrong camera"]
        print_table(heads, rows)
