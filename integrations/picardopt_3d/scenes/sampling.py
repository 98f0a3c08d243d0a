"""Where rays are sampled: a table of one row a ray that meets the scene's sphere.

Where the scene keeps an occupancy grid, only samples in occupied space are on the table, every ray's from the left.
Values come one channel a row ("[channels, count]"), which is how they are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt_3d.scenes import nerfacc_sampling
from picardopt_3d.scenes.occupancy import OccupancyGrid
from picardopt_3d.scenes.rays import Rays, ray_sphere

_AT_ONCE = 1 << 22  # samples that are looked up in the occupancy grid at a time


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
    near, far = ray_sphere(rays, radius)
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
