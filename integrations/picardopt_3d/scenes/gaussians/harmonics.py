"""Colours that depend on the direction: spherical harmonics, as 3D Gaussian Splatting orders and signs them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from picardopt_3d.scenes.gaussians.splats import SH_C0

MOST_DEGREE = 3
"""The largest degree that is implemented; files of 3D Gaussians hold no more."""

_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
_C3 = (
    0.5900435899266435,
    2.890611442640554,
    0.4570457994644658,
    0.3731763325901154,
    1.445305721320277,
)


def count_higher(degree: int) -> int:
    """Returns how many harmonics there are above the constant one."""
    return (degree + 1) ** 2 - 1


def harmonic_basis(directions: Tensor, degree: int) -> Tensor:
    """Returns the real spherical harmonics above the constant one.

    Args:
        directions: Unit vectors. [..., 3]
        degree: The largest degree, 0 to 3.

    Returns:
        Their values. [..., (degree + 1) ** 2 - 1]
    """
    x, y, z = directions.unbind(-1)
    values: list[Tensor] = []
    if degree >= 1:
        values += [-_C1 * y, _C1 * z, -_C1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        values += [
            _C2[0] * x * y,
            -_C2[0] * y * z,
            _C2[1] * (2 * zz - xx - yy),
            -_C2[0] * x * z,
            _C2[2] * (xx - yy),
        ]
    if degree >= 3:
        values += [
            -_C3[0] * y * (3 * xx - yy),
            _C3[1] * x * y * z,
            -_C3[2] * y * (4 * zz - xx - yy),
            _C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            -_C3[2] * x * (4 * zz - xx - yy),
            _C3[4] * z * (xx - yy),
            -_C3[0] * x * (xx - 3 * yy),
        ]
    if not values:
        return directions.new_zeros((*directions.shape[:-1], 0))
    return torch.stack(values, dim=-1)


def view_colours(colours: Tensor, harmonics: Tensor, offsets: Tensor, degree: int) -> Tensor:
    """Returns the colours of Gaussians seen from cameras, max(0, 0.5 + sum).

    Args:
        colours: Coefficients of the constant harmonic. [count, 3]
        harmonics: Coefficients of the higher ones; only those up to the degree are used. [count, rows, 3]
        offsets: Centres minus the positions of the cameras, world units. [views, count, 3]
        degree: The largest degree that is used, 0 to 3.

    Returns:
        RGB, at least 0. [views, count, 3]
    """
    total = 0.5 + SH_C0 * colours[None]
    if degree:
        basis = harmonic_basis(functional.normalize(offsets, dim=-1), degree)
        higher = harmonics[None, :, : count_higher(degree)]
        total = total + (basis[..., None] * higher).sum(-2)
    return total.clamp_min(0).expand(len(offsets), -1, -1)
