"""A tolerance that bounds how far a drift may be off, not how far a guess is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from picardopt.measures import Measures, Threshold, mixed
from picardopt.tolerance import require

_FARTHEST = 100.0
"""Squared distance from a guess to its iterate that is never accepted, in the window's longest from the head."""
_WILD = 1000.0
"""Squared distance between a pair's points, in squared step lengths, beyond which it tells nothing."""
_NAMES = ("drifts", "noises", "lengths", "distances", "errors", "changes")


class DriftTolerance:
    """Accepts a guess while its drift is off by little beside what drifts vary by from step to step.

    The drift at a guess is off by about ``curvature * |iterate - guess|``. The curvature of each parameter group is
    measured: the first drift that a sweep does not keep is evaluated again by the next one, at the iterate
    (`picardopt.measures.DriftPair`). A slot is accepted while

        sum over groups of  rate * curvature^2 * |iterate - guess|^2  <=  max(noise * N, drift^2 * D),

    where N is the same sum over the variances of the groups' drifts and D that over their squared lengths. The rate of
    a group is its step length by its drift's length, so that a group counts as much as it moves the loss.

    Where the bases minimize losses of their own (a scene and the LoRA that guides it), their drifts have no common
    scale. Each loss then has its own two sides, and the sum over losses of left by right has to be at most 1.

    Args:
        noise: How much variance the drift's error may add, as a share of the drift's own between neighbouring steps.
        drift: How far a drift may be off where it has little variance, as a share of its length.
        decay: Weight of the past in the running means, per sweep, in [0, 1).
        memory: Weight of the past in the measured curvature, per pair, in [0, 1).
        losses: How many of the measured parameter groups, in their order, each loss has; None: one loss of all.

    Raises:
        ValueError: If an argument is out of range, or, once groups are measured, `losses` has another number of them.
    """

    exact = False
    needs_lengths = True
    needs_distances = True
    needs_pairs = True

    def __init__(
        self,
        noise: float = 0.2,
        drift: float = 0.05,
        decay: float = 0.9,
        memory: float = 0.8,
        losses: Sequence[int] | None = None,
    ) -> None:
        require(0 <= noise < math.inf, "noise", noise, "give a finite number >= 0")
        require(0 <= drift < math.inf, "drift", drift, "give a finite number >= 0")
        require(0 <= decay < 1, "decay", decay, "give a number from 0 to below 1")
        require(0 <= memory < 1, "memory", memory, "give a number from 0 to below 1")
        sizes = (1,) if losses is None else tuple(losses)
        positive = bool(sizes) and all(isinstance(size, int) and size > 0 for size in sizes)
        require(positive, "losses", losses, "give a positive number of groups for each loss")
        self.noise, self.drift, self.decay, self.memory = noise, drift, decay, memory
        self.losses = None if losses is None else sizes
        self._means: dict[str, list[float]] = {}

    def __repr__(self) -> str:
        return f"DriftTolerance(noise={self.noise:g}, drift={self.drift:g})"

    @property
    def value(self) -> float:
        """`noise`: there is no one number for the residual."""
        return self.noise

    def thresholds(self, measures: Measures) -> list[Threshold]:
        """Returns the groups' weights for every slot; before the first pair one guess is accepted."""
        means, count = self._learned(measures), len(measures.numels)
        known = all(name in means for name in ("errors", "drifts", "lengths"))
        weights = self._weights(measures.numels, means) if known else [0.0] * count
        far = [_FARTHEST * count * _largest(group.distances) for group in measures.groups]
        near = [1 / x if x > 0 else math.inf for x in far]
        slots = len(measures.residuals)
        if not known:
            return [tuple(near), *[(math.inf,) * count] * (slots - 1)]
        return [tuple(w + x for w, x in zip(weights, near, strict=True))] * slots

    def _weights(self, numels: Sequence[int], means: dict[str, list[float]]) -> list[float]:
        """Returns what an error that a group's residual makes is worth, as a share of what is accepted."""
        sizes = self.losses or (len(numels),)
        require(
            sum(sizes) == len(numels),
            "losses",
            sizes,
            f"{len(numels)} groups are measured: give numbers that add up to it",
        )
        weights: list[float] = []
        for size in sizes:
            part = slice(len(weights), len(weights) + size)
            own = {name: values[part] for name, values in means.items()}
            weights += self._weights_of_a_loss(numels[part], own)
        return weights

    def _weights_of_a_loss(
        self, numels: Sequence[int], means: dict[str, list[float]]
    ) -> list[float]:
        """Returns the weights of one loss's groups."""
        rates = [
            numel * math.sqrt(length / drift) if drift > 0 else 0.0
            for numel, length, drift in zip(numels, means["lengths"], means["drifts"], strict=True)
        ]
        variances = means.get("noises", [0.0] * len(rates))
        added = self.noise * sum(w * x for w, x in zip(rates, variances, strict=True))
        drifts = sum(w * x for w, x in zip(rates, means["drifts"], strict=True))
        limit = max(added, self.drift * self.drift * drifts)
        curvatures = _ratios(means["errors"], means["distances"])
        scaled = [w * c for w, c in zip(rates, curvatures, strict=True)]
        return [(w / limit if limit > 0 else math.inf) if w > 0 else 0.0 for w in scaled]

    def _learned(self, measures: Measures) -> dict[str, list[float]]:
        """Returns the running means with those of a sweep."""
        groups, pair = measures.groups, measures.pair
        means = self._means
        if any(len(values) != len(groups) for values in means.values()):
            means = {}  # the groups have changed
        found: dict[str, tuple[Sequence[float], float]] = {
            "drifts": ([group.drift for group in groups], self.decay),
            "lengths": ([group.step_lengths[0] for group in groups], self.decay),
        }
        if pair is not None:
            found["distances"] = pair.distances, self.memory
            found["errors"] = pair.errors, self.memory
            found["changes"] = pair.changes, self.memory
            if not self._usable(measures):
                del found["distances"], found["errors"], found["changes"]
        learned = dict(means)
        for name, (values, decay) in found.items():
            if all(map(math.isfinite, values)):
                learned[name] = mixed(means.get(name), values, decay)
        variances = self._variances(measures, learned)
        if variances is not None:
            learned["noises"] = variances
        return learned

    @staticmethod
    def _usable(measures: Measures) -> bool:
        """Returns whether a pair tells of the curvature near the run: finite, and of points that are not far apart."""
        pair = measures.pair
        if pair is None or not all(
            map(math.isfinite, (*pair.distances, *pair.errors, *pair.changes))
        ):
            return False
        near = zip(pair.distances, measures.groups, strict=True)
        return all(far <= _WILD * group.step_lengths[0] for far, group in near if far > 0)

    def _variances(self, measures: Measures, means: dict[str, list[float]]) -> list[float] | None:
        """Returns the groups' variances with what a sweep tells of them.

        The drifts of slots 0 and 1 differ by noise and by how far apart they were evaluated, times the curvature. A
        group in which the latter may be half of the difference tells nothing.
        """
        groups, before = measures.groups, means.get("noises")
        if not all(math.isfinite(group.noise) for group in groups):
            return before
        if "errors" not in means:
            return mixed(before, [group.noise for group in groups], self.decay)
        curvatures = _ratios(means["changes"], means["distances"])
        found = []
        for index, (group, curvature) in enumerate(zip(groups, curvatures, strict=True)):
            moved = curvature * (group.step_lengths[0] + group.residuals[0]) / 2
            informative = moved <= group.noise / 2
            old = 0.0 if before is None else before[index]
            found.append(group.noise - moved if informative else old)
        return mixed(before, found, self.decay)

    def update(self, measures: Measures, stride: int) -> None:
        """Learns from a sweep."""
        self._means = self._learned(measures)

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the options and the running means."""
        means = tuple((name, tuple(self._means.get(name, ()))) for name in _NAMES)
        return self.noise, self.drift, self.decay, self.memory, self.losses, means

    def state_dict(self) -> dict[str, Any]:
        """Returns the running means."""
        return {name: list(values) for name, values in self._means.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint's means."""
        self._means = {name: [float(x) for x in state[name]] for name in _NAMES if name in state}


def _largest(values: Sequence[float]) -> float:
    """Returns the largest finite value; 0 if there is none."""
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b if b > 0 else 0.0 for a, b in zip(numerators, denominators, strict=True)]
