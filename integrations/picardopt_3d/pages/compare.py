"""Runs side by side: the same views of each, their figures, the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from picardopt_3d.pages.page import page
from picardopt_3d.pages.pictures import FilmViews, film_views
from picardopt_3d.run.finished import FinishedRun
from picardopt_3d.run.folder import RunFolder

_OF_THE_FOLDER = {
    *("out", "overwrite", "picture_every", "checkpoint_every", "tensorboard", "wandb"),
    *("viewer", "viewer_host", "viewer_port"),
}
"""Options that change nothing of the object."""

_BARS = 90
"""Most bars of a chart of strides."""

_NONE = "-"


class Cell(NamedTuple):
    """What a table says of one run: a text, and more about it ("": nothing)."""

    text: str
    note: str = ""


class Row(NamedTuple):
    """A line of a table: what it is about, and a cell for each run."""

    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Column:
    """A run as the page shows it.

    Attributes:
        name: Of its folder, with as much of the path as tells it from the others.
        title: What was asked for.
        method: Its method and preset.
        views: Of its film; None: there is none.
        bars: Steps that its sweeps made final, `[x, height]` in percent, means over neighbours where there are many.
        tallest: Steps of the highest bar that there could be: its window.
    """

    name: str
    title: str
    method: str
    views: FilmViews | None
    bars: list[tuple[float, float]]
    tallest: int


def comparison(runs: Sequence[FinishedRun]) -> str:
    """Returns the page, as HTML.

    Args:
        runs: The runs; figures are compared with those of the first one.
    """
    names = short_names([run.folder for run in runs])
    columns = [_column(name, run) for name, run in zip(names, runs, strict=True)]
    options = [_options(run) for run in runs]
    differing, partial, equal = _settings(options)
    titles = list(dict.fromkeys(column.title for column in columns))
    return page(
        "compare.html",
        ("turn.js", "compare.js"),
        title=titles[0] if len(titles) == 1 else f"{len(runs)} runs",
        same=len(titles) == 1,
        columns=columns,
        figures=figures([run.report for run in runs]),
        differing=differing,
        partial=partial,
        equal=equal,
    )


def figures(reports: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns a line for each figure that a run has; notes compare it with the first run's."""
    rows = [
        _row(reports, "PSNR", "psnr", "{:.2f} dB", _difference),
        _row(reports, "Steps", "steps_done", "{:,}"),
        _row(reports, "Sweeps", "sweeps", "{:,}"),
        _row(reports, "Steps a sweep", "mean_stride", "{:.2f}"),
        _row(reports, "Optimization", "seconds", "{:,.1f} s", _times),
        _row(reports, "In all", "total_seconds", "{:,.1f} s", _times),
        _row(reports, "Gradients", "drift_evaluations", "{:,}"),
        _row(reports, "Not used of them", "wasted_evaluations", "{:,}"),
        _row(reports, "Workers", "workers", "{}"),
        _row(reports, "Machine", "machine", "{}"),
        _row(reports, "torch", "torch", "{}"),
    ]
    return [row for row in rows if any(cell.text != _NONE for cell in row.cells)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns the ends of paths, as short as they can be without two being equal."""
    whole = [folder.absolute().parts for folder in folders]
    for count in range(1, max(len(parts) for parts in whole) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return names


def _column(name: str, run: FinishedRun) -> Column:
    """Returns what the page shows of a run."""
    report = run.report
    method = " · ".join(str(report[key]) for key in ("method", "preset") if report.get(key))
    strides = [int(stride) for stride in report.get("steps_per_sweep") or ()]
    tallest = max([int(report.get("window") or 1), *strides])
    return Column(
        name,
        str(report.get("title") or name),
        method,
        film_views(RunFolder(run.folder).film),
        _bars(strides, tallest),
        tallest,
    )


def _bars(strides: Sequence[int], tallest: int) -> list[tuple[float, float]]:
    """Returns the bars of a chart: left edge and height, in percent."""
    count = min(len(strides), _BARS)
    edges = [round(index * len(strides) / count) for index in range(count + 1)] if count else []
    means = [sum(strides[start:end]) / (end - start) for start, end in pairwise(edges)]
    return [(100 * i / count, 100 * mean / tallest) for i, mean in enumerate(means)]


def _row(
    reports: Sequence[Mapping[str, Any]],
    label: str,
    key: str,
    form: str,
    compared: Callable[[float, float], str] | None = None,
) -> Row:
    """Returns one figure of all runs.

    Args:
        reports: Those of the runs.
        label: What the figure is.
        key: Of the report.
        form: How the figure is written.
        compared: Says how a figure differs from the first run's.
    """
    values = [report.get(key) for report in reports]
    notes = [""] * len(values)
    if compared is not None and values[0] is not None:
        notes[1:] = ["" if each is None else compared(each, values[0]) for each in values[1:]]
    texts = [_NONE if value is None else form.format(value) for value in values]
    return Row(label, [Cell(text, note) for text, note in zip(texts, notes, strict=True)])


def _difference(value: float, first: float) -> str:
    """Says by how much a figure is higher."""
    return f"{value - first:+.2f} dB"


def _times(value: float, first: float) -> str:
    """Says how many times as fast as the first run this was."""
    return f"{first / value:.2f} times as fast" if value > 0 else ""


def _options(run: FinishedRun) -> dict[str, str]:
    """Returns the options of a run by dotted name, without those that change nothing of the object."""
    path = RunFolder(run.folder).config
    content = yaml.safe_load(path.read_text()) if path.is_file() else {}
    flat = dict(_flat(content if isinstance(content, dict) else {}))
    return {name: text for name, text in flat.items() if name not in _OF_THE_FOLDER}


def _flat(content: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Returns nested options by dotted name."""
    found: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value:
            found += _flat(value, f"{name}.")
        else:
            found.append((name, _text(value)))
    return found


def _text(value: Any) -> str:
    """Returns an option's value as it is written."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(options: Sequence[Mapping[str, str]]) -> tuple[list[Row], list[Row], int]:
    """Returns the options that differ, those that only some runs have, and how many are equal."""
    differing, partial, equal = [], [], 0
    for name in dict.fromkeys(name for each in options for name in each):
        texts = [each.get(name) for each in options]
        row = Row(name, [Cell(_NONE if text is None else text) for text in texts])
        if None in texts:
            partial.append(row)
        elif len(set(texts)) > 1:
            differing.append(row)
        else:
            equal += 1
    return differing, partial, equal
