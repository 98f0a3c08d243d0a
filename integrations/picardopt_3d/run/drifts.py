"""How far drifts were off, beside how far those of neighbouring steps lie apart: by parameter group and sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from picardopt.stats import SweepRecord

Drifts = dict[str, list[list[float]]]
"""By name of a parameter group, an entry for each sweep: the drift error (`picardopt.measures.DriftPair.errors`), the
noise and the length of the head's drift (`picardopt.measures.GroupMeasures`). All are squared, per parameter; NaN where
nothing was measured. Empty where nothing ever was."""

_UNKNOWN = [math.nan] * 3


def group_names(measured: Sequence[Optimizer]) -> list[str]:
    """Returns the names of the parameter groups that are measured: their own, or what they are without one.

    Args:
        measured: The optimizers whose parameters count in residuals.
    """
    groups = [group for optimizer in measured for group in optimizer.param_groups]
    filled = [group for group in groups if any(each.numel() for each in group["params"])]
    names: list[str] = []
    for index, group in enumerate(filled):
        name = str(group.get("name", f"group {index}"))
        names.append(f"{name} ({index})" if name in names else name)
    return names


def drifts_of(sweeps: Sequence[SweepRecord], names: Sequence[str]) -> Drifts:
    """Returns what sweeps have measured.

    Args:
        sweeps: The sweeps.
        names: From `group_names`.
    """
    drifts: Drifts = {name: [] for name in names}
    for sweep in sweeps:
        entries = [_UNKNOWN] * len(names)
        measures = sweep.measures
        if measures is not None and len(measures.groups) == len(names):
            errors = [math.nan] * len(names) if measures.pair is None else measures.pair.errors
            entries = [
                [error, group.noise, group.drift]
                for error, group in zip(errors, measures.groups, strict=True)
            ]
        for name, entry in zip(names, entries, strict=True):
            drifts[name].append(list(entry))
    known = any(math.isfinite(x) for each in drifts.values() for entry in each for x in entry)
    return drifts if known else {}


def joined(first: Drifts, count: int, then: Drifts, further: int) -> Drifts:
    """Returns what some sweeps and those after them have measured; a group may be unknown to either.

    Args:
        first: Of the first sweeps.
        count: Number of the first sweeps.
        then: Of the sweeps after them.
        further: Number of the sweeps after them.
    """
    return {
        name: _filled(first.get(name, []), count) + _filled(then.get(name, []), further)
        for name in {**first, **then}
    }


def _filled(entries: list[list[float]], count: int) -> list[list[float]]:
    """Returns the entries after as many unknown ones as make up the number."""
    return [list(_UNKNOWN) for _ in range(count - len(entries))] + entries


def figures_of(drifts: Drifts) -> dict[str, Any]:
    """Returns the entries of a report: |error| / |drift| and |noise| / |drift|, root mean squares by group."""
    found: dict[str, dict[str, float]] = {"drift_error": {}, "drift_noise": {}}
    for name, entries in drifts.items():
        for index, kind in enumerate(found):
            pairs = [(entry[index], entry[2]) for entry in entries]
            known = [pair for pair in pairs if all(map(math.isfinite, pair))]
            length = sum(length for _, length in known)
            if length > 0:
                found[kind][name] = math.sqrt(sum(square for square, _ in known) / length)
    return {kind: by_group for kind, by_group in found.items() if by_group}
