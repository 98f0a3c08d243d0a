"""Engines evaluate a window: in one process, or on the ranks of a process group."""

from __future__ import annotations

import torch

from picardopt.engines.base import Engine, SweepHeader
from picardopt.engines.distributed import DistributedEngine
from picardopt.engines.serial import SerialEngine
from picardopt.ranks import RankGrid
from picardopt.stats import Stats

__all__ = ["DistributedEngine", "Engine", "SerialEngine", "SweepHeader", "make_engine"]


def make_engine(
    grid: RankGrid | None, device: torch.device, timeout: float, stats: Stats
) -> Engine:
    """Returns the engine over a grid of ranks, or of this process alone.

    Args:
        grid: The ranks; None for this process alone.
        device: The parameters' device.
        timeout: Seconds to wait for a rank.
        stats: Times evaluations and exchanges.
    """
    if grid is None:
        return SerialEngine(stats)
    return DistributedEngine(grid, device, timeout, stats)
