"""Stands for nerfacc's CUDA kernels; all else of nerfacc, its occupancy grid above all, is nerfacc itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import nerfacc.estimators.occ_grid
import nerfacc.volrend
import torch
from torch import Tensor


def traverse_grids(
    origins: Tensor,
    directions: Tensor,
    binaries: Tensor,
    boxes: Tensor,
    near_planes: Tensor,
    far_planes: Tensor,
    step_size: float,
    cone_angle: float,
) -> tuple[Any, Any, None]:
    """Returns the steps along rays whose middles lie in occupied cells of a grid of one level."""
    low, high = boxes[0, :3], boxes[0, 3:]
    slopes = torch.where(directions.abs() < 1e-9, 1e-9, directions)
    first, second = (low - origins) / slopes, (high - origins) / slopes
    enter = torch.minimum(first, second).amax(1).clamp_min(0).maximum(near_planes)
    leave = torch.maximum(first, second).amin(1).minimum(far_planes)
    most = int(((leave - enter).clamp_min(0).max() / step_size).ceil()) if len(enter) else 0
    # The steps begin at the near plane, which is drawn at random, as the kernel's do.
    begin = near_planes + ((enter - near_planes) / step_size).ceil() * step_size
    starts = begin[:, None] + torch.arange(most) * step_size
    middles = origins[:, None] + directions[:, None] * (starts + step_size / 2)[..., None]
    sizes = torch.tensor(binaries.shape[1:])
    cells = ((middles - low) / (high - low) * sizes).long().clamp(min=0).minimum(sizes - 1)
    inside = starts + step_size <= leave[:, None]
    occupied = inside & binaries[0][cells.unbind(-1)]
    rays, _ = occupied.nonzero(as_tuple=True)
    chosen = starts[occupied]
    count = len(chosen)
    is_left = torch.arange(2 * count) < count
    intervals = SimpleNamespace(
        vals=torch.cat([chosen, chosen + step_size]), is_left=is_left, is_right=~is_left
    )
    packed = pack_info(rays, len(origins))
    return intervals, SimpleNamespace(ray_indices=rays, packed_info=packed), None


def pack_info(ray_indices: Tensor, n_rays: int) -> Tensor:
    """Returns where each ray's samples begin, and how many they are. [n_rays, 2]."""
    counts = torch.bincount(ray_indices, minlength=n_rays)
    return torch.stack([counts.cumsum(0) - counts, counts], dim=-1)


def exclusive_sum(inputs: Tensor, packed_info: Tensor) -> Tensor:
    """Returns the sums of what comes before each sample of its ray."""
    starts, counts = packed_info.long().unbind(-1)
    rays = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(inputs)) - starts[rays]
    padded = inputs.new_zeros(len(counts), int(counts.max()) + 1)
    padded = padded.index_put((rays, place + 1), inputs)
    return padded.cumsum(1)[rays, place]


def install() -> None:
    """Puts these in the place of the kernels."""
    nerfacc.estimators.occ_grid.traverse_grids = traverse_grids
    nerfacc.volrend.pack_info = pack_info
    nerfacc.volrend.exclusive_sum = exclusive_sum
