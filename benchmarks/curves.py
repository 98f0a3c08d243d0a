"""Seconds of a gradient by its batch: measured points, straight lines between them, and beyond them the last line."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
GPU_DRIFT, GPU_CURVE = RESULTS / "gpu_drift.md", RESULTS / "gpu_curve.json"
MEASURED, BETWEEN, BEYOND = "measured", "between measured", "beyond measured"


@dataclass(frozen=True)
class Curve:
    """What was measured.

    Attributes:
        points: Seconds of a gradient by batch size.
        source: Where they are from.
    """

    points: Mapping[int, float]
    source: str

    def seconds(self, batch: int) -> float:
        """A gradient's, of this batch; the smallest measured batch takes no more than a smaller one."""
        sizes = sorted(self.points)
        if batch <= sizes[0] or len(sizes) == 1:
            return self.points[sizes[0]]
        below = max(size for size in sizes[:-1] if size < batch)
        above = sizes[sizes.index(below) + 1]
        slope = (self.points[above] - self.points[below]) / (above - below)
        return self.points[below] + slope * (batch - below)

    def how(self, batch: int) -> str:
        """Where the seconds of a batch are from."""
        if batch in self.points:
            return MEASURED
        return BETWEEN if min(self.points) < batch < max(self.points) else BEYOND


def gpu_drift(path: Path = GPU_DRIFT) -> list[dict[str, float]]:
    """The eager rows of `gpu_drift.py`'s table, in its milliseconds."""
    lines = [line.strip("| ") for line in path.read_text().splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    found = [dict(zip(names, cells, strict=True)) for cells in rows]
    eager = [row for row in found if row.pop("UNet", "eager") == "eager"]
    return [{name: float(cell) for name, cell in row.items()} for row in eager]


def gpu() -> Curve:
    """Of a UNet of Stable Diffusion 2.1's size on a GPU: `gpu_curve.py`'s where that was run, else `gpu_drift.py`'s."""
    if GPU_CURVE.exists():
        content = json.loads(GPU_CURVE.read_text())
        points = {
            point["batch"]: 1e-3 * point["milliseconds"]
            for point in content["points"]
            if point["model"] == "sd21" and not point["compiled"]
        }
        return Curve(points, f"{_device(content['machine'])}, benchmarks/results/{GPU_CURVE.name}")
    points = {int(row["views"]): 1e-3 * row["plain step"] for row in gpu_drift()}
    device = _device(GPU_DRIFT.read_text())
    return Curve(points, f"{device}, plain steps of benchmarks/results/{GPU_DRIFT.name}")


def _device(text: str) -> str:
    """The GPU's name in a line of `tables.machine`."""
    found = re.search(r"NVIDIA [^;\n]+", text)
    return found[0] if found else "a GPU"


@contextmanager
def processor_time() -> Iterator[None]:
    """Lets what reads `time.perf_counter` inside the block tell this process's own time: others share the machine."""
    clock, time.perf_counter = time.perf_counter, time.process_time
    try:
        yield
    finally:
        time.perf_counter = clock


def parse(texts: list[str]) -> Curve:
    """A curve from a command's arguments, "16:90.8" for 16 views in 90.8 milliseconds.

    Raises:
        ValueError: One is no such text.
    """
    points = {}
    for text in texts:
        size, _, milliseconds = text.partition(":")
        points[int(size)] = 1e-3 * float(milliseconds)
    return Curve(points, "as given")
