"""The shapes of the built-in world, as signed distance functions within a sphere of radius 0.5, z up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _box(
    points: Tensor, centre: tuple[float, float, float], half: tuple[float, float, float]
) -> Tensor:
    away = (points - points.new_tensor(centre)).abs() - points.new_tensor(half)
    distance: Tensor = away.clamp(min=0).norm(dim=-1) + away.amax(dim=-1).clamp(max=0)
    return distance


def _ball(points: Tensor, centre: tuple[float, float, float], radius: float) -> Tensor:
    distance: Tensor = (points - points.new_tensor(centre)).norm(dim=-1) - radius
    return distance


def _tube(points: Tensor, radius: float, low: float, high: float) -> Tensor:
    """An upright solid cylinder between two heights."""
    sideways = points[..., :2].norm(dim=-1) - radius
    upward = (points[..., 2] - (low + high) / 2).abs() - (high - low) / 2
    away = torch.stack([sideways, upward], dim=-1)
    distance: Tensor = away.clamp(min=0).norm(dim=-1) + away.amax(dim=-1).clamp(max=0)
    return distance


def _ring(points: Tensor, major: float, minor: float) -> Tensor:
    """A torus about the z axis."""
    sideways = points[..., :2].norm(dim=-1) - major
    return torch.hypot(sideways, points[..., 2]) - minor


def _sphere(points: Tensor) -> Tensor:
    return _ball(points, (0.0, 0.0, 0.0), 0.40)


def _cube(points: Tensor) -> Tensor:
    return _box(points, (0.0, 0.0, 0.0), (0.29, 0.29, 0.29))


def _cylinder(points: Tensor) -> Tensor:
    return _tube(points, 0.23, -0.42, 0.42)


def _cone(points: Tensor) -> Tensor:
    """Apex at z = 0.46, base of radius 0.34 at z = -0.34; the bound is exact on the surface and never too large."""
    radius, apex, base = 0.34, 0.46, -0.34
    slant = (radius**2 + (apex - base) ** 2) ** 0.5
    side = (points[..., :2].norm(dim=-1) * (apex - base) + (points[..., 2] - apex) * radius) / slant
    return torch.maximum(side, base - points[..., 2])


def _torus(points: Tensor) -> Tensor:
    return _ring(points, 0.34, 0.13)


def _chair(points: Tensor) -> Tensor:
    seat = _box(points, (0.0, 0.0, -0.06), (0.24, 0.24, 0.05))
    back = _box(points, (-0.20, 0.0, 0.17), (0.04, 0.24, 0.20))
    mirrored = torch.cat([points[..., :2].abs(), points[..., 2:]], dim=-1)  # four legs as one
    leg = _box(mirrored, (0.19, 0.19, -0.25), (0.05, 0.05, 0.15))
    return torch.minimum(torch.minimum(seat, back), leg)


def _mug(points: Tensor) -> Tensor:
    shifted = points + points.new_tensor((0.10, 0.0, 0.0))  # room for the handle, along +x
    body = torch.maximum(_tube(shifted, 0.27, -0.33, 0.33), -_tube(shifted, 0.21, -0.26, 0.40))
    upright = torch.stack([shifted[..., 0] - 0.28, shifted[..., 2], shifted[..., 1]], dim=-1)
    handle = torch.maximum(_ring(upright, 0.17, 0.055), 0.24 - shifted[..., :2].norm(dim=-1))
    return torch.minimum(body, handle)


def _snowman(points: Tensor) -> Tensor:
    body = torch.minimum(
        _ball(points, (0.0, 0.0, -0.20), 0.27), _ball(points, (0.0, 0.0, 0.18), 0.20)
    )
    nose_points = points - points.new_tensor((0.18, 0.0, 0.18))  # a carrot along +x
    along = nose_points[..., 0]
    side = (nose_points[..., 1:].norm(dim=-1) * 0.20 + (along - 0.20) * 0.07) / (
        0.20**2 + 0.07**2
    ) ** 0.5
    nose = torch.maximum(side, -along)
    hat = torch.minimum(_tube(points, 0.19, 0.32, 0.35), _tube(points, 0.11, 0.32, 0.47))
    return torch.minimum(torch.minimum(body, nose), hat)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "chair": _chair,
    "mug": _mug,
    "snowman": _snowman,
}
"""Signed distance (or a lower bound of it) of points [..., 3] to each shape."""
