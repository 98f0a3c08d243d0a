"""What a data row makes of one slot: the mean of its ranks' drifts.

Each rank divides and adds in the order of the data ranks, so that all of them get the same bits. As
DistributedDataParallel does: divided before it is added, a gradient that only some ranks have counts as
zero on the others, and buffers are those of the first rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from picardopt.drift import Drift, Outcome
from picardopt.layout import ParameterLayout, Row
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
        """Puts the mean gradient into a row; its carry becomes that of data rank 0. All ranks call it at once."""
        if layout is not self._layout:
            shape = (self._ranks.size, layout.row_bytes)
            self._layout = layout
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
    """One drift of a row's, rows apart: the worst outcome counts.

    Args:
        drifts: One per data rank, of the same step.
        row: Where the mean gradient is.
    """
    if len(drifts) == 1:
        return drifts[0]
    worst, first = max(drifts, key=lambda drift: drift.outcome), drifts[0]
    if worst.outcome >= Outcome.FAILED:
        return replace(worst, row=row)
    present = tuple(map(any, zip(*(drift.present for drift in drifts), strict=True)))
    drift = Drift(first.step, row, present, rng=first.rng, outcome=worst.outcome)
    if any(other.uncleared is not None for other in drifts):
        drift.uncleared = tuple(sorted({i for other in drifts for i in other.uncleared or ()}))
    try:
        drift.returned = average_losses([other.returned for other in drifts])
    except ValueError as error:
        drift.outcome, drift.error, drift.trace = Outcome.FAILED, error, str(error)
    return drift


def average_losses(losses: Sequence[Any]) -> Any:
    """The mean of what the data ranks' closures returned: of its floating numbers and tensors, leaf by leaf.

    Everything else (integers, flags, names) is data rank 0's.

    Raises:
        ValueError: If the ranks returned other structures or shapes.
    """
    flat = [tree_flatten(loss) for loss in losses]
    kinds = [(spec, list(map(_kind, leaves))) for leaves, spec in flat]
    if any(kind != kinds[0] for kind in kinds):
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
    """The mean of tensors, or of numbers, added in the given order.

    Equal values stay what they are: a gradient that is averaged already (by DistributedDataParallel) keeps its bits.
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


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return complex if isinstance(leaf, int | float | complex) else type(leaf)
