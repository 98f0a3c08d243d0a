"""The arithmetic of one sweep: residuals and stride (Algorithm 2), as functions of iterates.

Knows nothing of optimizers, closures or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt.layout import ParameterLayout, Row, blocks
from picardopt.measures import DriftMeasures, GroupMeasures, Measures, Threshold, pooled, weighted

_PER_GROUP = 3  # rows of `measure`'s table: residuals, step lengths, distances
_AT_ONCE = 1 << 24
"""Elements of the differences that an accelerator holds at once."""
_TRUSTED = 1e-20, 1e30
"""Sums of squares in float32 that are right to rounding: no large part of them vanished, and none overflowed."""

Flat = Sequence[Tensor]
"""Flat tensors, one after the other."""


def squared_distances(pairs: Sequence[tuple[Row, Row]], numels: Sequence[int]) -> Tensor:
    """Returns each group's squared distance per parameter between two rows.

    Args:
        pairs: Rows to compare.
        numels: Number of measured elements of each group.

    Returns:
        float64 tensor [groups, pairs] on the rows' device; no host sync on an accelerator.
    """
    by_group = [
        squares([a.groups[group] for a, _ in pairs], [b.groups[group] for _, b in pairs])
        for group in range(len(numels))
    ]
    return _per_parameter(by_group, numels)


def squared_moves(layout: ParameterLayout, row: Row) -> Tensor | None:
    """Returns each group's squared distance per parameter between the live tensors and a row, float64 [groups].

    None where it is cheaper to copy the live tensors into a row first.
    """
    pairs = layout.beside(row)
    if pairs is None:
        return None
    return _per_parameter([squares([a], [b]) for a, b in pairs], layout.numels)[:, 0]


def squared_lengths(a: Row, numels: Sequence[int]) -> Tensor:
    """Returns each group's squared length per parameter, float64 [groups]; see `squared_distances`."""
    return _per_parameter([squares([group]) for group in a.groups], numels)[:, 0]


def _per_parameter(by_group: Sequence[Tensor], numels: Sequence[int]) -> Tensor:
    pairs = zip(by_group, numels, strict=True)
    return torch.stack([squared / max(1, numel) for squared, numel in pairs])


def squares(a: Sequence[Flat], b: Sequence[Flat] | None = None) -> Tensor:
    """Returns the squared length of every item of a, or of a - b: summed over blocks in float64.

    It is 0 only if no element differs by more than the square root of the smallest number in float64 (1e-162).

    Args:
        a: Flat tensors of the same lengths and dtypes in each item.
        b: As many.

    Returns:
        float64 tensor [items] on their device; no host sync on an accelerator.
    """
    parts = [(part[: len(a)], part[len(a) :]) for part in zip(*a, *(b or ()), strict=True)]
    if not parts or parts[0][0][0].is_cpu:
        sums = [_squares_on_cpu(*part) for part in parts]
        return torch.tensor(
            [sum(each) for each in zip(*sums, strict=True)] or [0.0] * len(a),
            dtype=torch.float64,
            device="cpu",
        )
    return torch.stack([_squares_on_accelerator(*part) for part in parts]).sum(0)


def _squares_on_cpu(a: Flat, b: Flat) -> list[float]:
    """Returns squared lengths, with the differences in float32, which is several times as fast as float64."""
    wide, sums = torch.promote_types(a[0].dtype, torch.float32), [0.0] * len(a)
    room = a[0].new_empty(0, dtype=wide)
    for block in blocks(a[0]):
        room.resize_(block.stop - block.start)
        for index in range(len(a)):
            x = a[index][block].to(wide)
            if b:
                x = torch.sub(x, b[index][block].to(wide), out=room)
            square = float(torch.dot(x, x))
            if not _TRUSTED[0] < square < _TRUSTED[1]:
                x = x.double()
                square = float(torch.dot(x, x))
            sums[index] += square
    return sums


def _squares_on_accelerator(a: Flat, b: Flat) -> Tensor:
    """Returns squared lengths, in few launches however many vectors there are."""
    wide, length = torch.promote_types(a[0].dtype, torch.float32), _AT_ONCE // len(a)
    sums = torch.zeros(len(a), dtype=torch.float64, device=a[0].device)
    for at in range(0, a[0].numel(), length):
        block = slice(at, at + length)
        vectors = tuple(x[block].to(wide) for x in a)
        if b:
            vectors = torch._foreach_sub(vectors, tuple(y[block].to(wide) for y in b))
        norms = torch._foreach_norm(vectors, dtype=torch.float64)
        sums += torch.stack(norms).square()
    return sums


def same_bits(a: Row, b: Row) -> Tensor:
    """Returns whether two rows have the same bits, as a float64 scalar tensor 1 or 0 (no host sync)."""
    words = a.buffer.view(torch.int64) == b.buffer.view(torch.int64)
    return words.all().to(torch.float64)


def measure(
    before: Sequence[Row],
    after: Sequence[Row],
    numels: Sequence[int],
    *,
    lengths: bool = True,
    distances: bool = True,
    bits: bool = True,
) -> Tensor:
    """Compares the window before and after a sweep.

    Args:
        before: Iterates t .. t+p before the sweep.
        after: Iterates t .. t+p after it; ``after[0]`` is the head.
        numels: Number of measured elements of each group.
        lengths: Whether to compute step lengths; NaN otherwise.
        distances: Whether to compute distances from the head; NaN otherwise.
        bits: Whether to compare bits; 0 otherwise.

    Returns:
        float64 tensor [1 + 3 groups, p]: same bits (1 or 0); then for each group residuals, step lengths, distances
        from the head.
    """
    slots, count, device = range(1, len(after)), len(numels), after[0].buffer.device
    shape = (1 + _PER_GROUP * count, len(slots))
    table = torch.full(shape, math.nan, dtype=torch.float64, device=device)
    table[0] = 0
    if not slots:
        return table
    wanted = [0, *[1] * lengths, *[2] * distances]
    pairs = []
    for j in slots:
        others = before[j], after[j - 1], after[0]
        pairs += [(after[j], others[kind]) for kind in wanted]
    found = squared_distances(pairs, numels).view(count, len(slots), len(wanted))
    by_group = table[1:].view(count, _PER_GROUP, len(slots))
    for index, kind in enumerate(wanted):
        by_group[:, kind] = found[:, :, index]
    if bits:
        table[0] = torch.stack([same_bits(after[j], before[j]) for j in slots])
    return table


def as_measures(
    table: Sequence[Sequence[float]], numels: Sequence[int], of_drift: DriftMeasures | None = None
) -> Measures:
    """Returns `measure`'s table, once on the host, as `Measures`.

    Args:
        table: The rows.
        numels: Number of measured elements of each group.
        of_drift: What was measured of the head's drift.
    """
    same, *rows = table
    unknown = (math.nan,) * len(numels)
    if of_drift is None:
        of_drift = DriftMeasures(unknown, unknown)
    groups = []
    for at, drift, noise in zip(
        range(0, len(rows), _PER_GROUP), of_drift.drifts, of_drift.noises, strict=True
    ):
        residuals, lengths, distances = map(tuple, rows[at : at + _PER_GROUP])
        groups.append(GroupMeasures(residuals, lengths, distances, drift, noise))

    def together(*of_groups: Sequence[float]) -> tuple[float, ...]:
        return tuple(pooled(column, numels) for column in zip(*of_groups, strict=True))

    return Measures(
        together(*(group.residuals for group in groups)),
        together(*(group.step_lengths for group in groups)),
        together(*(group.distances for group in groups)),
        tuple(map(bool, same)),
        tuple(groups),
        tuple(numels),
        of_drift.pair,
    )


def within(distances: Sequence[float], threshold: Threshold, numels: Sequence[int]) -> bool:
    """Returns whether squared distances are accepted. NaN never is, as distance or as threshold.

    Args:
        distances: Each group's squared distance per parameter.
        threshold: What is accepted.
        numels: Each group's number of parameters.
    """
    if isinstance(threshold, tuple):
        return weighted(threshold, distances) <= 1
    return pooled(distances, numels) <= threshold


def choose_stride(measures: Measures, thresholds: Sequence[Threshold], *, exact: bool) -> int:
    """Returns the number of steps that a sweep made final: the paper's ``skip``.

    ``min({j : residual_j > e, j in [1, p]} + {p})``: stride j is safe although residual j failed, because
    iterate t+j was made from drifts whose guesses 1 .. j-1 passed. Squares of tiny differences underflow to 0, so at
    tolerance 0 the bits decide.

    Returns:
        The stride, 1 .. p.
    """
    for j, threshold in enumerate(thresholds, start=1):
        if not accepted(measures, j, threshold, exact=exact):
            return j
    return len(measures.residuals)


def accepted(measures: Measures, j: int, threshold: Threshold, *, exact: bool) -> bool:
    """Returns whether residual j, 1 .. p, is accepted."""
    if exact:
        return measures.same_bits[j - 1] and measures.residuals[j - 1] == 0
    if isinstance(threshold, tuple):
        residuals = [group.residuals[j - 1] for group in measures.groups]
        return within(residuals, threshold, measures.numels)
    return measures.residuals[j - 1] <= threshold
