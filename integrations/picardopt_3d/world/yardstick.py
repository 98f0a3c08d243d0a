"""How near a scene comes to the true views of an object of the built-in world: PSNR and SSIM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras, random_cameras
from picardopt_3d.rendering import render_rgb
from picardopt_3d.scenes import Scene
from picardopt_3d.world.subjects import Subject
from picardopt_3d.world.views import true_views

HELD_OUT_VIEWS = 32
"""Views that a finished run is compared at."""

SMALLEST_SSIM = 11
"""Pixels of the window that SSIM compares: smaller pictures have none."""

_HELD_OUT_SEED = 20_231_117


@dataclass(frozen=True)
class Yardstick:
    """An object whose true views are known.

    Attributes:
        subject: Which one.
    """

    subject: Subject

    @property
    def caption(self) -> str:
        """The object's canonical caption, such as "a red cube"."""
        return self.subject.caption

    def views(self, cameras: Cameras, size: int) -> Tensor:
        """Renders the true views. [views, 3, size, size]."""
        return true_views(self.subject, cameras, size)

    def compare(self, views: Tensor, cameras: Cameras) -> tuple[float, float | None]:
        """Compares views with the true ones.

        Args:
            views: RGB in [0, 1]. [views, 3, size, size]
            cameras: Where they were taken from.

        Returns:
            PSNR in dB, and SSIM (None of pictures that are too small for it).
        """
        truth = self.views(cameras, views.shape[-1])
        return psnr(views, truth), ssim(views, truth)

    def psnr(self, scene: Scene, size: int) -> float:
        """Returns a scene's mean PSNR over the held-out views, in dB."""
        return psnr_against_truth(scene, self.subject, size)

    def figures(self, scene: Scene, size: int) -> dict[str, Any]:
        """Returns what a run's report says of the comparison."""
        return {
            "subject": self.caption,
            "psnr": self.psnr(scene, size),
            "psnr_note": f"mean over {HELD_OUT_VIEWS} held-out views at {size} pixels, dB",
        }


def held_out_cameras(count: int = HELD_OUT_VIEWS) -> Cameras:
    """Returns cameras of the training distribution: always the same ones, drawn apart from any run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HELD_OUT_SEED)
        return random_cameras(count)


def psnr_against_truth(scene: Scene, subject: Subject, size: int) -> float:
    """Returns the mean peak signal-to-noise ratio over the held-out views, in dB."""
    cameras = held_out_cameras()
    return psnr(render_rgb(scene, cameras, size), true_views(subject, cameras, size))


def psnr(images: Tensor, truth: Tensor) -> float:
    """Returns the mean over the pictures of -10 log10(mean squared error), in dB.

    Args:
        images: In [0, 1]. [views, 3, height, width]
        truth: Likewise.
    """
    error = (images - truth).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10.0 * error.log10()).mean())


def ssim(images: Tensor, truth: Tensor) -> float | None:
    """Returns the mean structural similarity, in the setting of Wang et al. (2004): a Gaussian window of sd 1.5.

    Args:
        images: In [0, 1]. [views, 3, height, width]
        truth: Likewise.

    Returns:
        At most 1, which equal pictures have; None for pictures smaller than the window.
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
