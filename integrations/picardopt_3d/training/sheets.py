"""Pictures of a training: the loss curve and the sheet of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

from picardopt_3d.cameras import Cameras, orbit_cameras


def sheet_cameras() -> Cameras:
    """Returns the six cameras of a sample sheet's columns."""
    return orbit_cameras(
        torch.tensor([15.0, 15.0, 15.0, 40.0, 40.0, 0.0]), torch.arange(6) * 60.0, 1.65, 42.5
    )


def save_sheet(rows: Sequence[Tensor], path: Path) -> None:
    """Writes rows of views as one picture.

    Args:
        rows: For each row a batch of RGB views in [0, 1], `[columns, 3, height, width]`.
        path: The PNG to write.
    """
    sheet = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    pixels = (sheet * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels)
    grow = 2 if image.width < 300 else 1
    size = (grow * image.width, grow * image.height)
    # With a palette, to keep files small: the sheets are part of the package.
    image.resize(size, Image.Resampling.NEAREST).quantize(128).save(path, optimize=True)


def save_loss_curve(losses: Sequence[float], batch: int, path: Path) -> None:
    """Plots the loss, averaged over about 200 intervals of steps, against the number of images."""
    window = max(1, len(losses) // 200)
    starts = range(0, len(losses), window)
    means = [sum(part) / len(part) for part in (losses[i : i + window] for i in starts)]
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.semilogy([(index + 0.5) * window * batch for index in range(len(means))], means)
    axes.set(xlabel="images", ylabel="loss")
    figure.tight_layout()
    figure.savefig(path, dpi=60)
    plt.close(figure)
