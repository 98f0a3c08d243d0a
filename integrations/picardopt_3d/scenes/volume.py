"""Volume rendering that every scene of densities shares: where rays are sampled, and what is composited.

Samples lie on a table of one row a ray that meets the scene's sphere. Where the scene keeps an occupancy grid, only
those in occupied space are on it, every ray's from the left. Values come one channel a row ("[channels, count]"),
which is how they are summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nerfacc_sampling
from .occupancy import OccupancyGrid
from .views import Light, Render

_AT_ONCE = 1 << 22  # samples that are looked up in the occupancy grid at a time


@dataclass(frozen=True)
class Rays:
    """Rays through the pixels of a batch of views, flattened.

    Attributes:
        origins: world units. # [rays, 3]
        directions: unit vectors. # [rays, 3]
        shape: batch, height and width of the views.
    """

    origins: Tensor
    directions: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, origins: Tensor, directions: Tensor) -> Rays:
        """Flatten rays of [batch, height, width, 3]."""
        batch, height, width = origins.shape[:3]
        return cls(origins.reshape(-1, 3), directions.reshape(-1, 3), (batch, height, width))

    def view_of(self, rays: Tensor) -> Tensor:
        """The view that each of some rays belongs to. [count] -> [count]."""
        return rays // (self.shape[1] * self.shape[2])

    def image(self, values: Tensor, hit: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Views of values that only some rays have.

        Args:
            values: # [hits, channels]
            hit: those rays. # [hits]
            fill: of the other rays, a number, [channels] or [rays, channels].

        Returns:
            [batch, channels, height, width]
        """
        full = values.new_zeros(len(self.origins), values.shape[1]) + fill
        full = full.index_copy(0, hit, values)
        return full.view(*self.shape, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Samples:
    """Where rays are sampled: a table, and the entries of it that are to be evaluated.

    Attributes:
        hit: rays that meet the sphere, in order. # [hits]
        distance: of samples from their rays' origins; 0 where a row has fewer than others. # [hits, samples]
        delta: length that a sample stands for. # [hits, samples] or [hits, 1]
        points: samples to be evaluated, world units. # [count, 3]
        where: their places in the flattened table; None: all of it. # [count]
    """

    hit: Tensor
    distance: Tensor
    delta: Tensor
    points: Tensor
    where: Tensor | None = None

    def table(self, values: Tensor) -> Tensor:
        """Values of the evaluated samples on the table, 0 elsewhere. [..., count] -> [..., hits, samples]."""
        if self.where is not None:
            empty = values.new_zeros(*values.shape[:-1], self.distance.numel())
            values = empty.index_copy(-1, self.where, values)
        return values.view(*values.shape[:-1], *self.distance.shape)

    def rays(self) -> Tensor:
        """The ray of each evaluated sample. [count]."""
        samples = self.distance.shape[1]
        if self.where is None:
            return self.hit.repeat_interleave(samples)
        return self.hit[self.where // samples]


def chord(rays: Rays, radius: float) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave a sphere about the origin, each [rays]; near = far is a miss."""
    origins, directions = rays.origins, rays.directions
    middle = -(origins * directions).sum(1)
    squared = radius**2 - (origins.square().sum(1) - middle.square())
    half = squared.clamp_min(0.0).sqrt()
    near = (middle - half).clamp_min(0.0)
    return near, torch.maximum(middle + half, near)


def sample(
    rays: Rays, radius: float, count: int, jitter: bool, occupancy: OccupancyGrid | None = None
) -> Samples:
    """Stratified samples along the rays' chords through a sphere, with one random number a ray.

    Args:
        rays: all of them.
        radius: of the sphere, world units.
        count: samples a ray.
        jitter: displace each ray's samples by one random fraction of their spacing; else they sit in the middle.
        occupancy: samples outside of its occupied cells are left out.
    """
    near, far = chord(rays, radius)
    # Drawn for all rays before any is left out, so that a ray's draw does not depend on others.
    offset = (
        torch.rand(near.shape, dtype=near.dtype).to(near.device)
        if jitter
        else torch.full_like(near, 0.5)
    )
    hit = (far > near).nonzero().squeeze(1)
    near, far, offset = near[hit], far[hit], offset[hit]
    origins, directions = rays.origins[hit], rays.directions[hit]
    delta = (far - near) / count  # [hits]
    if occupancy is not None:
        if nerfacc_sampling.usable(near.device):
            ray, along, length = nerfacc_sampling.march(
                origins, directions, (near, far, offset), 2 * radius / count, occupancy
            )
        else:
            ray, index = _occupied(origins, directions, (near, delta, offset), count, occupancy)
            along, length = near[ray] + (index + offset[ray]) * delta[ray], delta[ray]
        where, columns = _pack(ray, len(hit))
        empty = along.new_zeros(len(hit) * columns)
        distance, lengths = (
            empty.index_copy(0, where, each).view(-1, columns) for each in (along, length)
        )
        points = origins[ray] + along[:, None] * directions[ray]
        return Samples(hit, distance, lengths, points, where)
    index = torch.arange(count, device=near.device, dtype=near.dtype)
    distance = near[:, None] + (index + offset[:, None]) * delta[:, None]  # [hits, samples]
    points = origins[:, None] + distance[..., None] * directions[:, None]
    return Samples(hit, distance, delta[:, None], points.view(-1, 3))


@torch.no_grad()
def _occupied(
    origins: Tensor,
    directions: Tensor,
    chords: tuple[Tensor, Tensor, Tensor],
    count: int,
    occupancy: OccupancyGrid,
) -> tuple[Tensor, Tensor]:
    """Rays and numbers of the samples that lie in occupied cells, in order; some rays at a time, to save memory."""
    found = [torch.empty(0, 2, dtype=torch.long, device=origins.device)]
    index = torch.arange(count, device=origins.device, dtype=origins.dtype)
    rows = max(1, _AT_ONCE // count)
    for first in range(0, len(origins), rows):
        part = slice(first, first + rows)
        near, delta, offset = (each[part, None] for each in chords)
        distance = near + (index + offset) * delta
        points = origins[part, None] + distance[..., None] * directions[part, None]
        places = occupancy.at(points).nonzero()
        places[:, 0] += first
        found.append(places)
    ray, number = torch.cat(found).unbind(1)
    return ray, number


def _pack(rays: Tensor, count: int) -> tuple[Tensor, int]:
    """Places of samples on a table of one row a ray, every ray's from the left.

    Args:
        rays: of each sample, in ascending order. # [samples]
        count: all rays.

    Returns:
        Places in the flattened table [samples], and its columns, at least 1.
    """
    many = torch.bincount(rays, minlength=count)
    columns = max(1, int(many.max())) if len(rays) else 1
    first = many.cumsum(0) - many
    return rays * columns + torch.arange(len(rays), device=rays.device) - first[rays], columns


def shade(albedo: Tensor, normal: Tensor, light: Light, rays: Rays, samples: Samples) -> Tensor:
    """Lambert's law under a point light, albedo (ambient + diffuse max(0, n . l)) (DreamFusion, equation 7).

    Args:
        albedo: colour of the evaluated samples. # [3, count]
        normal: outward unit normals. # [3, count]
        light: the views' lights.
        rays: all of them.
        samples: on which rays the samples lie.

    Returns:
        [3, count]
    """
    views = rays.view_of(samples.rays())
    towards = F.normalize(light.position.to(albedo)[views] - samples.points, dim=1).T
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
    """Alpha-composite what the samples show (the quadrature of NeRF, arXiv 2003.08934, equation 3).

    Args:
        rays: all of them.
        samples: of them.
        density: of the evaluated samples, per world unit. # [count]
        colour: # [3, count]
        background: behind everything, or behind each ray. # [3] or [rays, 3]
        normal: outward unit normals; None if not asked for. # [3, count]
    """
    optical = samples.table(density) * samples.delta  # [hits, samples]
    before = torch.cumsum(optical, 1) - optical
    weights = torch.exp(-before) * -torch.expm1(-optical)
    opacity = weights.sum(1)  # [hits]
    far_off = background if background.ndim == 1 else background[samples.hit]
    rgb = (weights * samples.table(colour)).sum(2).T  # [hits, 3]
    rgb = rgb + (1.0 - opacity)[:, None] * far_off
    depth = (weights * samples.distance).sum(1)
    normals = back_facing = None
    if normal is not None:
        on_table = samples.table(normal)  # [3, hits, samples]
        normals = rays.image((weights * on_table).sum(2).T, samples.hit)
        directions = rays.directions[samples.hit]
        away = (on_table * directions.T[:, :, None]).sum(0).clamp_min(0.0)
        # Normals are to turn, not to vanish: the weights are constants here, as in threestudio.
        seen = (opacity.detach() > 0).sum().clamp_min(1)
        back_facing = (weights.detach() * away.square()).sum() / seen
    return Render(
        rgb=rays.image(rgb, samples.hit, background),
        opacity=rays.image(opacity[:, None], samples.hit),
        depth=rays.image(depth[:, None], samples.hit),
        normal=normals,
        back_facing=back_facing,
    )


def behind(rays: Rays, background: Tensor, backdrop: Tensor | None) -> Tensor:
    """The background that is in force: a backdrop for each view, if there is one, else the scene's own.

    Args:
        rays: all of them.
        background: the scene's own. # [3] or [rays, 3]
        backdrop: # [batch, 3]

    Returns:
        [3] or [rays, 3]
    """
    if backdrop is None:
        return background
    _, height, width = rays.shape
    return backdrop.to(background).repeat_interleave(height * width, 0)


def perturbation(rays: Rays, samples: Samples, distance: float = 0.01) -> Tensor:
    """Random displacements of the evaluated samples, normal with a deviation of `distance`. [count, 3].

    One a ray, drawn for all rays: what is drawn later in a step is the same whatever is occupied.
    """
    drawn = torch.randn(rays.origins.shape, dtype=rays.origins.dtype)
    return distance * drawn.to(rays.origins.device)[samples.rays()]


def cut_out(raw: Tensor, density: float, depth: Tensor) -> Tensor:
    """Positive inside of the surface where softplus(raw) is a density, and inside of the sphere.

    The raw values are compared, not the densities: they go on falling outside, so that interpolating between points
    finds the surface. The sphere cuts steeply, so as not to blunt them near it.

    Args:
        raw: # [count]
        density: the surface's, per world unit.
        depth: of the points under the sphere. # [count]

    Returns:
        [count]
    """
    surface = density + math.log(-math.expm1(-density))  # softplus(surface) = density
    return torch.minimum(raw - surface, 1e3 * depth)


def mean(values: Tensor) -> Tensor:
    """The mean of what was measured at samples; 0 where there are none, because all is empty."""
    return values.sum() / max(1, values.numel())
