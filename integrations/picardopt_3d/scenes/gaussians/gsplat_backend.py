"""Rasterizing with gsplat (arXiv 2409.06765), which needs CUDA.

Written against gsplat 1.5.3; it has not run on a GPU yet. gsplat sums gradients with atomic
operations: their last bits can differ between two runs.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.gaussians.projection import (
    BLUR,
    FAR,
    NEAR,
    axes,
    focal_lengths,
    world_to_camera,
)
from picardopt_3d.scenes.gaussians.splats import Splats


def installed() -> bool:
    """Returns whether there is a gsplat, whatever it can do."""
    return importlib.util.find_spec("gsplat") is not None


def why_not(device: torch.device) -> str | None:
    """Returns why gsplat cannot rasterize on a device; None: it can.

    Where gsplat's extension is not compiled yet, the first call compiles it, which takes minutes.

    Args:
        device: The device of the Gaussians.
    """
    if not installed():
        return "not installed: pip install gsplat"
    if device.type != "cuda":
        return f"gsplat needs CUDA, and this is {device.type}"
    return _trouble()


@cache
def _trouble() -> str | None:
    """Returns what is wrong with gsplat's extension; tried once, because each try may compile it for minutes."""
    try:
        from gsplat.cuda._backend import _C
    except Exception as error:  # whatever a compiler says
        does_not = "does not import" if isinstance(error, ImportError) else "does not build"
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return f"gsplat's CUDA extension {does_not}: {said}"
    return None if _C is not None else "gsplat found no CUDA toolkit to compile its extension"


def rasterize_gsplat(
    splats: Splats,
    opacities: Tensor,
    features: Tensor,
    cameras: Cameras,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projects and composites Gaussians with gsplat.

    Args:
        splats: The Gaussians, float32 on CUDA; at least one.
        opacities: Their opacities, 0 to 1. [count]
        features: What is composited. [views, count, channels]
        cameras: The cameras.
        height: Rows of pixels.
        width: Columns of pixels.

    Returns:
        Sums of the features times the Gaussians' weights [views, channels, height, width], sums of the weights
        [views, 1, height, width], centres on the screen, pixels (of those not seen: anything) [views, count, 2], and
        half the edges of the boxes in which they are drawn, pixels, 0: not seen [views, count, 2].
    """
    from gsplat import rasterization

    focal = focal_lengths(cameras, height)
    intrinsics = torch.zeros(len(cameras), 3, 3, dtype=focal.dtype, device=focal.device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = width / 2, height / 2, 1
    own = axes(splats)  # not gsplat's own: it makes NaN of a quaternion of length 0
    pictures, covered, about = rasterization(
        means=splats.means,
        quats=None,
        scales=None,
        covars=own @ own.mT,
        opacities=opacities,
        colors=features,
        viewmats=world_to_camera(cameras),
        Ks=intrinsics,
        width=width,
        height=height,
        near_plane=NEAR,
        far_plane=FAR,
        eps2d=BLUR,
        packed=False,
        render_mode="RGB",
    )
    to_channels = (0, 3, 1, 2)
    return (
        pictures.permute(to_channels),
        covered.permute(to_channels),
        about["means2d"],
        about["radii"].to(features.dtype),
    )
