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

from collections.abc import Sequence

import torch
from torch import Tensor

from picardopt.drift import Drift
from picardopt.layout import ParameterLayout, Row, blocks
from picardopt.memory import allocation
from picardopt.sweep import squares

SECANTS = 8
"""Pairs that are kept by default."""
_MEMORY = 0.8
"""Weight of the past, for every pair, in how far predictions came true."""
_TRUST = 1e-6
"""Squared length of predictions, in squared drift lengths, that count as true before any other."""
_LONGEST = 1e18
"""A change along a step of length 1 whose square float32 holds."""


class Secants:
    """The last secants of every parameter group, as unit steps with the changes of the drift along them.

    Args:
        layout: Describes the parameters.
        pairs: Number of secants, m; they take 2 m times the memory of the measured parameters (in float32 or finer).
        ridge: Added to the diagonal of S S^T, whose entries are cosines.
    """

    def __init__(self, layout: ParameterLayout, pairs: int, ridge: float = 0.1) -> None:
        self.pairs, self._ridge, self._next = pairs, ridge, 0
        self._groups: list[list[_Part]] = []  # made with the first secant
        self._eye = torch.eye(pairs, dtype=torch.float64, device=layout.device)
        zeros = torch.zeros_like(self._eye).repeat(len(layout.numels), 1, 1)
        self._gram, self._change_gram = zeros, zeros.clone()  # dot products of steps, of changes
        self._inverse = zeros.clone()
        # For each group, running means of <predicted, found> and of <predicted, predicted> changes of drifts.
        self._matches = zeros.new_zeros(len(layout.numels), 2)
        # What follows from these: the proportion in which predictions came true, at most 1, and lengths of changes.
        self._trust = zeros.new_zeros(len(layout.numels))
        self._change_lengths = zeros[:, 0].clone()
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
            self._groups = [[_Part(like, self.pairs) for like in group] for group in drift.groups]
        index, squared_changes = self._next, []
        self._next = (index + 1) % self.pairs
        for group, parts in enumerate(self._groups):
            given = coefficients[group] if coefficients is not None else None
            points = iterate.groups[group], guess.groups[group]
            predicted = self._predicted(group, *points)
            matches = torch.zeros_like(self._matches[group])
            for at, part in enumerate(parts):
                after, before = drift.groups[group][at], earlier.groups[group][at]
                x, y = points[0][at], points[1][at]
                matches += part.replace(index, x, y, after, before, given, predicted)
            matches /= squares([drift.groups[group]])[0]
            self._matches[group].lerp_(matches.nan_to_num(0, 0, 0), 1 - _MEMORY)
            rows = [[p.steps[index] for p in parts], [p.changes[index] for p in parts]]
            step, change = squares(rows)
            squared_changes.append(change)
            _normalize(rows, step, change)
            _replace_row(self._gram[group], index, [part.steps for part in parts])
            _replace_row(self._change_gram[group], index, [part.changes for part in parts])
        self._inverse = torch.linalg.inv_ex(self._gram + self._ridge * self._eye).inverse
        true, whole = self._matches.unbind(1)
        self._trust = ((true + _TRUST) / (whole + _TRUST)).clamp_(0, 1)
        self._change_lengths = self._change_gram.diagonal(dim1=1, dim2=2).sqrt()
        return torch.stack(squared_changes) / self._numels

    def clear(self) -> None:
        """Forgets all secants."""
        self._groups, self._next = [], 0
        for matrix in (self._gram, self._change_gram, self._inverse, self._matches):
            matrix.zero_()

    def _predicted(self, group: int, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """Returns by which multiples of the changes a group's drift changes from y to x, float64 [pairs]."""
        overlaps = torch.zeros_like(self._eye[0])
        for part, p, q in zip(self._groups[group], x, y, strict=True):
            part.add_overlaps(overlaps, p, q)
        return self._inverse[group] @ overlaps

    @torch.no_grad()
    def correct(self, drift: Drift, guess: Row, iterate: Row) -> None:
        """Corrects a drift in place, once, and notes with which coefficients; no host sync.

        A group's correction is the predicted one, in the proportion in which past predictions came true (by least
        squares, at most whole), and never longer than the drift.

        Args:
            drift: Evaluated at `guess`.
            guess: That point.
            iterate: The point that the rollout has reached.
        """
        if not self._groups or drift.correction is not None:
            return
        drift.correction = []
        for group in range(len(self._groups)):
            coefficients = self._predicted(group, iterate.groups[group], guess.groups[group])
            coefficients *= self._trust[group]
            longest = squares([drift.row.groups[group]])[0].sqrt()
            length = (coefficients @ self._change_gram[group] @ coefficients).clamp_(min=0).sqrt_()
            coefficients = (coefficients * (longest / length).clamp_(max=1)).nan_to_num_(0, 0, 0)
            # No element of the sum can overflow, or there is no correction.
            bound = longest + coefficients.abs() @ self._change_lengths[group]
            largest = min(torch.finfo(part.dtype).max for part in drift.row.groups[group])
            drift.correction.append(torch.where(bound < largest / 2, coefficients, 0.0))
        self.add(drift.row, drift.correction)

    @torch.no_grad()
    def add(self, row: Row, coefficients: list[Tensor]) -> None:
        """Adds a correction to a drift's row, in place; coefficients that are all 0 leave every bit."""
        for parts, segments, given in zip(self._groups, row.groups, coefficients, strict=True):
            for part, segment in zip(parts, segments, strict=True):
                part.add_changes(segment, given)


class _Part:
    """The secants' part in one group's parameters of one dtype, `[pairs, elements]` each."""

    def __init__(self, like: Tensor, pairs: int) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        count = 2 * pairs * like.numel() * dtype.itemsize
        with allocation(f"{pairs} secants", count, like.device):
            self.steps = torch.zeros((pairs, like.numel()), dtype=dtype, device=like.device)
            self.changes = torch.zeros_like(self.steps)

    def replace(
        self,
        index: int,
        x: Tensor,
        y: Tensor,
        drift: Tensor,
        earlier: Tensor,
        given: Tensor | None,
        predicted: Tensor,
    ) -> Tensor:
        """Puts a secant from y to x in place of another; returns how it was predicted, float64 [2] (`_matches`).

        Args:
            index: Which one.
            x: A point.
            y: Another point.
            drift: The drift at x.
            earlier: That at y.
            given: The coefficients that it was corrected with.
            predicted: Those that it would be corrected with now.
        """
        dtype, matches = self.steps.dtype, torch.zeros(2, dtype=torch.float64, device=x.device)
        for block in blocks(drift):
            change = drift[block].to(dtype) - earlier[block]
            if given is not None:
                change += given.to(dtype) @ self.changes[:, block]
            prediction = predicted.to(dtype) @ self.changes[:, block]
            matches += torch.stack([prediction @ change, prediction @ prediction])
            self.changes[index, block] = change
            torch.sub(x[block].to(dtype), y[block].to(dtype), out=self.steps[index, block])
        return matches

    def add_overlaps(self, overlaps: Tensor, x: Tensor, y: Tensor) -> None:
        """Adds the products of the steps and x - y, float64 [pairs]."""
        dtype = self.steps.dtype
        for block in blocks(x):
            overlaps += self.steps[:, block] @ (x[block].to(dtype) - y[block].to(dtype))

    def add_changes(self, drift: Tensor, given: Tensor) -> None:
        """Adds the changes, in these proportions, to a drift in place."""
        moved, given = (given != 0).any(), given.to(self.changes.dtype)
        if drift.is_cpu and drift.dtype == self.changes.dtype:  # in one pass
            for block in blocks(drift) if moved else ():
                drift[block].addmv_(self.changes[:, block].T, given)
            return
        for block in blocks(drift):
            change = (given @ self.changes[:, block]).to(drift.dtype)
            # Adding -0 keeps every bit, adding 0 does not.
            drift[block] += change.masked_fill_(~moved, -0.0)


def _normalize(rows: Sequence[Sequence[Tensor]], step: Tensor, change: Tensor) -> None:
    """Divides a secant by the length of its step, in place; one of no use becomes 0.

    Args:
        rows: The parts of its step, and of its change.
        step: Squared length of its step, float64.
        change: Squared length of its change.
    """
    factor = 1 / step.sqrt()
    # Infinite and NaN elements make infinite and NaN squares. Products of longer changes would overflow.
    usable = torch.isfinite(factor) & torch.isfinite(step) & (change.sqrt() * factor < _LONGEST)
    for row in (part for parts in rows for part in parts):
        row.mul_(factor.to(row.dtype)).masked_fill_(~usable, 0)


def _replace_row(gram: Tensor, index: int, rows: Sequence[Tensor]) -> None:
    """Updates a matrix of dot products, float64, after one of the vectors, given by parts, has changed."""
    products = torch.stack([(part @ part[index]).double() for part in rows]).sum(0)
    products = products.nan_to_num(0, 0, 0)
    gram[index], gram[:, index] = products, products
