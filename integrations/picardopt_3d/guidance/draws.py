"""What a guidance draws in a step, all from torch's global CPU generator, and its checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras


def draw_noise(
    shape: Sequence[int], device: torch.device, timestep_range: tuple[float, float], count: int
) -> tuple[Tensor, Tensor]:
    """Draws a noise level for each view and then the noise, on the CPU so that all devices get the same.

    Args:
        shape: Of the views in the model's space, `[batch, channels, height, width]`.
        device: Device of the result.
        timestep_range: Smallest and largest noise level, as fractions of the schedule.
        count: Number of noise levels in the schedule.

    Returns:
        Timesteps, `[batch]`, and noise, float32, `[batch, channels, height, width]`.
    """
    timesteps = draw_timesteps(shape[0], timestep_range, count)
    return timesteps.to(device), draw_normal(shape, device)


def draw_normal(shape: Sequence[int], device: torch.device) -> Tensor:
    """Draws normal noise, float32, on the CPU so that all devices get the same."""
    return torch.randn(*shape, dtype=torch.float32).to(device)


def draw_timesteps(batch: int, timestep_range: tuple[float, float], count: int) -> Tensor:
    """Draws uniform integer noise levels from torch's global CPU generator.

    Args:
        batch: Number of noise levels to draw.
        timestep_range: Smallest and largest noise level, inclusive, as fractions of the schedule.
        count: Number of noise levels in the schedule.

    Returns:
        Timesteps between 0 and count - 1, `[batch]`.

    Raises:
        ValueError: The range is empty or outside [0, 1].
    """
    check_range(timestep_range)
    low = min(count - 1, round(timestep_range[0] * count))
    high = min(count - 1, round(timestep_range[1] * count))
    return torch.randint(low, high + 1, (batch,))


def check_range(timestep_range: tuple[float, float]) -> None:
    """Checks a range of noise levels.

    Raises:
        ValueError: The range is empty or outside [0, 1].
    """
    if not 0 <= timestep_range[0] <= timestep_range[1] <= 1:
        raise ValueError(
            f"timestep_range={timestep_range!r}: give (low, high) with 0 <= low <= high <= 1"
        )


def check_views(views: Tensor, cameras: Cameras) -> None:
    """Checks that there is one view per camera.

    Raises:
        ValueError: The shapes disagree.
    """
    if views.ndim != 4 or views.shape[1] != 3 or len(cameras) != len(views):
        raise ValueError(
            f"views of shape {tuple(views.shape)} for {len(cameras)} cameras: give "
            f"[{len(cameras)}, 3, height, width], one view per camera"
        )
