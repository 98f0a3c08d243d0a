"""The plot of a run's strides, residuals and tolerances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from picardopt_3d.io import replacing


class Sweeps(Protocol):
    """The figures to plot, which `RunRecord` has.

    Attributes:
        step: Steps made final by all sweeps.
        sweeps: Number of all sweeps.
        mean_stride: Mean number of steps that a sweep made final.
        strides: Steps made final by each of the most recent sweeps.
        residuals: Squared distances per parameter in the same sweeps, for slots 1 to the window's last.
        tolerances: The thresholds of those residuals, in the same layout.
    """

    step: int
    sweeps: int
    strides: list[int]
    residuals: list[list[float]]
    tolerances: list[list[float]]

    @property
    def mean_stride(self) -> float:
        """Mean number of steps that a sweep made final."""
        ...


def save_strides_plot(record: Sweeps, window: int, path: Path) -> None:
    """Plots strides, residuals and tolerances of the recent sweeps.

    Args:
        record: Totals of all sweeps, and figures of each recent one.
        window: Number of drifts that a full sweep evaluates.
        path: The PNG to write.
    """
    # The object-oriented interface has no global state, needs no display and is fast to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    shown = len(record.strides)
    first = record.sweeps - shown
    figure.suptitle(title_of(record))

    top.bar(range(first, record.sweeps), record.strides, width=1.0, color="tab:blue", alpha=0.6)
    mean = f"mean of all: {record.mean_stride:.2f} steps a sweep"
    top.axhline(record.mean_stride, color="tab:orange", label=mean)
    top.axhline(window, color="0.4", linestyle=":", label=f"window: {window}")
    top.set_ylabel("stride (steps made final)")
    top.set_ylim(0, 1.25 * window)
    top.yaxis.set_major_locator(MaxNLocator(integer=True))
    top.legend(loc="upper right", ncols=2)

    for values, colour, label in (
        (record.residuals, "tab:blue", "residuals (a dot for each slot)"),
        (record.tolerances, "tab:red", "tolerance"),
    ):
        points = _points(values, first)
        if points:
            bottom.scatter(*zip(*points, strict=True), s=5.0, c=colour, linewidths=0, label=label)
            bottom.set_yscale("log")
    bottom.set_xlabel("sweep")
    bottom.set_ylabel("squared distance per parameter")
    if bottom.get_legend_handles_labels()[0]:
        bottom.legend(loc="upper right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def title_of(record: Sweeps) -> str:
    """Returns the plot's title: the totals, and how many sweeps are shown."""
    title, shown = f"{record.step} steps in {record.sweeps} sweeps", len(record.strides)
    return title if shown == record.sweeps else f"{title}; the last {shown} sweeps are shown"


def _points(values: Sequence[Sequence[float]], first: int) -> list[tuple[int, float]]:
    """Returns sweep and value of each number that a logarithmic axis can show."""
    return [
        (sweep, value)
        for sweep, slots in enumerate(values, first)
        for value in slots
        if 0 < value < math.inf
    ]
