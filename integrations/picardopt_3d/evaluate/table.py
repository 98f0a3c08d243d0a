"""Tables of figures, as aligned text and as CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from picardopt_3d.evaluate.figures import Figures
from picardopt_3d.io import replacing

_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("R-precision", "r_precision", lambda value: f"{100 * value:.1f} %"),
    ("Frechet", "frechet", lambda value: f"{value:.4g}"),
    ("PSNR", "psnr", lambda value: f"{value:.2f} dB"),
    ("SSIM", "ssim", lambda value: f"{value:.3f}"),
    ("steps", "steps", lambda value: f"{value:.0f}"),
    ("steps/sweep", "mean_stride", lambda value: f"{value:.2f}"),
    ("seconds", "seconds", lambda value: f"{value:.1f}"),
    ("with start-up", "seconds_with_startup", lambda value: f"{value:.1f}"),
)


def text_table(lines: Sequence[Figures]) -> str:
    """Returns the figures in aligned columns, with "-" for missing ones and groups below a rule."""
    heads = ["run", "prompt", "method", *(head for head, _, _ in _COLUMNS)]
    rows = [
        [
            line.name,
            line.prompt or "-",
            "-" if line.method is None else f"{line.method} {line.preset or ''}".strip(),
            *(_shown(getattr(line, entry), show) for _, entry, show in _COLUMNS),
        ]
        for line in lines
    ]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    words = 3  # the number of columns with words, which are aligned to the left; figures are to the right

    def aligned(row: Sequence[str]) -> str:
        cells = [
            text.ljust(width) if column < words else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    single = [aligned(row) for row, line in zip(rows, lines, strict=True) if line.runs == 1]
    groups = [aligned(row) for row, line in zip(rows, lines, strict=True) if line.runs > 1]
    return "\n".join([aligned(heads), rule, *single, *([rule, *groups] if groups else [])])


def write_csv(lines: Sequence[Figures], path: Path) -> None:
    """Writes all figures in full precision, with the names of `Figures` as heads and empty cells for missing ones."""
    heads = [entry.name for entry in dataclasses.fields(Figures)]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(line) for line in lines)


def _shown(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)
