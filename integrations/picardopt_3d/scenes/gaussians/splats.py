"""The tensors of 3D Gaussians, as they are trained."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

SH_C0 = 0.28209479177387814
"""The constant spherical harmonic: a colour is 0.5 + SH_C0 * coefficient (3D Gaussian Splatting)."""


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


def check_finite(splats: Splats) -> None:
    """Checks that every number is finite.

    Raises:
        ValueError: Some are not; the message says how many Gaussians have them, and where.
    """
    for name, tensor in splats._asdict().items():
        bad = ~tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else ~tensor.isfinite()
        if bad.any():
            raise ValueError(
                f"{name}: {int(bad.sum())} of {len(bad)} Gaussians hold values that are not finite: their "
                f"optimization diverged; take another checkpoint, or run it again with a smaller learning rate"
            )
