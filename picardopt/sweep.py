"""The arithmetic of one sweep: residuals and stride (Algorithm 2), as functions of iterates.

Knows nothing of optimizers, closures or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt.layout import Row
from picardopt.measures import DriftMeasures, GroupMeasures, Measures, Threshold, pooled, weighted

_PER_GROUP = 3  # rows of `measure`'s table: residuals, step lengths, distances


def squared_distances(a: Row, b: Row, scratch: Tensor, numels: Sequence[int]) -> Tensor:
    """Returns each group's squared distance per parameter, summed in float64.

    Args:
        a: A row.
        b: Another row.
        scratch: float64 tensor [any length] to overwrite; rows are processed in pieces of its length.
        numels: Number of measured elements of each group.

    Returns:
        float64 tensor [groups] on the rows' device; no host sync.
    """
    return torch.stack(
        [
            squared_difference(x, y, scratch) / max(1, n)
            for x, y, n in zip(a.groups, b.groups, numels, strict=True)
        ]
    )


def squared_lengths(a: Row, numels: Sequence[int]) -> Tensor:
    """Returns each group's squared length per parameter; see `squared_distances`."""
    lengths = []
    for group, numel in zip(a.groups, numels, strict=True):
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in group]
        lengths.append(sum((norm**2 for norm in norms), torch.zeros_like(norms[0])) / max(1, numel))
    return torch.stack(lengths)


def squared_difference(a: Sequence[Tensor], b: Sequence[Tensor], scratch: Tensor) -> Tensor:
    """Returns the sum of squared differences of two lists of flat tensors, in float64, without a host sync."""
    total = torch.zeros((), dtype=torch.float64, device=scratch.device)
    for x, y in zip(a, b, strict=True):
        length = scratch.numel()
        for p, q in zip(torch.split(x, length), torch.split(y, length), strict=True):
            difference = torch.sub(p, q, out=scratch[: p.numel()])
            total += torch.dot(difference, difference)
    return total


def same_bits(a: Row, b: Row) -> Tensor:
    """Returns whether two rows have the same bits, as a float64 scalar tensor 1 or 0 (no host sync)."""
    words = a.buffer.view(torch.int64) == b.buffer.view(torch.int64)
    return words.all().to(torch.float64)


def measure(
    before: Sequence[Row],
    after: Sequence[Row],
    scratch: Tensor,
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
        scratch: float64 tensor [any length] that may be overwritten.
        numels: Number of measured elements of each group.
        lengths: Whether to compute step lengths; NaN otherwise.
        distances: Whether to compute distances from the head; NaN otherwise.
        bits: Whether to compare bits; 0 otherwise.

    Returns:
        float64 tensor [1 + 3 groups, p]: same bits (1 or 0); then for each group residuals, step lengths, distances
        from the head.
    """
    slots, count = range(1, len(after)), len(numels)
    shape = (1 + _PER_GROUP * count, len(slots))
    table = torch.full(shape, math.nan, dtype=torch.float64, device=scratch.device)
    by_group = table[1:].view(count, _PER_GROUP, len(slots))
    table[0] = 0
    for j in slots:
        by_group[:, 0, j - 1] = squared_distances(after[j], before[j], scratch, numels)
        if lengths:
            by_group[:, 1, j - 1] = squared_distances(after[j], after[j - 1], scratch, numels)
        if distances:
            by_group[:, 2, j - 1] = squared_distances(after[j], after[0], scratch, numels)
        if bits:
            table[0, j - 1] = same_bits(after[j], before[j])
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
        if exact:
            accepted = measures.same_bits[j - 1] and measures.residuals[j - 1] == 0
        elif isinstance(threshold, tuple):
            residuals = [group.residuals[j - 1] for group in measures.groups]
            accepted = within(residuals, threshold, measures.numels)
        else:
            accepted = measures.residuals[j - 1] <= threshold
        if not accepted:
            return j
    return len(measures.residuals)
