"""Where rays are sampled: a table with one row per ray that meets the scene's sphere.

If the scene keeps an occupancy grid, the table holds only samples in occupied space, and each row is filled from the
left. Values have one row per channel, `[channels, count]`, which suits the sums along rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from picardopt_3d.scenes import nerfacc_sampling
from picardopt_3d.scenes.occupancy import OccupancyGrid
from picardopt_3d.scenes.rays import Rays, ray_sphere

_AT_ONCE = 1 << 22  # samples that are looked up together in the occupancy grid


@dataclass(frozen=True)
class Samples:
    """Where rays are sampled: a table, and those of its entries that are evaluated.

    Attributes:
        hit: Indices of the rays that meet the sphere, in order, `[hits]`.
        distance: Distance of each sample from its ray's origin, world units, `[hits, samples]`; 0 in unused entries.
        delta: Length that a sample represents, world units, `[hits, samples]` or `[hits, 1]`.
        points: The samples to evaluate, world units, `[count, 3]`.
        where: Their indices in the flattened table, `[count]`; None: all of it.
    """

    hit: Tensor
    distance: Tensor
    delta: Tensor
    points: Tensor
    where: Tensor | None = None

    def table(self, values: Tensor) -> Tensor:
        """Arranges values of samples `[..., count]` in a table `[..., hits, samples]`, 0 in unused entries."""
        if self.where is not None:
            empty = values.new_zeros(*values.shape[:-1], self.distance.numel())
            values = empty.index_copy(-1, self.where, values)
        return values.view(*values.shape[:-1], *self.distance.shape)

    def rays(self) -> Tensor:
        """Returns the index of each evaluated sample's ray, `[count]`."""
        samples = self.distance.shape[1]
        if self.where is None:
            return self.hit.repeat_interleave(samples)
        return self.hit[self.where // samples]


def sample(
    rays: Rays, radius: float, count: int, jitter: bool, occupancy: OccupancyGrid | None = None
) -> Samples:
    """Places evenly spaced samples on the rays' paths through a sphere.

    Args:
        rays: The rays.
        radius: Radius of the sphere, world units.
        count: Samples per ray.
        jitter: Whether each ray's samples are displaced by one random fraction of their spacing; otherwise they are in
            the middle.
        occupancy: A grid; samples outside its occupied cells are left out.
    """
    near, far = ray_sphere(rays, radius)
    # Drawn for all rays before any is left out, so that a ray's number does not depend on others.
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
    """Returns the rays and indices of the samples in occupied cells, in order; it works in parts to save memory."""
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
    """Assigns samples to the entries of a table with one row per ray, each row filled from the left.

    Args:
        rays: Ray of each sample, in ascending order, `[samples]`.
        count: Number of rays.

    Returns:
        Indices in the flattened table, `[samples]`, and the number of columns, at least 1.
    """
    many = torch.bincount(rays, minlength=count)
    columns = max(1, int(many.max())) if len(rays) else 1
    first = many.cumsum(0) - many
    return rays * columns + torch.arange(len(rays), device=rays.device) - first[rays], columns
