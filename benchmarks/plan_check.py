"""What `picardopt.plan` predicts, against what runs measure: strides of other windows, and seconds a step.

    python benchmarks/plan_check.py                       # everything, or what is missing of it
    python benchmarks/plan_check.py --only strides        # one half
    python benchmarks/plan_check.py --render              # write the tables of the runs that are there

Strides: every task is run with each window; the run with a window of 8, and of it the first 48 steps alone, predict the
others. Seconds: a small problem whose closure waits as long as a gradient of a real network takes on a GPU, measured,
so that two cores stand in for several devices; a probe in one process predicts what 1, 2 and 4 processes take, and
another one in as many processes, which has the others at work beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from curves import gpu
from plan_tables import STEPS, body, said
from result_store import Figures, ResultStore
from torch.distributed.device_mesh import init_device_mesh

from picardopt import DriftTolerance, ParallelPicardOptimizer, launch, plan
from picardopt.forecast import FIRST_SWEEPS, Forecast, growth, shares
from picardopt.links import Link
from picardopt.planner import MESSAGES, option
from picardopt.ranks import make_grid
from picardopt.transport.pairwise import PairwiseTransport

PROBE, PROBE_STEPS = 8, 48
"""The window that predicts, and the steps of the short probe."""
BATCH = 16
SHAPES = [(1, 1, 1), (2, 1, 1), (2, 1, 4), (1, 2, 1), (4, 1, 1), (2, 2, 1), (1, 4, 1)]
"""Picard ranks, data ranks and slots a rank of each measured run."""


def strides(task: tuple[str, int, int, Path, bool]) -> tuple[str, Figures]:
    """Runs one task with one window in this process."""
    from plan_tasks import (
        training,  # seconds to import, which the workers of the other half need not spend
    )

    name, window, steps, cache, short = task
    torch.set_num_threads(1)
    run, begin = training(name, window, cache, short), time.process_time()
    for _ in range(steps):
        run.step()
    stats = run.optimizer.stats
    whole = [record.stride for record in stats.records if record.slots == window]
    counted = whole[FIRST_SWEEPS:-1] or whole  # the last one may be cut off
    found: Figures = {
        "steps": steps,
        "stride": statistics.fmean(counted),
        "strides": stats.strides,
        "evaluations_per_step": stats.drift_evaluations / steps,
        "cpu_seconds": time.process_time() - begin,
    }
    if window == PROBE:
        found["predicted"] = {
            str(most): predictions(run.optimizer, most) for most in (PROBE_STEPS, steps)
        }
    return f"{name}/window {window}", found


def predictions(optimizer: ParallelPicardOptimizer, steps: int) -> Figures | None:
    """What the first steps of a run tell of other windows; None if they are too few."""
    records = [record for record in optimizer.stats.records if record.step < steps]
    try:
        forecast = Forecast(records, holds_back=optimizer.tolerance.needs_pairs)
    except ValueError:
        return None
    powers = [growth(shares(r.measures, r.accepts)) for r in forecast.records if r.measures]
    return {
        "strides": {str(window): forecast.mean_stride(window) for window in (2, 4, 8, 16, 32)},
        "drift_error": forecast.drift_error(),
        "growth": statistics.median([power for power in powers if power is not None] or [0.0]),
    }


class Problem:
    """Noisy gradients of ``x' A x / 2`` that take as long as a GPU would.

    Args:
        numel: Parameters.
    """

    def __init__(self, numel: int) -> None:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            torch.randn(numel // 20, generator=generator, requires_grad=True) for _ in range(20)
        ]
        self.noise = torch.randn(numel // 20 + 4096, generator=generator)
        self.base = torch.optim.Adam(self.parameters, lr=1e-3)

    def closure(self, seconds: float) -> Callable[[int], torch.Tensor]:
        def evaluate(step: int) -> torch.Tensor:
            end = time.perf_counter() + seconds
            at = int(torch.randint(4096, ()))
            for parameter in self.parameters:
                noise = self.noise[at : at + parameter.numel()]
                parameter.grad = torch.add(noise, parameter.detach())
            time.sleep(max(0.0, end - time.perf_counter()))
            return torch.zeros(())

        return evaluate

    def wrap(self, **options: Any) -> ParallelPicardOptimizer:
        return ParallelPicardOptimizer(self.base, tolerance=DriftTolerance(), **options)


def predict(
    numel: int, steps: int, links: dict[int, Link], ranks: int, cores: int | None
) -> dict[str, Figures]:
    """Seconds a step of the shapes of so many ranks (None: of all shapes), from a probe and the link of as many.

    Args:
        numel: Parameters.
        steps: Of the probe.
        links: By number of processes.
        ranks: Of the shapes; 0: any number.
        cores: That the ranks share, as far as the prediction is to know; None where the probe ran beside the others.
    """
    problem, curve = Problem(numel), gpu()
    optimizer = problem.wrap(window=PROBE)
    closure = problem.closure(curve.seconds(BATCH))
    for _ in range(max(PROBE_STEPS, steps)):
        optimizer.step(closure)
    parts = [BATCH // data for data in (1, 2, 4)]
    closures = {part: problem.closure(curve.seconds(part)) for part in parts}
    measured = plan(optimizer, closures, 8).measured
    found = {}
    for picard, data, slots in SHAPES:
        if ranks in (0, picard * data):
            link = links[max(2, picard * data)]
            each = option(measured, link, picard, data, slots, cores=cores)
            found[name_of(picard, data, slots)] = {"seconds": each.seconds, "stride": each.stride}
    return found


def name_of(picard: int, data: int, slots: int) -> str:
    """What the tables call a shape."""
    if picard == 1:
        return "one device" if data == 1 else f"data parallel on {data}"
    name = f"{picard} x {data}" if data > 1 else f"{picard}"
    return f"Picard on {name}" + (f", {slots} slots a rank" if slots > 1 else "")


def measure(numel: int, shape: tuple[int, int, int], steps: int) -> Figures:
    """One rank's seconds a step, and its stride."""
    picard, data, slots = shape
    problem = Problem(numel)
    closure = problem.closure(gpu().seconds(BATCH // data))
    if picard == 1:
        return {"seconds": loop(problem, closure, data, steps), "stride": 1.0}
    mesh = init_device_mesh("cpu", (picard, data), mesh_dim_names=("picard", "data"))
    optimizer = problem.wrap(window=picard * slots, mesh=mesh)
    starts: list[tuple[float, int]] = []
    for step in range(2 * steps):
        before, now = optimizer.stats.sweeps, time.perf_counter()
        optimizer.step(closure)
        if step >= steps and optimizer.stats.sweeps > before:
            starts.append((now, step))
    (begin, first), (end, last) = starts[0], starts[-1]
    return {"seconds": (end - begin) / (last - first), "stride": (last - first) / (len(starts) - 1)}


def loop(problem: Problem, closure: Callable[[int], torch.Tensor], ranks: int, steps: int) -> float:
    """Seconds a step of the plain loop, whose ranks average one flat gradient."""
    flat = torch.zeros(sum(p.numel() for p in problem.parameters))
    views = list(flat.split([p.numel() for p in problem.parameters]))
    begin = 0.0
    for step in range(2 * steps):
        if step == steps:
            begin = time.perf_counter()
        closure(step)
        if ranks > 1:
            torch._foreach_copy_(views, [p.grad for p in problem.parameters])
            dist.all_reduce(flat)
            flat /= ranks
            for parameter, view in zip(problem.parameters, views, strict=True):
                parameter.grad = view
        problem.base.step()
    return (time.perf_counter() - begin) / steps


def loopback(repeats: int = 40) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes a second of this rank's messages to the others.

    As in a sweep, a few messages follow a pause in which a core was idle.
    """
    grid = make_grid(None, None)
    assert grid is not None
    ranks, transport, found = grid.everyone, PairwiseTransport(60.0), []
    for size in (64, 1 << 22):
        message = torch.zeros(size, dtype=torch.uint8)
        out = torch.empty((ranks.size, size), dtype=torch.uint8)
        times = []
        for _ in range(repeats):
            time.sleep(0.03)
            start = time.perf_counter()
            for _ in range(MESSAGES + 1):
                transport.all_gather(message, out, ranks)
            times.append((time.perf_counter() - start) / (MESSAGES + 1))
        found.append(statistics.fmean(times))
    short, long = found
    return short, (ranks.size - 1) * (1 << 22) / max(long - short, 1e-9)


def seconds(store: ResultStore, sizes: Sequence[int], steps: int) -> None:
    """Predicts and measures what a step takes, for each number of parameters; keeps each result."""
    for numel in sizes:
        name = f"seconds/{numel}"
        if name in store.runs:
            continue
        links = {}
        for ranks in sorted({max(2, picard * data) for picard, data, _ in SHAPES}):
            latency, bandwidth = launch(loopback, workers=ranks)[0]
            links[ranks] = Link("loopback", bandwidth, latency, "measured just before")
        rows: Figures = {"links": {n: vars(link) for n, link in links.items()}, "shapes": {}}
        for key, predicted in predict(numel, steps, links, 0, os.cpu_count()).items():
            rows["shapes"][key] = {"predicted": predicted}
        for ranks in links:
            beside = launch(predict, workers=ranks, args=(numel, steps, links, ranks, None))[0]
            for key, predicted in beside.items():
                rows["shapes"][key]["beside"] = predicted
        for shape in SHAPES:
            found = launch(measure, workers=shape[0] * shape[1], args=(numel, shape, steps))
            row = rows["shapes"][name_of(*shape)]
            row["measured"] = max(found, key=lambda each: each["seconds"])
            print(f"{numel:,} {name_of(*shape)}: {row}", file=sys.stderr, flush=True)
        store.runs[name] = rows
        store.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("strides", "seconds"))
    parser.add_argument("--tasks", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 4, 32, 2])
    parser.add_argument("--steps", type=int, help="of every task, for a trial")
    parser.add_argument("--parameters", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=64, help="steps that are timed")
    parser.add_argument("--processes", type=int, default=1, help="tasks at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_check.json"))
    parser.add_argument("--cache", type=Path, default=Path("build/beyond_3d"))
    parser.add_argument("--render", action="store_true", help="only write the tables")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    setup = {"steps": options.steps, "repeats": options.repeats}
    command, title = "python benchmarks/plan_check.py", "Plans against measurements"
    store = ResultStore(options.out, command, setup, title, body)
    if not options.render and options.only != "strides":
        seconds(store, options.parameters, options.repeats)
    if not options.render and options.only != "seconds":
        todo = []
        for window in options.windows:
            for name in options.tasks:
                steps = options.steps or STEPS[name]
                if window == 1 or (window * 3 > steps and options.steps is None):
                    continue
                task = (name, window, steps, options.cache, options.steps is not None)
                todo.append((f"{name}/window {window}", task))
        store.carry_out(strides, todo, options.processes, said)
    store.write()
    sys.stdout.write(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
