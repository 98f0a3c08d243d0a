"""Corrects drifts for the distance between the guess at which they were evaluated and the iterate.

A drift evaluated twice, at two points, for the same step and with the same random numbers, tells how the drift changes
from one point to the other. The last such secants predict how another drift changes between its guess and its iterate:
with their steps S and changes Y as rows, ``g + Y^T (S S^T + ridge)^-1 S (iterate - guess)``. This is the least-squares
form of multi-secant (Anderson, type I) quasi-Newton methods (Fang and Saad 2009, doi:10.1002/nla.617).

Where the guess was right nothing is changed, not even a sign of zero: the sequential trajectory stays the fixed point,
and at tolerance 0 what is kept is not corrected.

Every rank computes the corrections for itself: they are the same on all of them only where sums have one order, on
devices of one kind with equally many threads a process. Elsewhere the ranks' parameters drift apart, which ends the run
with RankMismatchError: use ``secants=0`` there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from picardopt.drift import Drift
from picardopt.layout import ParameterLayout, Row

SECANTS = 8
"""Pairs that are kept by default."""


class Secants:
    """The last secants of every parameter group, as unit steps with the changes of the drift along them.

    Args:
        layout: Describes the parameters.
        pairs: Number of secants, m; they take 2 m times the memory of the measured parameters (in float32 or finer).
        ridge: Added to the diagonal of S S^T, whose entries are cosines.
    """

    def __init__(self, layout: ParameterLayout, pairs: int, ridge: float = 0.1) -> None:
        self._pairs, self._ridge, self._next = pairs, ridge, 0
        self._groups: list[list[_Part]] = []  # made with the first secant
        self._eye = torch.eye(pairs, dtype=torch.float64, device=layout.device)
        zeros = torch.zeros_like(self._eye).repeat(len(layout.numels), 1, 1)
        self._gram, self._change_gram = zeros, zeros.clone()  # dot products of steps, of changes
        self._inverse = zeros.clone()
        numels = torch.tensor(layout.numels, dtype=torch.float64, device=layout.device)
        self._numels = numels.clamp(min=1)

    @torch.no_grad()
    def observe(
        self, iterate: Row, guess: Row, drift: Row, earlier: Row, coefficients: list[Tensor] | None
    ) -> Tensor:
        """Learns a secant in place of the oldest one.

        Args:
            iterate: A point.
            guess: Another point.
            drift: The drift at the iterate.
            earlier: The same step's drift at the guess, corrected.
            coefficients: What it was corrected with (`Drift.correction`).

        Returns:
            By group, the squared length of the drift's change per parameter, float64 [groups], without the correction.
        """
        if not self._groups:
            self._groups = [[_Part(like, self._pairs) for like in group] for group in drift.groups]
        index, squares = self._next, []
        self._next = (index + 1) % self._pairs
        for group, parts in enumerate(self._groups):
            given = coefficients[group] if coefficients is not None else None
            lengths, changes = [], []
            for at, part in enumerate(parts):
                change = drift.groups[group][at].to(part.changes.dtype) - earlier.groups[group][at]
                if given is not None:
                    change += given.to(change.dtype) @ part.changes
                part.changes[index] = change
                part.steps[index] = iterate.groups[group][at] - guess.groups[group][at]
                lengths.append(torch.linalg.vector_norm(part.steps[index], dtype=torch.float64))
                changes.append(torch.linalg.vector_norm(change, dtype=torch.float64))
            squares.append(torch.stack(changes).square().sum())
            length = torch.linalg.vector_norm(torch.stack(lengths))
            for part in parts:
                part.normalize(index, length)
            self._gram[group] = _with_row(self._gram[group], index, [p.steps for p in parts])
            self._change_gram[group] = _with_row(
                self._change_gram[group], index, [p.changes for p in parts]
            )
        self._inverse = torch.linalg.inv_ex(self._gram + self._ridge * self._eye).inverse
        return torch.stack(squares) / self._numels

    def clear(self) -> None:
        """Forgets all secants."""
        self._groups, self._next = [], 0
        for matrix in (self._gram, self._change_gram, self._inverse):
            matrix.zero_()

    @torch.no_grad()
    def correct(self, drift: Drift, guess: Row, iterate: Row) -> None:
        """Corrects a drift in place, once, and notes with which coefficients; no host sync.

        A correction is never longer than the drift, group by group.

        Args:
            drift: Evaluated at `guess`.
            guess: That point.
            iterate: The point that the rollout has reached.
        """
        if not self._groups or drift.correction is not None:
            return
        drift.correction = []
        for group, parts in enumerate(self._groups):
            overlaps = torch.zeros_like(self._eye[0])
            lengths = []
            for at, part in enumerate(parts):
                distance = iterate.groups[group][at] - guess.groups[group][at]
                overlaps += (part.steps @ distance.to(part.steps.dtype)).double()
                lengths.append(
                    torch.linalg.vector_norm(drift.row.groups[group][at], dtype=torch.float64)
                )
            coefficients = self._inverse[group] @ overlaps
            longest = torch.linalg.vector_norm(torch.stack(lengths))
            length = (coefficients @ self._change_gram[group] @ coefficients).clamp(min=0).sqrt()
            scale = torch.where(length <= longest, torch.ones_like(length), longest / length)
            drift.correction.append((coefficients * scale).nan_to_num(0, 0, 0))
        self.add(drift.row, drift.correction)

    @torch.no_grad()
    def add(self, row: Row, coefficients: list[Tensor]) -> None:
        """Adds a correction to a drift's row, in place; coefficients that are all 0 leave every bit."""
        for parts, segments, given in zip(self._groups, row.groups, coefficients, strict=True):
            moved = (given != 0).any()
            for part, segment in zip(parts, segments, strict=True):
                change = given.to(part.changes.dtype) @ part.changes
                corrected = segment + change.to(segment.dtype)
                usable = moved & torch.isfinite(corrected).all()
                segment.copy_(torch.where(usable, corrected, segment))


class _Part:
    """The secants' part in one group's parameters of one dtype, `[pairs, elements]` each."""

    def __init__(self, like: Tensor, pairs: int) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.steps = torch.zeros((pairs, like.numel()), dtype=dtype, device=like.device)
        self.changes = torch.zeros_like(self.steps)

    def normalize(self, index: int, length: Tensor) -> None:
        """Divides a secant by the length of its step; one that is 0 or not finite becomes 0."""
        factor = (1 / length).to(self.steps.dtype)
        usable = torch.isfinite(factor)
        for rows in (self.steps, self.changes):
            scaled = rows[index] * factor
            rows[index] = torch.where(usable & torch.isfinite(scaled).all(), scaled, 0)


def _with_row(gram: Tensor, index: int, rows: list[Tensor]) -> Tensor:
    """Returns a matrix of dot products after one of the vectors, given by parts, has changed."""
    products = torch.stack([(part @ part[index]).double() for part in rows]).sum(0)
    products = products.nan_to_num(0, 0, 0)
    gram = gram.clone()
    gram[index], gram[:, index] = products, products
    return gram
