"""What a step of each `paper` preset needs: memory and seconds, of the scenes on a CPU, of everything on a GPU.

    python benchmarks/paper_memory.py --out benchmarks/results/paper_memory.md
    python benchmarks/paper_memory.py --device cuda --out benchmarks/results/paper_memory.md

Each writes its own table of the file and leaves the other one alone. Each row runs in a process of its own, so that
its memory is its own and one that runs out of it stops no other.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gc
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paper_stages import BALL, GAUSSIANS, Brightness, Row, build_stage, paper_rows, picture
from picardopt_3d.methods import Stage
from picardopt_3d.methods.reference import Reference
from tables import machine, markdown, number

from picardopt import ParallelPicardOptimizer

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


# -- one row, in its own process ---------------------------------------------------------------------------


def on_gpu(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a stage with its guidance."""
    from full_size_models import full_size_guidance

    device, step = torch.device(options.device), row.largest()
    row = row.shrunk() if options.tiny else row
    guidance = full_size_guidance(row.config, device, options.tiny)
    if options.tiny or options.batch:
        row = with_views(row, options.batch or 2, 16 if options.tiny else None)
    found: dict[str, Any] = {"model": allocated(device), "views": row.views(step)}
    for state in row.states():
        stage: Any = build_stage(row, guidance, device, step, state == "grown")
        batch = row.views(step)[0]
        while batch:
            stage.config = with_views(row, batch).config
            try:
                found[state] = one_step(stage, step, device) | {"batch": batch}
                found |= of_window(stage, row, device)
                break
            except torch.OutOfMemoryError as error:
                print(f"{row.name}, {state}, {batch} views: {error}", file=sys.stderr)
            batch //= 2
            release(device)
        del stage
        release(device)
    return found


def one_step(stage: Stage, step: int, device: torch.device) -> dict[str, float]:
    """Seconds and peak of a step, after one without an update that sets up what a device sets up once."""
    optimizers = stage.optimizers()
    for last in (False, True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        torch.manual_seed(step)
        losses = stage.loss(step)
        losses.total.backward()
        if last:
            for optimizer in optimizers:
                optimizer.step()
        finite = math.isfinite(float(losses.total.detach()))
        seconds = time.perf_counter() - begun
    if not finite:
        print(f"{type(stage).__name__}: the loss is not finite", file=sys.stderr)
    return {"seconds": seconds, "peak": peak(device)}


def of_window(stage: Stage, row: Row, device: torch.device) -> dict[str, float]:
    """Bytes of what is trained, and of what a window adds to them: a sweep of the optimizer with gradients of 0."""
    bases = stage.optimizers()
    parameters = [p for base in bases for group in base.param_groups for p in group["params"]]
    held = list(parameters) + [p.grad for p in parameters if p.grad is not None]
    for base in bases:
        held += [v for state in base.state.values() for v in state.values() if torch.is_tensor(v)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    figures = {
        "parameters": float(sum(p.numel() for p in parameters)),
        "trained": float(sum(t.numel() * t.element_size() for t in held)),
    }
    before = reset_peak(device)
    window = row.config.picard.window or 7
    optimizer = ParallelPicardOptimizer(
        bases[0] if len(bases) == 1 else bases,
        window=window,
        tolerance=float("inf"),
        total_steps=window,
        audit="never",
    )

    def closure() -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), device=device)

    optimizer.step(closure)
    return figures | {"window": peak(device) - before}


def on_cpu(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one view of a scene, for each state a list by size."""
    torch.set_num_threads(1)
    device, step = torch.device("cpu"), row.largest()
    found: dict[str, Any] = {}
    for state in row.states():
        stage: Any = build_stage(row, Brightness(), device, step, state == "grown")
        for size in (8, *sizes_of(row, options)):  # the first one sets up what torch sets up once
            stage.config = with_views(row, 1, size).config
            if row.from_picture:
                stage.reference = Reference(
                    picture(stage.config), stage.config.reference_pixels, device
                )
            found.setdefault(state, []).append(one_view(stage, step, device))
        del found[state][0], stage
    return found


def sizes_of(row: Row, options: argparse.Namespace) -> list[int]:
    """Pixels along an edge of the views that are measured on a CPU; smaller beside a larger picture."""
    half = row.from_picture and with_views(row, 1, 64).pixels_at(0) > 2 * 64**2
    return [size // (2 if half else 1) for size in options.sizes]


def one_view(stage: Stage, step: int, device: torch.device) -> dict[str, float]:
    """Bytes that a step adds to what is resident, without gradients and with them, and its CPU seconds."""
    for optimizer in stage.optimizers():
        optimizer.zero_grad()
    torch.manual_seed(step)
    before = reset_peak(device)
    with torch.no_grad():
        stage.loss(step)
    forward = peak(device) - before
    torch.manual_seed(step)
    before = reset_peak(device)
    begun = time.process_time()
    stage.loss(step).total.backward()
    seconds = time.process_time() - begun
    return {"forward": forward, "both": peak(device) - before, "seconds": seconds}


def with_views(row: Row, batch: int, pixels: int | None = None) -> Row:
    """The row with other views at every step; the view at a picture's camera shrinks with them."""
    config: Any = replace(row.config, batch=batch)
    if pixels is not None:
        config = replace(config, pixels=pixels)
        sizes = getattr(config, "reference_pixels", None)
        if sizes is not None:
            last = sizes if isinstance(sizes, int) else sizes[-1][1]
            beside = last * pixels // row.views(row.largest())[1]
            config = replace(config, reference_pixels=max(16, beside))
    return replace(row, config=config)


def allocated(device: torch.device) -> float:
    """Bytes in use now."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated())
    return resident("VmRSS")


def peak(device: torch.device) -> float:
    """Most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())
    return resident("VmHWM")


def reset_peak(device: torch.device) -> float:
    """Forgets earlier peaks, and returns the bytes in use."""
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return allocated(device)


def release(device: torch.device) -> None:
    """Gives back what is not in use, so that it hides no peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def resident(name: str) -> float:
    """An entry of Linux's status of this process, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024.0 * int(found[1]) if found else float("nan")


# -- all rows, and the file --------------------------------------------------------------------------------


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
