"""The panel beside the scene: what is asked for, how far the run is, its curves and its settings."""

from __future__ import annotations

import html
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from picardopt_3d.run.record import RunRecord

if TYPE_CHECKING:
    from viser import GuiImageHandle, GuiUplotHandle, ViserServer

_POINTS = 400
"""Points of a curve; of longer ones neighbours are averaged."""
_BLUE, _ORANGE = "#1f77b4", "#d62728"

Curve = npt.NDArray[np.float64]


class Controls:
    """What the clients of a run ask it for; set by their threads, read by the run's.

    Attributes:
        paused: Set while the run is to stand still.
        save: Set once a checkpoint is asked for, until it is written.
    """

    def __init__(self) -> None:
        self.paused, self.save = threading.Event(), threading.Event()


class Panel:
    """The panel, which all clients share.

    All text is escaped: viser would run a prompt's braces as code if it were given as Markdown.

    Args:
        server: The server.
        title: What is asked for.
        settings: The run's options.
        controls: Where its buttons leave what is asked for; None: no buttons.
    """

    def __init__(
        self, server: ViserServer, title: str, settings: str, controls: Controls | None
    ) -> None:
        gui = server.gui
        self._server = server
        self._plots: dict[str, GuiUplotHandle] = {}
        self._picture: GuiImageHandle | None = None
        gui.add_html(
            f'<div style="padding:0 1em;font-size:1.1em"><b>{html.escape(title)}</b></div>'
        )
        self._figures = gui.add_html("")
        if controls is not None:
            self._add_buttons(controls)
        self._curves = gui.add_folder("Strides, residuals, losses")
        with gui.add_folder("Settings", expand_by_default=False):
            style = "font-size:0.75em;padding:0 1em;overflow-x:auto"
            gui.add_html(f'<pre style="{style}">{html.escape(settings)}</pre>')

    def _add_buttons(self, controls: Controls) -> None:
        """Adds what the clients can ask for."""
        pause = self._server.gui.add_button("Pause", hint="Pauses after a step")
        save = self._server.gui.add_button("Save a checkpoint", hint="Written after a step")

        @pause.on_click
        def _(_: Any) -> None:
            if controls.paused.is_set():
                controls.paused.clear()
            else:
                controls.paused.set()
            pause.label = "Continue" if controls.paused.is_set() else "Pause"

        @save.on_click
        def _(_: Any) -> None:
            controls.save.set()

    def say(self, lines: Sequence[tuple[str, str]]) -> None:
        """Shows names and values, a line each."""
        rows = "".join(
            f'<tr><td style="padding-right:1em;color:gray">{html.escape(name)}</td><td>{html.escape(value)}</td></tr>'
            for name, value in lines
        )
        content = f'<table style="padding:0 1em;font-size:0.85em">{rows}</table>'
        if content != self._figures.content:
            self._figures.content = content

    def plot(self, record: RunRecord) -> None:
        """Draws the curves of a record."""
        losses = np.array(record.losses, float)
        self._draw("loss", losses, "step", {"loss": losses})
        strides = np.array(record.strides, float)
        self._draw("stride", strides, "sweep", {"steps made final": strides})
        residuals, tolerances = medians(record.residuals), medians(record.tolerances)
        curves = {"residual": residuals}
        if bool(np.isfinite(tolerances).any()):
            curves["tolerance"] = tolerances
        self._draw("residual", residuals, "sweep", curves, logarithmic=True)

    def _draw(
        self,
        name: str,
        values: Curve,
        unit: str,
        curves: dict[str, Curve],
        logarithmic: bool = False,
    ) -> None:
        """Draws curves over steps or sweeps, or draws them anew."""
        data = thinned(list(curves.values()), logarithmic)
        if data[0].size < 2:
            return
        if logarithmic:  # by numbers: a logarithmic axis of the library is all ticks
            data[1:] = [np.log10(values) for values in data[1:]]
        series: list[Any] = [{"label": unit}]
        for label, colour in zip(curves, (_BLUE, _ORANGE), strict=False):
            series.append({"label": label, "stroke": colour, "width": 1.5})
        if name in self._plots:
            plot = self._plots[name]
            if len(plot.series) == len(series):
                plot.data = tuple(data)
                return
            plot.remove()
        scales: Any = {"x": {"time": False}}
        with self._curves:
            self._plots[name] = self._server.gui.add_uplot(
                tuple(data),
                tuple(series),
                title=f"{' and '.join(curves)} by {unit}{', log10' if logarithmic else ''}",
                scales=scales,
                axes=(
                    {},
                    {"grid": {"show": not logarithmic}},
                ),  # a line for each tick is a grey field
                height=130,
            )

    def picture(self, path: Path) -> None:
        """Shows a picture that the run has written."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        if self._picture is None:
            self._picture = self._server.gui.add_image(pixels, label=path.stem)
        else:
            self._picture.image, self._picture.label = pixels, path.stem


def lines_of(record: RunRecord, state: str) -> list[tuple[str, str]]:
    """Returns how far a run is, as names and values.

    Args:
        record: Its record.
        state: What it is doing.
    """
    lines = [("state", state), ("step", f"{record.step} of {record.figures.get('steps', '?')}")]
    if record.sweeps:
        lines.append(("steps a sweep", f"{record.mean_stride:.2f} ({record.sweeps} sweeps)"))
    if record.losses:
        recent = record.losses[-20:]
        lines.append(("loss", f"{sum(recent) / len(recent):.4g}"))
    lines += [(name, f"{history[-1][-1]:,}") for name, history in record.counts.items()]
    lines.append(("seconds", f"{record.seconds:.0f}"))
    return lines


def medians(sweeps: Sequence[Sequence[float]]) -> Curve:
    """Returns the median over the slots of each sweep; NaN where nothing was compared, or it is 0 or without bound."""
    found = (statistics.median(slots) if slots else np.nan for slots in sweeps)
    values = np.array([float(each) for each in found])
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def thinned(curves: Sequence[Curve], logarithmic: bool = False) -> list[Curve]:
    """Returns positions, counted from 1, and values; gaps, and neighbours where there are too many, are joined.

    Args:
        curves: Values at the same positions; NaN: none.
        logarithmic: Whether the logarithms are averaged.
    """
    known = np.flatnonzero(np.isfinite(np.stack(curves)).all(0))
    parts = np.array_split(known, min(len(known), _POINTS)) if len(known) else []

    def mean(values: Curve) -> float:
        return float(np.exp(np.log(values).mean()) if logarithmic else values.mean())

    positions = np.array([part[-1] + 1 for part in parts], float)
    return [positions, *(np.array([mean(curve[part]) for part in parts]) for curve in curves)]
