"""The plot of a run's strides, residuals and tolerances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .files import replacing


def save_strides_plot(
    strides: Sequence[int],
    residuals: Sequence[Sequence[float]],
    tolerances: Sequence[Sequence[float]],
    window: int,
    path: Path,
) -> None:
    """Plot what every sweep made final and what decided it.

    Args:
        strides: steps made final, one number a sweep.
        residuals: squared distance per parameter of slots 1.. of every sweep.
        tolerances: the thresholds those residuals were held against, in the same layout.
        window: drifts evaluated by a full sweep.
        path: the PNG to write.
    """
    # The object-oriented interface: no global state, no display, a fast import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps, sweeps = sum(strides), len(strides)
    figure.suptitle(f"{steps} steps in {sweeps} sweeps")

    top.bar(range(sweeps), strides, width=1.0, color="tab:blue", alpha=0.6)
    mean = steps / sweeps if sweeps else 0.0
    top.axhline(mean, color="tab:orange", label=f"mean: {mean:.2f} steps a sweep")
    top.axhline(window, color="0.4", linestyle=":", label=f"window: {window}")
    top.set_ylabel("stride (steps made final)")
    top.set_ylim(0, 1.25 * window)
    top.yaxis.set_major_locator(MaxNLocator(integer=True))
    top.legend(loc="upper right", ncols=2)

    for values, colour, label in (
        (residuals, "tab:blue", "residuals (a dot for each slot)"),
        (tolerances, "tab:red", "tolerance"),
    ):
        points = [(x, v) for x, slots in enumerate(values) for v in slots if 0 < v < math.inf]
        if points:
            bottom.scatter(*zip(*points, strict=True), s=5.0, c=colour, linewidths=0, label=label)
            bottom.set_yscale("log")
    bottom.set_xlabel("sweep")
    bottom.set_ylabel("squared distance per parameter")
    if bottom.get_legend_handles_labels()[0]:
        bottom.legend(loc="upper right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
