"""The table of the CLIP model: how often it picks the right caption of the built-in world."""

from __future__ import annotations

import torch
from torch.nn import functional

from picardopt_3d.cameras import random_cameras
from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.training.data import WIDE_CAMERAS
from picardopt_3d.training.tables import EvaluationConfig, print_table, true_views
from picardopt_3d.world import all_subjects


def print_clip_table(config: EvaluationConfig) -> None:
    """Prints the R-precision of true views, and of blurred and noisy ones."""
    judge = ClipJudge(config.folder)
    rows = []
    for name, blur, noise in (("true views", 1, 0.0), ("blurred", 2, 0.0), ("noisy", 1, 0.1)):
        single, whole = r_precision(judge, config, blur, noise)
        rows.append((name, [100 * single, 100 * whole]))
    print_table(["R-precision over 64 captions", "single views", "all views together"], rows, "%")


def r_precision(
    judge: ClipJudge, config: EvaluationConfig, blur: int = 1, noise: float = 0.0
) -> tuple[float, float]:
    """Returns two shares: of single views, and of subjects by their views' mean similarity, matched to their captions.

    Args:
        judge: The judge, with the captions of all subjects.
        config: The subjects and views.
        blur: Number of pixels that are averaged along each axis.
        noise: Standard deviation of the noise on the pixels.
    """
    torch.manual_seed(config.seed)
    size, single, whole = 64, [], []
    chosen = list(enumerate(all_subjects()))[:: config.every]
    cameras = random_cameras(config.views, WIDE_CAMERAS)
    truth = true_views([subject for _, subject in chosen], cameras, size)
    for (index, _), views in zip(chosen, truth, strict=True):
        views = functional.interpolate(functional.avg_pool2d(views, blur), size, mode="bilinear")
        views = (views + noise * torch.randn(views.shape)).clamp(0, 1)
        found = judge.similarity(views)
        single.append((found.argmax(-1) == index).float().mean().item())
        whole.append(float(found.mean(0).argmax().item() == index))
    return sum(single) / len(single), sum(whole) / len(whole)
