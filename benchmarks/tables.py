"""Markdown tables of measurements, each with the command, machine and versions that made it."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch


def machine() -> str:
    """One line: processor, cores, memory, accelerator if any, versions, and how busy it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    parts.append(f"Python {platform.python_version()}, torch {torch.__version__}")
    parts.append(f"load average {os.getloadavg()[0]:.1f}")
    return "; ".join(parts)


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lays out a table, numbers to the right."""
    lines = [headers, ["---:"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant figures, never in exponent notation."""
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def mean(values: Iterable[float], form: str = "{:.2f}") -> str:
    """Their mean, or nothing where there are none."""
    found = list(values)
    return form.format(statistics.fmean(found)) if found else ""


def document(title: str, command: str, where: str, notes: str, table: str) -> str:
    """A result file: what was run, where (`machine` before the run), how to read it, the table."""
    return f"# {title}\n\n`{command}`\n\n{where}.\n\n{notes.strip()}\n\n{table}\n"


def publish(text: str, out: Path | None) -> None:
    """Prints a result file, and writes it where one is asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    sys.stdout.write(text)


COLUMNS = {
    "test_plain_step": "plain step",
    "test_snapshot": "snapshot",
    "test_commit": "commit",
    "test_rollout": "rollout of 8",
    "test_residuals": "residuals of 8",
}
NOTES = """
Milliseconds, the fastest of at least five rounds (others may share the machine), one thread,
float32 Adam. *Plain step* is `base.step()` alone, for comparison; *snapshot* captures the
optimizer's state and restores it; *commit* is one accepted step taken for real, with the copy of
its drift into `.grad`; *rollout of 8* is what one sweep of a window of 8 does with the base:
snapshot, eight speculative steps, each stored in its iterate, restore; *residuals of 8* compares
the window before and after. The drifts, nearly all the cost of a real step, are not in here.
"""


def costs(report: Path) -> str:
    """Turns pytest-benchmark's JSON of `test_rollout.py` into the table of costs."""
    found: dict[tuple[int, int, bool], dict[str, float]] = {}
    for bench in json.loads(report.read_text())["benchmarks"]:
        size = bench["params"]
        key = (size["numel"], size["tensors"], size["foreach"])
        name = bench["name"].partition("[")[0]
        found.setdefault(key, {})[name] = 1e3 * bench["stats"]["min"]
    rows = [
        [f"{numel:,}", tensors, "on" if foreach else "off", *(number(times[c]) for c in COLUMNS)]
        for (numel, tensors, foreach), times in sorted(found.items())
    ]
    return markdown(["parameters", "tensors", "foreach", *COLUMNS.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=costs.__doc__)
    parser.add_argument("report", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("out", type=Path, help="the Markdown file")
    options = parser.parse_args()
    command = f"pytest benchmarks --benchmark-json={options.report}"
    command += f" && python benchmarks/tables.py {options.report} {options.out}"
    title = "Cost of rollout, snapshot and commit"
    text = document(title, command, machine(), NOTES, costs(options.report))
    publish(text, options.out)


if __name__ == "__main__":
    main()
