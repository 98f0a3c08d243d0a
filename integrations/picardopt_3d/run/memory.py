"""What a run's window takes in memory, said before its first step, and refused where no device of its kind has it."""

from __future__ import annotations

import os

import torch

from picardopt import ParallelPicardOptimizer, needed_memory
from picardopt.memory import size


def check_memory(
    optimizer: ParallelPicardOptimizer, device: torch.device, processes: int
) -> str | None:
    """Returns in a sentence what the window takes; None where nothing runs ahead.

    Args:
        optimizer: Before or after its first step.
        device: Where the scene lives.
        processes: Workers of the run; on the CPU they share its memory.

    Raises:
        ValueError: If it is more than the device has, whatever else lies there.
    """
    if optimizer.window == 1:
        return None
    needed, sharing = needed_memory(optimizer), processes if device.type == "cpu" else 1
    there = memory_of(device)
    if sharing * needed.total > there:
        of = "" if sharing == 1 else f" in each of {sharing} workers"
        half = optimizer.window // 2
        raise ValueError(
            f"window={optimizer.window} takes {needed}{of}, and {device} has {size(there)}: --window {half} takes "
            f"{size(needed_memory(optimizer, half).total)}"
            + (f", --secants 0 {size(needed.total - needed.secants)}" if needed.secants else "")
        )
    return (
        f"a window of {optimizer.window} takes {size(needed.total)} of memory besides the run's own and what its steps "
        "keep for their backward passes"
    )


def memory_of(device: torch.device) -> int:
    """Returns the bytes that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
