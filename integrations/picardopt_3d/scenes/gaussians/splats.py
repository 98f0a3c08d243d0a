"""The tensors of 3D Gaussians, as they are trained."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.cameras import Cameras

SH_C0 = 0.28209479177387814
"""The constant spherical harmonic: a colour is 0.5 + SH_C0 * coefficient (3D Gaussian Splatting)."""

_DIVERGED = "their optimization diverged; take another checkpoint, or run it again with a smaller learning rate"


class Splats(NamedTuple):
    """3D Gaussians (arXiv 2308.04079), in the parameters that are trained.

    Attributes:
        means: Centres, world units. [count, 3]
        log_scales: Logarithms of the standard deviations along the Gaussian's own axes. [count, 3]
        rotations: Quaternions w, x, y, z of any length but 0, which turn its own axes into the world's. [count, 4]
        opacity_logits: Opacities before the sigmoid. [count]
        colours: Coefficients of the constant spherical harmonic. [count, 3]
        harmonics: Coefficients of the higher harmonics, in the order of 3D Gaussian Splatting; no row for degree 0.
            [count, (degree + 1) ** 2 - 1, 3]
    """

    means: Tensor
    log_scales: Tensor
    rotations: Tensor
    opacity_logits: Tensor
    colours: Tensor
    harmonics: Tensor


def logit(opacity: float) -> float:
    """Returns the number whose sigmoid is an opacity, at least 0 and below 1; -inf for 0."""
    return math.log(opacity / (1 - opacity)) if opacity else -math.inf


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Returns the rotations of quaternions w, x, y, z of any length; that of 0 is the identity.

    Args:
        quaternions: Quaternions. [count, 4]

    Returns:
        Matrices. [count, 3, 3]
    """
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    xx, yy, zz, xy, xz, yz = x * x, y * y, z * z, x * y, x * z, y * z
    wx, wy, wz = w * x, w * y, w * z
    entries = [
        *(1 - 2 * (yy + zz), 2 * (xy - wz), 2 * (xz + wy)),
        *(2 * (xy + wz), 1 - 2 * (xx + zz), 2 * (yz - wx)),
        *(2 * (xz - wy), 2 * (yz + wx), 1 - 2 * (xx + yy)),
    ]
    return torch.stack(entries, dim=-1).view(-1, 3, 3)


def check_finite(splats: Splats, cameras: Cameras | None = None) -> None:
    """Checks that every number is finite, also those of cameras.

    Raises:
        ValueError: Some are not; the message says how many Gaussians or cameras have them, and where.
    """
    named = splats._asdict()
    if cameras is not None:
        named |= {"camera_to_world": cameras.camera_to_world, "fov": cameras.fov}
    # One number for all of them: the device is waited for once.
    total = torch.stack([tensor.detach().sum() for tensor in named.values()]).sum()
    if math.isfinite(total):
        return
    for name, tensor in named.items():  # finite numbers can have an infinite sum
        rows = tensor.detach().flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]
        bad = (~rows.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            which, hint = "cameras", "give other ones"
            if name in Splats._fields:
                which, hint = "Gaussians", _DIVERGED
            raise ValueError(
                f"{name}: {len(bad[:, 0].unique())} of {len(rows)} {which} hold values that are not finite, the first "
                f"is {float(rows[row, column])} in row {row}: {hint}"
            )
