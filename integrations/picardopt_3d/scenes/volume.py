"""Volume rendering: shades the samples of rays and composites them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from picardopt_3d.scenes.rays import Rays
from picardopt_3d.scenes.sampling import Samples
from picardopt_3d.scenes.views import Light, Render


def shade(albedo: Tensor, normal: Tensor, light: Light, rays: Rays, samples: Samples) -> Tensor:
    """Applies Lambert's law under a point light: albedo (ambient + diffuse max(0, n . l)) (DreamFusion, equation 7).

    Args:
        albedo: Albedo of the evaluated samples, RGB in [0, 1], `[3, count]`.
        normal: Outward unit normals, `[3, count]`.
        light: The views' lights.
        rays: The rays.
        samples: The samples on the rays.

    Returns:
        The shaded colours, `[3, count]`.
    """
    views = rays.view_of(samples.rays())
    towards = F.normalize(light.position.to(albedo)[views] - samples.points, dim=1).T
    return lambert(albedo, normal, towards, light)


def lambert(albedo: Tensor, normal: Tensor, towards: Tensor, light: Light) -> Tensor:
    """Applies Lambert's law; see `shade`.

    Args:
        albedo: Albedo of points, RGB in [0, 1], `[3, count]`.
        normal: Outward unit normals, `[3, count]`.
        towards: Unit vectors from the points to the light, `[3, count]`.
        light: How the light shades them; its position is not read.

    Returns:
        The shaded colours, `[3, count]`.
    """
    cosine = (normal * towards).sum(0).clamp_min(0.0)
    shading = light.ambient + light.diffuse * cosine
    return shading.expand_as(albedo) if light.textureless else shading * albedo


def composite(
    rays: Rays,
    samples: Samples,
    density: Tensor,
    colour: Tensor,
    background: Tensor,
    normal: Tensor | None = None,
) -> Render:
    """Composites the colours of samples along rays (the quadrature of NeRF, arXiv 2003.08934, equation 3).

    Args:
        rays: The rays.
        samples: The samples on the rays.
        density: Density of the evaluated samples, per world unit, `[count]`.
        colour: Colour of the evaluated samples, RGB in [0, 1], `[3, count]`.
        background: Colour behind all rays, `[3]`, or behind each ray, `[rays, 3]`.
        normal: Outward unit normals, `[3, count]`; None if not requested.
    """
    optical = samples.table(density) * samples.delta  # [hits, samples]
    before = torch.cumsum(optical, 1) - optical
    weights = torch.exp(-before) * -torch.expm1(-optical)
    opacity = weights.sum(1)  # [hits]
    far_off = background if background.ndim == 1 else background[samples.hit]
    rgb = (weights * samples.table(colour)).sum(2).T  # [hits, 3]
    rgb = rgb + (1.0 - opacity)[:, None] * far_off
    depth = (weights * samples.distance).sum(1)
    normals = orientation = None
    if normal is not None:
        on_table = samples.table(normal)  # [3, hits, samples]
        normals = rays.image((weights * on_table).sum(2).T, samples.hit)
        directions = rays.directions[samples.hit]
        away = (on_table * directions.T[:, :, None]).sum(0).clamp_min(0.0)
        # The weights are constants here, as in threestudio: the penalty should turn normals, not erase them.
        seen = (opacity.detach() > 0).sum().clamp_min(1)
        orientation = (weights.detach() * away.square()).sum() / seen
    return Render(
        rgb=rays.image(rgb, samples.hit, background),
        opacity=rays.image(opacity[:, None], samples.hit),
        depth=rays.image(depth[:, None], samples.hit),
        normal=normals,
        orientation_penalty=orientation,
    )


def perturbation(rays: Rays, samples: Samples, distance: float = 0.01) -> Tensor:
    """Returns random displacements of the evaluated samples, normal with a deviation of `distance`, `[count, 3]`.

    One is drawn for every ray, whatever is occupied, so that later draws of the step do not depend on the occupancy.
    """
    drawn = torch.randn(rays.origins.shape, dtype=rays.origins.dtype)
    return distance * drawn.to(rays.origins.device)[samples.rays()]


def cut_out(raw: Tensor, density: float, depth: Tensor) -> Tensor:
    """Returns a level set that is positive inside both the surface of a given density and the sphere.

    Raw values are compared, not densities: they keep falling outside, so that interpolation between points finds the
    surface. The sphere's term is steep, so that it leaves values near the sphere unchanged.

    Args:
        raw: Density before its softplus, `[count]`.
        density: Density of the surface, per world unit.
        depth: Depth of the points below the sphere, world units, `[count]`.

    Returns:
        The level set's values, `[count]`.
    """
    surface = density + math.log(-math.expm1(-density))  # softplus(surface) = density
    return torch.minimum(raw - surface, 1e3 * depth)


def inverse_softplus(density: Tensor) -> Tensor:
    """Returns the value whose softplus is the density."""
    return density + torch.log(-torch.expm1(-density))


def mean(values: Tensor) -> Tensor:
    """Returns the mean over samples, or 0 if there are none because all space is empty."""
    return values.sum() / max(1, values.numel())
