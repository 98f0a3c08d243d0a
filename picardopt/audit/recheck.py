"""Compares two evaluations of one drift."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch

from picardopt.drift import Drift
from picardopt.errors import ImpureClosureError
from picardopt.sweep import same_bits, squares

REMEDY = (
    "Make step t's work a function of the parameters and t alone:\n"
    "  1. take the data inside the closure, by step: `def closure(step): batch = batches.batch(step)` with "
    "batches = StepIndexedLoader(loader) (StepIndexedSource for what can only be read in order);\n"
    "  2. draw random numbers only from torch's, numpy's or random's global generators, inside the closure;\n"
    "  3. keep counters, iterators and buffers out of it.\n"
    "If your loop changed something that the closure reads where picardopt cannot see it (docs/closures.md), call "
    'optimizer.flush() after the change. (audit="never" switches this check off.)'
)
_ROUNDING = 1e-11  # relative squared difference that any reordered float32 sum may make
_LARGEST_NOISE = {"cpu": 1e-3}  # relative to the drift's norm; larger differences are not rounding
_LARGEST_NOISE_ELSEWHERE = 0.05


def differs(queued: Drift, again: Drift) -> float:
    """Returns the difference of two evaluations of one drift.

    Returns:
        Squared distance relative to the queued drift's squared norm; 0 only for equal bits, infinity if their outcomes
        differ or other parameters have gradients.
    """
    if queued.outcome is not again.outcome or queued.present != again.present:
        return float("inf")
    if bool(same_bits(queued.row, again.row)):
        return 0.0
    (distance,) = squares([queued.row.segments], [again.row.segments]).tolist()
    (norm,) = squares([queued.row.segments]).tolist()
    return max(distance / norm, torch.finfo(torch.float64).tiny) if norm > 0 else float("inf")


def is_noise(difference: float, noise: float, device: torch.device, data_size: int) -> bool:
    """Returns whether a difference is no larger than that of two evaluations of the same closure.

    One CPU thread adds in one order, and a sum over two ranks has only one order: nothing is noise there. Over more
    ranks, DistributedDataParallel changes the order after its first backward, when it rebuilds its buckets.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1 and data_size <= 2:
        return False
    largest = _LARGEST_NOISE.get(device.type, _LARGEST_NOISE_ELSEWHERE)
    return difference <= max(16 * noise, _ROUNDING) and noise <= largest**2


def float_bits(value: float) -> int:
    """Returns a float's bits as a signed integer, to be sent among integers."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def bits_float(bits: int) -> float:
    """Returns the float that `float_bits` packed."""
    value: float = struct.unpack("<d", bits.to_bytes(8, "little", signed=True))[0]
    return value


def impure(step: int, differences: Sequence[float]) -> ImpureClosureError:
    """Returns the error for a closure whose second evaluation differed.

    Args:
        step: The step.
        differences: Relative squared difference by rank; infinite if the closure raised or lacked gradients there.
    """
    ranks = [rank for rank, difference in enumerate(differences) if difference]
    where = f" on rank {', '.join(map(str, ranks))}" if len(differences) > 1 else ""
    worst = max(differences)
    how = (
        "raised, or had gradients for other parameters"
        if math.isinf(worst)
        else (f"gave another gradient (relative squared difference {worst:.3g})")
    )
    return ImpureClosureError(
        f"the closure is not a function of (parameters, step): evaluated again at the same parameters for step "
        f"{step}, it {how}{where}. {REMEDY}"
    )
