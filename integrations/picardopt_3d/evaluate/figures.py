"""Figures of judged runs, and their means over groups of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from picardopt_3d.evaluate.frechet import Statistics, frechet_distance, statistics_of
from picardopt_3d.run.finished import FinishedRun


@dataclass(frozen=True)
class Figures:
    """One line of the table: the figures of a run, or the means of a group of runs.

    Attributes:
        name: Folder of the run, or the entries that the group shares.
        runs: Number of runs.
        prompt: Prompt that the pictures should match; None: unknown, or several.
        method: Method in the report.
        preset: Preset in the report.
        seed: Seed of the run; None: unknown, or several.
        views: Number of pictures that were judged.
        r_precision: Share of the pictures whose own prompt fits best.
        frechet: Frechet distance between the pictures (all of a group together) and the reference.
        psnr: PSNR against the true views, dB.
        ssim: SSIM against the true views.
        steps: Number of optimizer steps.
        sweeps: Number of parallel evaluations of a window.
        mean_stride: Mean number of steps that a sweep made final.
        drift_evaluations: Number of gradients that were computed.
        seconds: Seconds of the optimization alone.
        seconds_with_startup: Seconds from the command to the end of the optimization.
    """

    name: str
    runs: int
    prompt: str | None
    method: str | None
    preset: str | None
    seed: int | None
    views: int
    r_precision: float | None
    frechet: float | None
    psnr: float | None
    ssim: float | None
    steps: float | None
    sweeps: float | None
    mean_stride: float | None
    drift_evaluations: float | None
    seconds: float | None
    seconds_with_startup: float | None


@dataclass(frozen=True, eq=False)
class Judged:
    """A judged run.

    Attributes:
        run: The run.
        figures: Its line of the table.
        features: CLIP features of its pictures, `[views, features]`.
    """

    run: FinishedRun
    figures: Figures
    features: np.ndarray = field(repr=False)


def group(
    judged: Sequence[Judged], keys: Sequence[str], reference: Statistics | None = None
) -> list[Figures]:
    """Averages each group of runs whose reports agree in some entries.

    Args:
        judged: The runs.
        keys: Names of entries, such as "method" and "preset".
        reference: The reference that all pictures of a group together are compared with.

    Returns:
        One line per group, in order of appearance; groups of one run are left out.
    """
    members: dict[tuple[str, ...], list[Judged]] = {}
    for one in judged:
        values = tuple(str(one.run.report.get(key, "-")) for key in keys)
        members.setdefault(values, []).append(one)
    return [
        _mean(" ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True)), some, reference)
        for values, some in members.items()
        if len(some) > 1
    ]


def _mean(name: str, judged: Sequence[Judged], reference: Statistics | None) -> Figures:
    """Returns the line of a group of runs."""
    lines = [one.figures for one in judged]

    def mean(entry: str) -> float | None:
        """Returns the mean over the runs that have the entry (all runs have equally many pictures)."""
        values: list[Any] = [getattr(line, entry) for line in lines]
        known = [float(value) for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def common(entry: str) -> Any:
        values = {getattr(line, entry) for line in lines}
        return values.pop() if len(values) == 1 else None

    distance = None
    if reference is not None:
        together = np.concatenate([one.features for one in judged])
        distance = frechet_distance(statistics_of(together), reference)
    averaged = ["r_precision", "psnr", "ssim", "steps", "sweeps", "mean_stride"]
    averaged += ["drift_evaluations", "seconds", "seconds_with_startup"]
    means: dict[str, Any] = {entry: mean(entry) for entry in averaged}
    return Figures(
        name=f"mean of {len(lines)}" + (f": {name}" if name else ""),
        runs=len(lines),
        views=sum(line.views for line in lines),
        frechet=distance,
        **{entry: common(entry) for entry in ("prompt", "method", "preset", "seed")},
        **means,
    )
