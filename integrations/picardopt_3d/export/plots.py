"""The plot of a run's strides, residuals, tolerances and drift errors, and of the number of its scene's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from picardopt_3d.io import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_FAR = 1e12
_DECAY = 0.9
"""Weight of the past in the running means of drift errors, as in `picardopt.stats.Stats.drift_error`."""


class Sweeps(Protocol):
    """The figures to plot, which `RunRecord` has.

    Attributes:
        step: Steps made final by all sweeps.
        sweeps: Number of all sweeps.
        mean_stride: Mean number of steps that a sweep made final.
        strides: Steps made final by each of the most recent sweeps.
        residuals: Squared distances per parameter in the same sweeps, for slots 1 to the window's last.
        tolerances: The thresholds of those residuals, in the same layout.
        drifts: By parameter group, for the same sweeps: squared error, noise and length of a drift; NaN where unknown.
        counts: By kind of part, in order: steps and sweeps until then, and the number from then on.
        restructured: Of each step after which the number of parameters could change: steps and sweeps until then.
    """

    step: int
    sweeps: int
    strides: list[int]
    residuals: list[list[float]]
    tolerances: list[list[float]]
    drifts: dict[str, list[list[float]]]
    counts: dict[str, list[list[int]]]
    restructured: list[list[int]]

    @property
    def mean_stride(self) -> float:
        """Mean number of steps that a sweep made final."""
        ...


def save_strides_plot(
    record: Sweeps, window: int, path: Path, stages: Sequence[tuple[str, int]] = ()
) -> None:
    """Writes `strides_figure` as a PNG."""
    with replacing(path) as temporary:
        strides_figure(record, window, stages).savefig(temporary, dpi=120)


def strides_figure(record: Sweeps, window: int, stages: Sequence[tuple[str, int]] = ()) -> Figure:
    """Plots strides, residuals and tolerances of the recent sweeps, and what else the record has.

    That is how far drifts were off, and the numbers of parts.

    Args:
        record: Totals of all sweeps, and figures of each recent one.
        window: Number of drifts that a full sweep evaluates.
        stages: Of several stages, the name of each and its number of sweeps.
    """
    # The object-oriented interface has no global state, needs no display and is fast to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [3, 3, *[3] * bool(record.drifts), *[2] * bool(record.counts)]
    figure = Figure(figsize=(9.0, 2.8 * sum(heights) / 3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(title_of(record))
    for index, panel in enumerate(panels):
        _mark_restructured(panel, record, "" if index else "restructured")
        _mark_stages(panel, record, stages, named=not index)
    _plot_strides(panels[0], record, window)
    _plot_residuals(panels[1], record)
    if record.drifts:
        _plot_drifts(panels[2], record)
    if record.counts:
        _plot_counts(panels[-1], record)
    panels[-1].set_xlabel("sweep")
    return figure


def _plot_strides(panel: Axes, record: Sweeps, window: int) -> None:
    """Plots the stride of each sweep, their mean and the window."""
    from matplotlib.ticker import MaxNLocator

    sweeps = range(_first(record), record.sweeps)
    panel.bar(sweeps, record.strides, width=1.0, color="tab:blue", alpha=0.6)
    mean = f"mean of all: {record.mean_stride:.2f} steps a sweep"
    panel.axhline(record.mean_stride, color="tab:orange", label=mean)
    panel.axhline(window, color="0.4", linestyle=":", label=f"window: {window}")
    panel.set_ylabel("stride (steps made final)")
    panel.set_ylim(0, 1.25 * window)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(loc="upper right", ncols=3)


def _plot_residuals(panel: Axes, record: Sweeps) -> None:
    """Plots the residuals and the tolerances of each sweep's slots; a tolerance without bound is left out."""
    residuals = _points(record.residuals, _first(record))
    # What is far above all residuals accepts everything too, and would only squeeze them.
    most = _FAR * max((residual for _, residual in residuals), default=1.0)
    tolerances = _points(record.tolerances, _first(record), most)
    for points, colour, label in (
        (residuals, "tab:blue", "residuals (a dot for each slot)"),
        (tolerances, "tab:red", "tolerance"),
    ):
        if points:
            sweeps, numbers = zip(*points, strict=True)
            panel.scatter(sweeps, numbers, s=5.0, c=colour, linewidths=0, label=label)
            panel.set_yscale("log")
    panel.set_ylabel("squared distance per parameter")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="upper right")


def _plot_drifts(panel: Axes, record: Sweeps) -> None:
    """Plots how far drifts were off and how far those of neighbouring steps lie apart, by their length."""
    for index, (name, entries) in enumerate(record.drifts.items()):
        style: dict[str, Any] = {"color": f"C{index % 10}", "marker": ".", "markersize": 3}
        errors, noises = (_running(entries, at, _first(record)) for at in (0, 1))
        if errors:
            panel.plot(*zip(*errors, strict=True), label=name, **style)
        if noises:
            panel.plot(*zip(*noises, strict=True), linestyle=":", **style)
    panel.plot([], [], color="0.4", label="drift error")
    panel.plot([], [], color="0.4", linestyle=":", label="noise between steps")
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * math.sqrt(high / low))  # room for the legend
    panel.set_ylabel("share of the drift's length")
    panel.legend(loc="upper right", ncols=4)


def _running(entries: Sequence[Sequence[float]], at: int, first: int) -> list[tuple[int, float]]:
    """Returns sweep and share of each sweep that measured it: the root of a running mean by that of squared lengths.

    Args:
        entries: For each sweep squared error, noise and length.
        at: Which of the first two.
        first: Index of the first sweep.
    """
    points: list[tuple[int, float]] = []
    square = length = 0.0
    for sweep, entry in enumerate(entries, first):
        if math.isfinite(entry[at]) and math.isfinite(entry[2]):
            square = _DECAY * square + entry[at]
            length = _DECAY * length + entry[2]
            if 0 < square < math.inf and 0 < length < math.inf:
                points.append((sweep, math.sqrt(square / length)))
    return points


def _plot_counts(panel: Axes, record: Sweeps) -> None:
    """Plots the number of parts of each kind as steps; those before the sweeps that are shown are left out."""
    first = _first(record)
    for name, history in record.counts.items():
        shown = max((i for i, (_, sweeps, _) in enumerate(history) if sweeps <= first), default=0)
        ends = [max(sweeps, first) - 0.5 for _, sweeps, _ in history[shown:]]
        counts = [count for _, _, count in history[shown:]]
        panel.step(ends, counts, where="post", label=name)
    panel.set_ylabel("number")
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.legend(loc="lower right")


def _mark_restructured(panel: Axes, record: Sweeps, label: str) -> None:
    """Draws a thin line after each sweep whose last step could change the number of parameters."""
    first = _first(record)
    ends = [sweeps - 0.5 for _, sweeps in record.restructured if sweeps > first]
    if ends:
        upright = panel.get_xaxis_transform()
        style: dict[str, Any] = {"colors": "0.5", "linewidths": 0.6, "zorder": 0.5}
        panel.vlines(ends, 0, 1, transform=upright, label=label, **style)


def _mark_stages(
    panel: Axes, record: Sweeps, stages: Sequence[tuple[str, int]], named: bool
) -> None:
    """Draws a line before each stage that begins within the sweeps that are shown, with its name if asked for."""
    begins = 0
    for name, sweeps in stages:
        if begins + sweeps > _first(record):
            at = max(begins, _first(record)) - 0.5
            panel.axvline(at, color="black", linewidth=0.8)
            if named:
                upright = panel.get_xaxis_transform()
                panel.text(at, 0.98, f" {name}", transform=upright, va="top")
        begins += sweeps


def title_of(record: Sweeps) -> str:
    """Returns the plot's title: the totals, and how many sweeps are shown."""
    title, shown = f"{record.step} steps in {record.sweeps} sweeps", len(record.strides)
    return title if shown == record.sweeps else f"{title}; the last {shown} sweeps are shown"


def _first(record: Sweeps) -> int:
    """Index of the first sweep that is shown."""
    return record.sweeps - len(record.strides)


def _points(
    values: Sequence[Sequence[float]], first: int, most: float = math.inf
) -> list[tuple[int, float]]:
    """Returns sweep and value of each number that a logarithmic axis can show."""
    return [
        (sweep, value)
        for sweep, slots in enumerate(values, first)
        for value in slots
        if 0 < value < most
    ]
