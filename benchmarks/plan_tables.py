"""The tables of `plan_check.py`."""

from __future__ import annotations

import statistics

from result_store import Figures
from tables import markdown, number

BEYOND = ("characters", "characters, Muon", "lora", "lora, low rate", "diffusion")
ROUNDS = ("easy", "rough")
STEPS = {
    **dict.fromkeys(ROUNDS, 120),
    **dict.fromkeys(("lora", "lora, low rate"), 120),
    **dict.fromkeys(
        ("dreamfusion", "dreamfusion-nerf", "textmesh", "zero123", "dreamgaussian"), 80
    ),
    **dict.fromkeys(("characters", "characters, Muon"), 120),
    "diffusion": 60,
}
"""Steps that are taken of each."""

NOTES = """
*Seconds*: milliseconds a step; a closure that waits as long as a gradient of 16 views, or of the part that a data rank
has, takes on an H100 ([gpu_drift.md](gpu_drift.md); between measured sizes on a straight line), noisy gradients of a
quadratic, Adam, `DriftTolerance`. *Predicted* from 64 steps in one process with a window of 8, the latency and
bandwidth of messages between as many processes, and the number of cores that these share (`cores=`); *beside the
others*: from a window of 8 in as many processes, whose rollouts and commits take what they take beside each other.
Measured over whole sweeps after as many steps.

*Strides*: steps a sweep measured with each window, without the first two sweeps and the last, and predicted from the
run with a window of 8: from its first 48 steps / from all of its steps. *Drift error*: at the first two guesses, of the
group that is off most; *growth*: power of the distance with which a residual's share of what is accepted grows over the
farther half of the window. The column of window 8 shows what the first 48 steps say of the whole run.
"""


def said(found: Figures) -> str:
    """One run in short."""
    return f"{found['stride']:.2f} steps a sweep, {found['cpu_seconds']:.0f} s"


def body(content: Figures) -> tuple[str, str]:
    """Notes and tables of the document."""
    runs = content["runs"]
    parts = []
    for name in sorted((n for n in runs if n.startswith("seconds/")), key=lambda n: int(n[8:])):
        parts.append(seconds_table(int(name[8:]), runs[name]))
    tasks: dict[str, dict[int, Figures]] = {}
    for name, found in runs.items():
        task, window = name.split("/")
        if task != "seconds":
            tasks.setdefault(task, {})[int(window.split()[1])] = found
    if tasks:
        parts.append(strides_table(tasks))
    return NOTES, "\n\n".join(parts)


def seconds_table(numel: int, found: Figures) -> str:
    """Predicted and measured milliseconds of every shape."""
    rows, errors = [], {"predicted": [], "beside": []}
    for shape, row in found["shapes"].items():
        measured, cells = row["measured"], []
        for kind, known in errors.items():
            if kind not in row:
                cells += ["", ""]
                continue
            off = row[kind]["seconds"] / measured["seconds"] - 1
            known.append(abs(off))
            cells += [number(1e3 * row[kind]["seconds"]), f"{100 * off:+.0f} %"]
        strides = [f"{each['stride']:.2f}" for each in (row["predicted"], measured)]
        rows.append([shape, number(1e3 * measured["seconds"]), *cells, *strides])
    heads = ["", "measured", "predicted", "off", "beside the others", "off"]
    heads += ["stride predicted", "stride measured"]
    links = "; ".join(
        f"{1e3 * link['latency']:.1f} ms and {link['bandwidth'] / 1e9:.2f} GB/s between {ranks} processes"
        for ranks, link in found["links"].items()
    )
    most = [
        f"{100 * max(off):.0f} %, {100 * statistics.fmean(off):.0f} % in the mean"
        for off in errors.values()
        if off
    ]
    title = f"## Seconds, {numel:,} parameters\n\nMessages: {links}. Off by at most {most[0]}"
    beside = f"; beside the others by at most {most[1]}" if len(most) > 1 else ""
    beside = beside or "; predicted before plans knew of cores that ranks share"
    return f"{title}{beside}.\n\n{markdown(heads, rows)}"


def strides_table(tasks: dict[str, dict[int, Figures]]) -> str:
    """Measured strides of each window, and those that the runs with a window of 8 predict."""
    windows = sorted({window for runs in tasks.values() for window in runs})
    rows: list[list[str]] = []
    errors: dict[int, tuple[list[float], list[float]]] = {w: ([], []) for w in windows}
    for task, runs in tasks.items():
        of_probe = runs.get(8, {}).get("predicted", {})
        short, whole = [*of_probe.values(), None, None][:2]
        row = [task]
        for window in windows:
            if window not in runs:
                row.append("")
                continue
            measured, cells = runs[window]["stride"], []
            for index, predicted in enumerate((short, whole)):
                if predicted is None:
                    cells.append("?")
                    continue
                value = predicted["strides"][str(window)]
                errors[window][index].append(abs(value / measured - 1))
                cells.append(f"{value:.1f}")
            row.append(f"{measured:.1f} ({' / '.join(cells)})")
        told = whole or short
        error = told and told["drift_error"]
        row.append("" if error is None else f"{100 * error:.0f} %")
        row.append(f"{told['growth']:.1f}" if told else "")
        rows.append(row)
    for index, of in enumerate(("48 steps", "all steps")):
        cells = [
            f"{100 * statistics.median(off[index]):.0f} %, {100 * max(off[index]):.0f} %"
            if off[index]
            else ""
            for off in errors.values()
        ]
        rows.append([f"off by (median, largest), from {of}", *cells, "", ""])
    heads = ["", *(f"window {window}" for window in windows), "drift error", "growth"]
    return f"## Strides\n\n{markdown(heads, rows)}"
