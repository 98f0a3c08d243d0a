"""Samples in occupied space by nerfacc's CUDA kernels, where nerfacc 0.5 or later and a CUDA device are there.

It has not run on a GPU yet: the kernels march through the grid at one step length for all rays, so results agree with
those of the plain samples to the quadrature's error, which `tests/integrations/test_volume.py` checks on a GPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from picardopt_3d.scenes.occupancy import OccupancyGrid


def usable(device: torch.device) -> bool:
    """Whether nerfacc can march on a device."""
    return device.type == "cuda" and _installed()


@functools.cache
def _installed() -> bool:
    """Whether nerfacc is there and recent enough for `traverse_grids`."""
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
    """Samples in the occupied cells, in the rays' order.

    Args:
        origins: world units. # [rays, 3]
        directions: unit vectors. # [rays, 3]
        chords: where rays enter and leave, and the fraction of a step by which their samples are displaced.
            # each [rays]
        step: length of a step, world units.
        occupancy: which cells to sample.

    Returns:
        Rays of the samples, their distances and their lengths, each [count].
    """
    from nerfacc import OccGridEstimator  # only where `usable` said so

    near, far, offset = chords
    cube = [-occupancy.radius] * 3 + [occupancy.radius] * 3
    estimator = OccGridEstimator(cube, occupancy.config.resolution).to(origins.device)
    # nerfacc's cells are indexed x first, ours z first.
    estimator.binaries = occupancy.occupied().permute(2, 1, 0).contiguous()[None]
    first = near + (offset - 0.5) * step
    first = torch.where(first < 0, first + step, first)  # nerfacc would move those to 0 alike
    rays, starts, ends = estimator.sampling(
        origins, directions, t_min=first, t_max=far, render_step_size=step
    )
    return rays.long(), 0.5 * (starts + ends), ends - starts
