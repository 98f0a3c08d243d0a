"""Averages the drifts of a data row, whose ranks evaluate one slot together.

Each rank adds in the order of the data ranks, so that all of them get the same bits. As in DistributedDataParallel,
gradients are divided before they are added, a gradient that only some ranks have counts as zero on the others, and
buffers are those of the first rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from picardopt.drift import Drift, Outcome
from picardopt.layout import ParameterLayout, Row
from picardopt.memory import allocation
from picardopt.ranks import RankGroup
from picardopt.transport import Transport


class RowAverage:
    """Averages gradients over a data row.

    Args:
        ranks: The data row.
        transport: Carries its messages.
    """

    def __init__(self, ranks: RankGroup, transport: Transport) -> None:
        self._ranks, self._transport = ranks, transport
        self._layout: ParameterLayout | None = None
        self._parts: list[Row] = []  # [data ranks]

    def __call__(self, layout: ParameterLayout, row: Row) -> None:
        """Writes the mean gradient, and data rank 0's carry, into a row; a collective call."""
        if layout is not self._layout:
            shape = (self._ranks.size, layout.row_bytes)
            self._layout = layout
            with allocation("a drift of every data rank", math.prod(shape), layout.device):
                self._bytes = torch.zeros(shape, dtype=torch.uint8, device=layout.device)
            self._parts = [layout.row(line) for line in self._bytes]
        same_device = layout.device.type == self._transport.device.type
        shared = self._bytes if same_device else torch.empty(self._bytes.shape, dtype=torch.uint8)
        self._transport.all_gather(row.buffer.to(shared.device), shared, self._ranks)
        if not same_device:
            self._bytes.copy_(shared)
        row.copy_(self._parts[0])
        for index, target in enumerate(row.segments):
            target.copy_(mean([part.segments[index] for part in self._parts]))


def average_drifts(drifts: Sequence[Drift], row: Row) -> Drift:
    """Returns the mean of a data row's drifts, except for the gradients; the worst outcome counts.

    Args:
        drifts: One per data rank, of the same step.
        row: Holds the mean gradient.
    """
    if len(drifts) == 1:
        return drifts[0]
    worst, first = max(drifts, key=lambda drift: drift.outcome), drifts[0]
    if worst.outcome >= Outcome.FAILED:
        return replace(worst, row=row)
    present = tuple(map(any, zip(*(drift.present for drift in drifts), strict=True)))
    drift = Drift(first.step, row, present, rng=first.rng, outcome=worst.outcome)
    drift.calls = max(other.calls for other in drifts)
    drift.strides = first.strides
    if any(other.uncleared is not None for other in drifts):
        drift.uncleared = tuple(sorted({i for other in drifts for i in other.uncleared or ()}))
    try:
        drift.returned = average_losses([other.returned for other in drifts])
    except ValueError as error:
        drift.outcome, drift.error, drift.trace = Outcome.FAILED, error, str(error)
    return drift


def average_losses(losses: Sequence[Any]) -> Any:
    """Returns the mean of the data ranks' losses: of floating numbers and tensors, leaf by leaf.

    All other leaves (integers, flags, names) are data rank 0's.

    Raises:
        ValueError: If the ranks returned different structures or shapes.
    """
    flat = [tree_flatten(loss) for loss in losses]
    signatures = [(spec, list(map(_signature, leaves))) for leaves, spec in flat]
    if any(signature != signatures[0] for signature in signatures):
        raise ValueError(
            "the closures of the data ranks returned losses of different structures or shapes: return the same kind "
            "on each of them (its floating numbers and tensors are averaged)"
        )
    leaves = [
        mean(parts) if any(map(_is_floating, parts)) else parts[0]
        for parts in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])


def mean(parts: Sequence[Any]) -> Any:
    """Returns the mean of tensors, or of numbers, added in the given order.

    Equal values keep their bits: those of a gradient that DistributedDataParallel has averaged already.
    """
    total = parts[0] / len(parts)
    for part in parts[1:]:
        total = total + part / len(parts)
    if not isinstance(total, Tensor):
        return parts[0] if all(part == parts[0] for part in parts) else total
    same = parts[1] == parts[0]
    for part in parts[2:]:
        same &= part == parts[0]
    return torch.where(same, parts[0], total)


def _is_floating(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point() or leaf.is_complex()
    return isinstance(leaf, float | complex)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return complex if isinstance(leaf, int | float | complex) else type(leaf)
