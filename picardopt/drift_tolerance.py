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
_SCALE, _CURVATURE, _VARIANCE = 0.9, 0.95, 0.98
"""Weight of the past after each step: in the lengths of drifts and steps, in the curvature, in the variance."""
_NAMES = ("drifts", "lengths", "noises", "distances", "errors", "changes")


class DriftTolerance:
    """Accepts a guess while the error of its drift is small compared with how drifts vary from step to step.

    The drift at a guess is off by about ``curvature * |iterate - guess|``. The curvature of each parameter group is
    measured: the first drift that a sweep does not keep is evaluated again by the next one, at the iterate
    (`picardopt.measures.DriftPair`). A slot is accepted while

        sum over groups of  rate * curvature^2 * |iterate - guess|^2  <=  max(noise * N, drift^2 * D),

    where N is the same sum over the variances of the groups' drifts, and D the sum over their squared lengths. The rate
    of a group is its step length divided by its drift's length, so that a group counts as much as it moves the loss.

    Curvature and variance are means over the last twenty and fifty steps, in units of the drifts and steps of the time,
    because drifts may fall a thousandfold within a few sweeps.

    If the bases minimize losses of their own (a scene and the LoRA that guides it), their drifts have no common
    scale. Then each loss has its own left and right side, and their ratios may add up to at most 1.

    Args:
        noise: How much variance the drift's error may add, as a share of the variance between neighbouring steps.
        drift: How far a drift may be off if it has little variance, as a share of its length.
        losses: How many of the measured parameter groups, in their order, belong to each loss; None: one loss for all.

    Raises:
        ValueError: If an argument is out of range, or, once groups are measured, `losses` has another number of them.
    """

    exact = False
    needs_lengths = True
    needs_distances = True
    needs_pairs = True

    def __init__(
        self, noise: float = 0.2, drift: float = 0.05, losses: Sequence[int] | None = None
    ) -> None:
        require(0 <= noise < math.inf, "noise", noise, "give a finite number >= 0")
        require(0 <= drift < math.inf, "drift", drift, "give a finite number >= 0")
        sizes = (1,) if losses is None else tuple(losses)
        positive = bool(sizes) and all(isinstance(size, int) and size > 0 for size in sizes)
        require(positive, "losses", losses, "give a positive number of groups for each loss")
        self.noise, self.drift = noise, drift
        self.losses = None if losses is None else sizes
        self._means: dict[str, list[float]] = {}
        self._ages: dict[str, int] = {}  # steps since each mean was given its last value

    def __repr__(self) -> str:
        return f"DriftTolerance(noise={self.noise:g}, drift={self.drift:g})"

    @property
    def value(self) -> float:
        """`noise`: there is no one number for the residual."""
        return self.noise

    def thresholds(self, measures: Measures) -> list[Threshold]:
        """Returns the groups' weights for every slot; before the first pair one guess is accepted."""
        means, count = self._learned(measures), len(measures.numels)
        far = [_FARTHEST * count * _largest(group.distances) for group in measures.groups]
        near = [1 / x if x > 0 else math.inf for x in far]
        slots = len(measures.residuals)
        if not all(name in means for name in ("errors", "drifts", "lengths")):
            return [tuple(near), *[(math.inf,) * count] * (slots - 1)]
        weights = self._weights(measures.numels, means)
        return [tuple(w + x for w, x in zip(weights, near, strict=True))] * slots

    def _weights(self, numels: Sequence[int], means: dict[str, list[float]]) -> list[float]:
        """Returns what a group's residual is worth, as a share of what is accepted."""
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
        lengths = means["lengths"]
        moves = [  # rate * |drift|^2: errors and variances are in units of |drift|^2
            numel * math.sqrt(length * drift)
            for numel, length, drift in zip(numels, lengths, means["drifts"], strict=True)
        ]
        variances = means.get("noises", [0.0] * len(moves))
        added = self.noise * sum(m * x for m, x in zip(moves, variances, strict=True))
        limit = max(added, self.drift * self.drift * sum(moves))
        curvatures = _ratios(means["errors"], means["distances"])
        weights = []
        for move, curvature, length in zip(moves, curvatures, lengths, strict=True):
            scale = limit * length
            worth = move * curvature
            weights.append((worth / scale if scale > 0 else math.inf) if worth > 0 else 0.0)
        return weights

    def _learned(self, measures: Measures) -> dict[str, list[float]]:
        """Returns the running means with those of a sweep."""
        groups, pair = measures.groups, measures.pair
        means = self._means
        if any(len(values) != len(groups) for values in means.values()):
            means = {}  # the groups have changed
        learned = dict(means)

        def learn(name: str, values: Sequence[float], past: float) -> None:
            if all(map(math.isfinite, values)):
                learned[name] = mixed(means.get(name), values, past ** self._ages.get(name, 1))

        learn("drifts", [group.drift for group in groups], _SCALE)
        learn("lengths", [group.step_lengths[0] for group in groups], _SCALE)
        if not ("drifts" in learned and "lengths" in learned):
            return learned
        drifts, lengths = learned["drifts"], learned["lengths"]
        if pair is not None and self._usable(measures):
            learn("distances", _ratios(pair.distances, lengths), _CURVATURE)
            learn("errors", _ratios(pair.errors, drifts), _CURVATURE)
            learn("changes", _ratios(pair.changes, drifts), _CURVATURE)
        if all(math.isfinite(group.noise) for group in groups):
            learn("noises", self._variances(measures, learned), _VARIANCE)
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

    @staticmethod
    def _variances(measures: Measures, means: dict[str, list[float]]) -> list[float]:
        """Returns the groups' variances by one sweep.

        The drifts of slots 0 and 1 differ by noise and by how far apart they were evaluated, times the curvature. A
        group in which the latter may be half of the difference tells nothing: its mean stays.
        """
        groups = measures.groups
        noises = _ratios([group.noise for group in groups], means["drifts"])
        if "errors" not in means:
            return noises
        before = means.get("noises", [0.0] * len(groups))
        curvatures = _ratios(means["changes"], means["distances"])
        found = []
        for group, noise, curvature, length, old in zip(
            groups, noises, curvatures, means["lengths"], before, strict=True
        ):
            apart = group.step_lengths[0] + group.residuals[0]
            moved = curvature * apart / length / 2 if length > 0 else 0.0
            found.append(noise - moved if moved <= noise / 2 else old)
        return found

    def update(self, measures: Measures, stride: int) -> None:
        """Learns from a sweep."""
        learned = self._learned(measures)
        kept = {name for name in learned if learned[name] is self._means.get(name)}
        self._ages = {
            name: stride + (self._ages.get(name, 1) if name in kept else 0) for name in learned
        }
        self._means = learned

    def fingerprint(self) -> tuple[object, ...]:
        """Returns the options and the running means."""
        means = tuple((name, tuple(self._means.get(name, ()))) for name in _NAMES)
        ages = tuple(self._ages.get(name, 1) for name in _NAMES)
        return self.noise, self.drift, self.losses, ages, means

    def state_dict(self) -> dict[str, Any]:
        """Returns the running means, and how many steps ago each was given its last value."""
        means = {name: list(values) for name, values in self._means.items()}
        return {"ages": dict(self._ages)} | means

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint's means; those without ages are of an older version, in other units."""
        names = [name for name in _NAMES if name in state and "ages" in state]
        self._means = {name: [float(x) for x in state[name]] for name in names}
        self._ages = {name: int(state["ages"][name]) for name in names}


def _largest(values: Sequence[float]) -> float:
    """Returns the largest finite value; 0 if there is none."""
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b if b > 0 else 0.0 for a, b in zip(numerators, denominators, strict=True)]
