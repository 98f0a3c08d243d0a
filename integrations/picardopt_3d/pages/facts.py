"""What a report says of a run, in words and units for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Report = Mapping[str, Any]


class Fact(NamedTuple):
    """One thing to know.

    Attributes:
        label: What it is.
        value: In words or with its unit.
        note: More about it; "" for nothing.
    """

    label: str
    value: str
    note: str = ""


def headline(report: Report) -> list[Fact]:
    """Returns the few figures that are looked at first; what a report does not have is left out."""
    done, planned = report.get("steps_done"), report.get("steps")
    stopped = done is not None and planned is not None and done < planned
    facts = [
        _fact(report, "psnr", "against the true views", "{:.1f} dB"),
        _fact(report, "steps_done", f"of {planned:,} steps" if stopped else "steps", "{:,}"),
        _fact(report, "sweeps", "sweeps", "{:,}"),
        _fact(report, "mean_stride", "steps a sweep", "{:.2f}"),
        _fact(report, "seconds", "of optimization", "{:,.1f} s"),
    ]
    return [fact for fact in facts if fact is not None]


def settings(report: Report) -> list[Fact]:
    """Returns how a run was made and what it took; what a report does not have is left out."""
    source = report.get("guidance_source")
    facts = [
        _fact(report, "title", "Asked for"),
        _fact(report, "method", "Method"),
        _fact(report, "preset", "Preset"),
        _fact(report, "guidance", "Guidance", note="" if source is None else str(source)),
        _fact(report, "seed", "Seed"),
        _fact(report, "size", "Views", "{} pixels"),
        _fact(report, "steps_done", "Steps", "{:,}", note=_planned(report)),
        _fact(report, "sweeps", "Sweeps", "{:,}", note=_per_sweep(report)),
        _fact(report, "window", "Window", "{} steps"),
        _fact(report, "tolerance", "Tolerance"),
        _fact(report, "predictor", "Predictor"),
        _fact(report, "workers", "Workers", note=_threads(report)),
        _fact(report, "drift_evaluations", "Gradients", "{:,}", note=_wasted(report)),
        _fact(report, "seconds", "Optimization", "{:,.1f} s"),
        _fact(report, "startup_seconds", "Start-up", "{:,.1f} s"),
        _fact(report, "total_seconds", "In all", "{:,.1f} s"),
        _fact(report, "psnr", "PSNR", "{:.2f} dB", note=str(report.get("psnr_note") or "")),
        *_counts(report),
        _fact(report, "device", "Device", note=str(report.get("machine") or "")),
        _fact(report, "picardopt", "picardopt"),
        _fact(report, "torch", "torch"),
    ]
    return [fact for fact in facts if fact is not None]


def stages(report: Report) -> list[list[str]]:
    """Returns a row for each of several stages: name, steps, sweeps, steps a sweep, seconds, PSNR."""
    shows: dict[str, Callable[[Any], str]] = {
        "name": str,
        "steps_done": "{:,}".format,
        "sweeps": "{:,}".format,
        "mean_stride": "{:.2f}".format,
        "seconds": "{:,.1f}".format,
        "psnr": "{:.1f}".format,
    }
    return [
        ["-" if stage.get(key) is None else show(stage[key]) for key, show in shows.items()]
        for stage in report.get("stages") or ()
    ]


def _fact(report: Report, key: str, label: str, form: str = "{}", note: str = "") -> Fact | None:
    """Returns an entry of a report; None: it has none."""
    value = report.get(key)
    return None if value is None else Fact(label, form.format(value), note)


def _planned(report: Report) -> str:
    """Says that a run was stopped."""
    done, planned = report.get("steps_done"), report.get("steps")
    return f"of {planned:,}: it was stopped" if done is not None and done != planned else ""


def _per_sweep(report: Report) -> str:
    """Says how many steps a sweep made final."""
    if report.get("sequential"):
        return "one step at a time"
    mean = report.get("mean_stride")
    return "" if mean is None else f"{mean:.2f} steps each"


def _threads(report: Report) -> str:
    """Says how many threads a worker had."""
    count = report.get("threads_per_worker")
    return "" if count is None else f"{count} thread{'s' * (count != 1)} each"


def _wasted(report: Report) -> str:
    """Says how many gradients became no step."""
    wasted = report.get("wasted_evaluations")
    return "" if wasted is None else f"{wasted:,} of them became no step"


def _counts(report: Report) -> list[Fact]:
    """Returns the number of parts of each kind that the scene has in the end."""
    names = report.get("counts") or {}
    return [
        Fact(name[:1].upper() + name[1:], f"{report[name.lower()]:,}")
        for name in names
        if name.lower() in report
    ]
