"""The pictures that a scene is judged by, and how near they come to the true views."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cameras import Cameras
from ..domain import Subject
from ..domain import render as render_truth
from ..scenes import Scene

VIEWS_AT_ONCE = 16
"""Views that are rendered between two reports of progress."""

PIXELS_AT_ONCE = 1 << 16
"""Pixels of true views that are rendered in one call, to bound memory."""

SMALLEST_SSIM = 11
"""Pixels of the window that SSIM compares: smaller pictures have none."""


@torch.no_grad()
def render_views(
    scene: Scene,
    cameras: Cameras,
    size: int,
    background: tuple[float, float, float] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Views of a scene, some at a time.

    Args:
        scene: What to render.
        cameras: Where from.
        size: Pixels along each edge.
        background: Colour behind the object; None: the scene's own background.
        progress: Told how many views were rendered.

    Returns:
        RGB in [0, 1], on the CPU. [views, 3, size, size]
    """
    views = []
    for start in range(0, len(cameras), VIEWS_AT_ONCE):
        part = cameras[start : start + VIEWS_AT_ONCE].to(scene.device)
        behind = None
        if background is not None:
            behind = torch.tensor([background] * len(part), device=scene.device)
        views.append(scene.render(part, size, background=behind).rgb.clamp(0, 1).cpu())
        if progress is not None:
            progress(len(part))
    return torch.cat(views)


@torch.no_grad()
def true_views(subject: Subject, cameras: Cameras, size: int) -> Tensor:
    """True views of a subject of the built-in world, some at a time. [views, 3, size, size]."""
    together = max(1, PIXELS_AT_ONCE // size**2)
    parts = [cameras[start : start + together] for start in range(0, len(cameras), together)]
    return torch.cat([render_truth(subject, part, size, size)[0] for part in parts]).clamp(0, 1)


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean over the pictures of -10 log10(mean squared error), dB.

    Args:
        images: In [0, 1]. [views, 3, height, width]
        truth: The same.
    """
    error = (images - truth).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10.0 * error.log10()).mean())


def ssim(images: Tensor, truth: Tensor) -> float | None:
    """Mean structural similarity over the pictures, in Wang et al.'s setting (2004): a Gaussian window of sd 1.5.

    Args:
        images: In [0, 1]. [views, 3, height, width]
        truth: The same.

    Returns:
        At most 1, which equal pictures have; None for pictures smaller than its window.
    """
    if min(images.shape[-2:]) < SMALLEST_SSIM:
        return None
    # Here, not above: it takes a second to import.
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(
            one.double().numpy(),
            other.double().numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in zip(images, truth, strict=True)
    ]
    return float(sum(values) / len(values))
