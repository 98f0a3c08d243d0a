"""The arithmetic of one sweep: residuals and stride (Algorithm 2), as functions of iterates.

Knows nothing of optimizers, closures or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt.layout import Row
from picardopt.tolerance import Measures


def squared_distance(a: Row, b: Row, scratch: Tensor, numel: int) -> Tensor:
    """Returns the squared distance per measured parameter, ``(1/D) d(a, b)^2``, summed in float64.

    Args:
        a: A row.
        b: Another row.
        scratch: float64 tensor [any length] to overwrite; rows are processed in pieces of its length.
        numel: Number of measured parameters D.

    Returns:
        float64 scalar tensor on the rows' device; no host sync.
    """
    return squared_difference(a.measured, b.measured, scratch) / numel


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
    numel: int,
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
        numel: Number of measured parameters D.
        lengths: Whether to compute step lengths; NaN otherwise.
        distances: Whether to compute distances from the head; NaN otherwise.
        bits: Whether to compare bits; 0 otherwise.

    Returns:
        float64 tensor [4, p]: residuals, step lengths, distances from the head, same bits (1 or 0).
    """
    slots = range(1, len(after))
    table = torch.full((4, len(slots)), math.nan, dtype=torch.float64, device=scratch.device)
    table[3] = 0
    for j in slots:
        table[0, j - 1] = squared_distance(after[j], before[j], scratch, numel)
        if lengths:
            table[1, j - 1] = squared_distance(after[j], after[j - 1], scratch, numel)
        if distances:
            table[2, j - 1] = squared_distance(after[j], after[0], scratch, numel)
        if bits:
            table[3, j - 1] = same_bits(after[j], before[j])
    return table


def as_measures(table: Sequence[Sequence[float]]) -> Measures:
    """Returns the rows of `measure`'s table, once on the host, as `Measures`."""
    residuals, lengths, distances, same = table
    return Measures(tuple(residuals), tuple(lengths), tuple(distances), tuple(map(bool, same)))


def accepts(residual: float, threshold: float, same: bool, *, exact: bool) -> bool:
    """Returns whether a guess is accepted. NaN never is, as residual or as threshold.

    Squares of tiny differences underflow to 0, so at tolerance 0 the bits decide.
    """
    return same and residual == 0 if exact else residual <= threshold


def choose_stride(measures: Measures, thresholds: Sequence[float], *, exact: bool) -> int:
    """Returns the number of steps that a sweep made final: the paper's ``skip``.

    ``min({j : residual_j > e, j in [1, p]} + {p})``: stride j is safe although residual j failed, because
    iterate t+j was made from drifts whose guesses 1 .. j-1 passed.

    Returns:
        The stride, 1 .. p.
    """
    table = zip(measures.residuals, thresholds, measures.same_bits, strict=True)
    for j, (residual, threshold, same) in enumerate(table, start=1):
        if not accepts(residual, threshold, same, exact=exact):
            return j
    return len(measures.residuals)
