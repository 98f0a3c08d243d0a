"""What a step of each `paper` preset needs: memory and seconds, of the scenes on a CPU, of everything on a GPU.

    python benchmarks/paper_memory.py --out benchmarks/results/paper_memory.md
    python benchmarks/paper_memory.py --device cuda --out benchmarks/results/paper_memory.md

Each writes its own table of the file and leaves the other one alone. Each row runs in a process of its own, so that
its memory is its own and one that runs out of it stops no other.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paper_stages import BALL, GAUSSIANS, Row, paper_rows
from paper_steps import on_cpu, on_gpu, sizes_of, with_views
from tables import machine, markdown, number

SIZES = (64, 128)
INTRODUCTION = f"""
# Memory of a step at paper size

One optimizer step (loss, backward pass, base optimizer) of each stage of each `paper` preset: the last of the steps
with the most pixels, on the preset's own scene. *New* is a scene as it begins. *Grown* is one at work: a field whose
cells are occupied in a ball of {BALL:g} times its radius, or {GAUSSIANS:,} 3D Gaussians; a mesh needs what it
needs from the start. Meshes are made of a new field, or (for a texture) are a sphere of 79,600 triangles.
""".strip()
CPU_NOTES = """
The scenes alone, on one thread: the guidance is replaced by the mean square of the views. *Forward* is by how much one
view raises the resident memory without gradients, *both* by how much with them, MB. The last column is what a
step's views would take, GiB: the line through the two sizes, in pixels, at views x pixels x pixels. Beyond
524,288 samples a field is evaluated in parts that the backward pass evaluates again, so that memory grows more slowly
than with few pixels, and the line is a bound from above. A step that also draws the view of a picture does so here, at
a size that shrinks with the others, and its pixels count too; its sizes are half as large.
""".strip()
GPU_NOTES = """
Models of the real classes and sizes with random weights, in float16, without text encoders, whose embeddings are random
(`full_size_models.py`). Peaks are the allocator's, GiB, of one process that evaluates one step. *Model*: the guidance
alone. *Trained*: parameters, gradients and moments of everything that is trained, MB. *Window*: what a window of 7
adds in one process, GiB. Seconds are of the second step, without what a first one sets up. Where a batch does not fit,
it is halved until it does.
""".strip()
GPU_COLUMNS = [
    *("stage", "guidance", "views", "parameters", "model", "trained", "window"),
    *("new", "s", "grown", "s", "note"),
]
CPU_COLUMNS = [
    "stage",
    "scene",
    "pixels",
    "forward",
    "both",
    "s",
    "views of a step",
    "extrapolated",
]


def results(jobs: list[list[str]], options: argparse.Namespace) -> Iterator[dict[str, Any] | str]:
    """What each job found, or why there is nothing; some start ahead and wait with their imports done."""
    ahead = options.ahead if options.device == "cuda" else 1
    waiting: collections.deque[subprocess.Popen[str]] = collections.deque()
    deadline = time.monotonic() + options.limit
    for index in range(len(jobs)):
        while len(waiting) < ahead and index + len(waiting) < len(jobs):
            command = [sys.executable, __file__, *jobs[index + len(waiting)]]
            command += [f"--device={options.device}", *(["--tiny"] if options.tiny else [])]
            if options.batch:
                command.append(f"--batch={options.batch}")
            pipe = subprocess.PIPE
            waiting.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        job = waiting.popleft()
        left = min(options.row_limit, deadline - time.monotonic())
        if left <= 0:
            job.kill()
            yield "not measured: out of time"
            continue
        try:
            output, _ = job.communicate("go\n", timeout=left)
            yield json.loads(output.splitlines()[-1]) if job.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            job.kill()
            job.communicate()
            yield f"stopped after {left:.0f} s"


def gpu_line(row: Row, found: dict[str, Any] | str) -> list[object]:
    asked = row.views(row.largest()) if isinstance(found, str) else found["views"]
    batch, pixels = asked
    guidance = row.config.guidance.model
    guidance += "" if row.config.guidance.loss == "sds" else f", {row.config.guidance.loss}"
    start: list[object] = [row.name, guidance, f"{batch} x {pixels} px"]
    if isinstance(found, str):
        return [*start, *["-"] * 8, found]
    size = f"{found['parameters']:,.0f}" if "parameters" in found else "-"
    cells: list[object] = [size, gib(found["model"])]
    cells += [number(found["trained"] / 1e6) if "trained" in found else "-"]
    cells += [gib(found["window"]) if "window" in found else "-"]
    notes = []
    for state in ("new", "grown"):
        if state not in found:
            cells += ["-", "-"]
            continue
        cells += [gib(found[state]["peak"]), number(found[state]["seconds"])]
        if found[state]["batch"] != batch:
            notes.append(f"{state}: {batch} views do not fit, {found[state]['batch']} do")
    if "new" not in found:
        notes.append("out of memory with one view")
    return [*start, *cells, "; ".join(notes)]


def gib(count: float) -> str:
    return number(count / 2**30)


def gpu_table(rows: list[Row], options: argparse.Namespace) -> Iterator[list[list[object]]]:
    """The table after each row."""
    lines: list[list[object]] = []
    for row, found in zip(rows, results([[f"--row={r.name}"] for r in rows], options), strict=True):
        lines.append(gpu_line(row, found))
        yield lines


def cpu_table(rows: list[Row], options: argparse.Namespace) -> Iterator[list[list[object]]]:
    """The table after each stage: a line for each state and size."""
    lines: list[list[object]] = []
    jobs = [[f"--row={row.name}", "--sizes", *map(str, options.sizes)] for row in rows]
    for row, found in zip(rows, results(jobs, options), strict=True):
        if isinstance(found, str):
            lines.append([row.name, *6 * ["-"], found])
            yield lines
            continue
        step, sizes = row.largest(), sizes_of(row, options)
        batch, pixels = row.views(step)
        measured = [with_views(row, 1, size).pixels_at(step) for size in sizes]
        for state, each in found.items():
            for size, figures in zip(sizes, each, strict=True):
                shown = [figures["forward"] / 2**20, figures["both"] / 2**20, figures["seconds"]]
                lines.append([row.name, state, size, *map(number, shown), "", ""])
            total = extrapolated(measured, each, row.pixels_at(step))
            lines[-1][-2:] = [f"{batch} x {pixels} px", gib(total)]
        yield lines


def extrapolated(measured: list[int], each: list[Any], pixels: int) -> float:
    """The line through the peaks of the first and the last size, at a number of pixels; bytes."""
    first, last = each[0]["both"], each[-1]["both"]
    slope = max(0.0, last - first) / (measured[-1] - measured[0])
    return float(last + slope * (pixels - measured[-1]))


def section(title: str, notes: str, command: str, where: str, table: str) -> str:
    return f"## {title}\n\n{notes}\n\n`{command}`\n\n{where}.\n\n{table}\n"


def replaced(path: Path | None, title: str, text: str) -> str:
    """The file with one of its two sections written anew; a missing one says that it is not measured."""
    old = path.read_text() if path is not None and path.exists() else ""
    kept = {part.partition("\n")[0]: part for part in re.split(r"^## ", old, flags=re.M)[1:]}
    parts = []
    for name in TITLES.values():
        other = (
            "## " + kept[name].strip() + "\n" if name in kept else f"## {name}\n\nNot measured.\n"
        )
        parts.append(text if name == title else other)
    return "\n".join([INTRODUCTION + "\n", *parts])


TITLES = {"cpu": "CPU: the scenes", "cuda": "GPU: whole steps"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--stages", nargs="+", help="such as magic3d/refine; all if left out")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for all")
    parser.add_argument("--row-limit", type=float, default=300, help="seconds for a row")
    parser.add_argument("--ahead", type=int, default=6, help="processes that wait on a GPU")
    parser.add_argument("--batch", type=int, help="views of a step in place of the preset's")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pixels, on a CPU")
    parser.add_argument(
        "--tiny", action="store_true", help="tries the GPU's rows with small models"
    )
    parser.add_argument("--out", type=Path, help="the Markdown file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = list(paper_rows())
    whole = options.device == "cuda" or options.tiny
    if options.row is not None:
        row = next(row for row in rows if row.name == options.row)
        if whole:
            import full_size_models  # noqa: F401  (slow, and done before the row's turn)
        if not sys.stdin.readline():  # whoever started it has ended
            return
        print(json.dumps((on_gpu if whole else on_cpu)(row, options)))
        return
    if options.stages:
        known = {row.name: row for row in rows}
        unknown = [name for name in options.stages if name not in known]
        if unknown:
            parser.error(f"no stage {', '.join(unknown)}: give some of {', '.join(known)}")
        rows = [known[name] for name in options.stages]
    where, command = machine(), " ".join(["python", *sys.argv])
    title, notes = TITLES["cuda" if whole else "cpu"], GPU_NOTES if whole else CPU_NOTES
    columns, table = (GPU_COLUMNS, gpu_table) if whole else (CPU_COLUMNS, cpu_table)
    text = ""
    for lines in table(rows, options):
        print(" | ".join(map(str, lines[-1])), flush=True)
        text = replaced(
            options.out, title, section(title, notes, command, where, markdown(columns, lines))
        )
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
