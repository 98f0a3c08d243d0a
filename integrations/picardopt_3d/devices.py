"""Which device a run computes on, and how many worker processes it starts by default."""

from __future__ import annotations

import os

import torch


def pick_device(name: str) -> torch.device:
    """Returns the device that an option names.

    Args:
        name: "auto" (an accelerator if there is one, else the CPU), "cpu", "cuda" or another name of torch's.

    Raises:
        ValueError: torch sees no such device.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    elif name.startswith("cuda") and not available:
        raise ValueError(f"device={name}: torch sees no CUDA device here; use --device auto or cpu")
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def default_workers(device: str) -> int:
    """Returns the number of workers of a run that names none.

    Args:
        device: The run's option, as for `pick_device`.

    Returns:
        One per accelerator that the run may use, else two where two CPU cores are available.
    """
    accelerators = 0 if device == "cpu" else torch.cuda.device_count()
    return accelerators or min(2, len(os.sched_getaffinity(0)))
