"""Samples occupied space with nerfacc's CUDA kernels, if nerfacc 0.5 or later and a CUDA device are available.

This code has not run on a GPU yet. The kernels march through the grid with one step length for all rays, so that
results agree with those of the plain samples up to the error of the quadrature; `tests/integrations/test_volume.py`
checks that on a GPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from picardopt_3d.scenes.occupancy import OccupancyGrid


def usable(device: torch.device) -> bool:
    """Returns whether nerfacc can be used on a device."""
    return device.type == "cuda" and _installed()


@functools.cache
def _installed() -> bool:
    """Returns whether nerfacc is installed and recent enough to have `traverse_grids`."""
    if importlib.util.find_spec("nerfacc") is None:
        return False
    version = importlib.metadata.version("nerfacc").split(".")
    return tuple(int(part) for part in version[:2]) >= (0, 5)


@torch.no_grad()
def march(
    origins: Tensor,
    directions: Tensor,
    chords: tuple[Tensor, Tensor, Tensor],
    step: float,
    occupancy: OccupancyGrid,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns samples in the occupied cells, in the order of the rays.

    Args:
        origins: Origins of the rays, world units, `[rays, 3]`.
        directions: Unit vectors, `[rays, 3]`.
        chords: Distances at which rays enter and leave the sphere, world units, and the fraction of a step by which
            their samples are displaced, each `[rays]`.
        step: Length of a step, world units.
        occupancy: The grid of the cells to sample.

    Returns:
        The samples' rays, their distances and their lengths (world units), each `[count]`.
    """
    from nerfacc import OccGridEstimator  # called only if `usable`

    near, far, offset = chords
    cube = [-occupancy.radius] * 3 + [occupancy.radius] * 3
    estimator = OccGridEstimator(cube, occupancy.config.resolution).to(origins.device)
    # nerfacc's cells are indexed x first, ours z first.
    estimator.binaries = occupancy.occupied().permute(2, 1, 0).contiguous()[None]
    first = near + (offset - 0.5) * step
    first = torch.where(first < 0, first + step, first)  # nerfacc would move all of these to 0
    rays, starts, ends = estimator.sampling(
        origins, directions, t_min=first, t_max=far, render_step_size=step
    )
    return rays.long(), 0.5 * (starts + ends), ends - starts
