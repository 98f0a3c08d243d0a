"""The Gaussians that a run starts with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.scenes.gaussians.config import GaussiansConfig
from picardopt_3d.scenes.gaussians.splats import SH_C0, Splats, logit
from picardopt_3d.scenes.scene import Surface

_NEIGHBOURS = 3
_AT_ONCE = 1024
_BISECTIONS = 20
_TRIES = 64


def in_ball(config: GaussiansConfig) -> Splats:
    """Returns grey Gaussians, uniform in a ball, drawn from torch's global CPU generator."""
    directions = F.normalize(torch.randn(config.count, 3), dim=1)
    means = config.radius * torch.rand(config.count, 1).pow(1 / 3) * directions
    return round_splats(config, means, torch.full_like(means, 0.5))


def on_surface(config: GaussiansConfig, surface: Surface) -> Splats:
    """Returns Gaussians on a surface, in its colours: where chords between random points inside and outside cross it.

    Raises:
        ValueError: No point lies inside the surface, or none outside.
    """
    inside, outside = _sides(surface, config.count)
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        within = (surface.level_set(middle) > 0)[:, None]
        inside, outside = torch.where(within, middle, inside), torch.where(within, outside, middle)
    return round_splats(config, inside, surface.colour(inside))


def _sides(surface: Surface, count: int) -> tuple[Tensor, Tensor]:
    """Returns random points inside and outside of a surface, each `[count, 3]`."""
    inside: list[Tensor] = []
    outside: list[Tensor] = []
    for _ in range(_TRIES):
        draws = 2 * torch.rand(max(count, 1 << 14), 3) - 1
        points = (1.1 * surface.radius * draws).to(surface.device)
        values = torch.where(points.norm(dim=1) < surface.radius, surface.level_set(points), -1.0)
        inside.append(points[values > 0])
        outside.append(points[values <= 0])
        if min(sum(map(len, inside)), sum(map(len, outside))) >= count:
            return torch.cat(inside)[:count], torch.cat(outside)[:count]
    raise ValueError(
        "the scene before has no surface to put Gaussians on, because hardly any point lies inside of it: train it for "
        "more steps"
    )


def round_splats(config: GaussiansConfig, means: Tensor, colours: Tensor) -> Splats:
    """Returns round Gaussians as large as the distance to their neighbours (3D Gaussian Splatting, section 5.1).

    Args:
        config: Opacity and degree.
        means: Centres, world units. [count, 3]
        colours: RGB in [0, 1]. [count, 3]
    """
    count = len(means)
    log_scales = spacing(means).log()[:, None].expand(-1, 3)
    rotations = means.new_tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(count, 1)
    return Splats(
        means,
        log_scales.contiguous(),
        rotations,
        means.new_full((count,), logit(config.opacity)),
        (colours - 0.5) / SH_C0,
        means.new_zeros(count, (config.degree + 1) ** 2 - 1, 3),
    )


def spacing(points: Tensor) -> Tensor:
    """Returns the root mean squared distance of each point to its three nearest neighbours, world units, `[count]`."""
    nearest = min(_NEIGHBOURS, len(points) - 1)
    if nearest < 1:
        return points.new_full((len(points),), 0.1)
    found = []
    for part in points.split(_AT_ONCE):
        distances = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.topk(nearest + 1, largest=False).values[:, 1:])
    return torch.cat(found).square().mean(1).sqrt().clamp_min(1e-4)
