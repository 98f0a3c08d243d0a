"""What a sweep costs besides its drifts, over several processes; and plain data parallelism for comparison.

The closure *waits*, as a host does for its accelerator, and then returns a ready gradient. So a few
cores can stand in for many devices, and what is left is the cost of running ahead. How long it waits is a
measured curve: what a gradient of a whole batch takes, and of the part that a data-parallel rank has. Everything is
accepted (infinite tolerance), so a sweep of n ranks makes n steps; real runs make fewer.

    python benchmarks/overhead.py --ranks 1 2 4 8 --parameters 10000 1000000
    python benchmarks/overhead.py --views 4 --curve 1:20 4:55
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from curves import Curve, gpu, parse
from tables import document, machine, markdown, number, publish

from picardopt import ParallelPicardOptimizer, launch

TENSORS = 20
WARM_UP = 3
PHASES = ("exchange", "rollout", "commit")
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Timings:
    """One rank's milliseconds.

    Attributes:
        sweeps: Wall time of each sweep, from the first of its steps to the last one's end.
        drifts: Time inside the closure, one per sweep.
        phases: Of each sweep, by phase of `optimizer.stats.seconds`.
        steps: Wall time of each data-parallel step.
        reduces: Of each of these, the all_reduce.
    """

    sweeps: list[float]
    drifts: list[float]
    phases: dict[str, list[float]]
    steps: list[float]
    reduces: list[float]


def make_parameters(numel: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (numel // TENSORS,)
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(TENSORS)]


def waiting_closure(
    parameters: list[torch.Tensor], drift_ms: float, spent: list[float]
) -> Callable[[], torch.Tensor]:
    """Returns a closure that sleeps and then sets a ready gradient; it appends its milliseconds to `spent`."""
    gradients = [torch.randn_like(p) for p in parameters]
    loss = torch.zeros(())

    def closure() -> torch.Tensor:
        start = time.perf_counter()
        time.sleep(drift_ms / 1e3)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        spent.append(1e3 * (time.perf_counter() - start))
        return loss

    return closure


def time_picard(
    numel: int, drift_ms: float, sweeps: int
) -> tuple[list[float], list[float], dict[str, list[float]]]:
    """Runs ahead with one slot per rank; returns sweeps, drifts and phases in milliseconds."""
    parameters = make_parameters(numel)
    base = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    optimizer = ParallelPicardOptimizer(base, tolerance=float("inf"), audit="never")
    spent: list[float] = []
    closure = waiting_closure(parameters, drift_ms, spent)
    walls, phases = [], {name: [] for name in PHASES}
    for _ in range(WARM_UP + sweeps):
        before = dict(optimizer.stats.seconds)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(optimizer.window):
            optimizer.step(closure)
        walls.append(1e3 * (time.perf_counter() - start))
        for name, values in phases.items():
            values.append(1e3 * (optimizer.stats.seconds[name] - before[name]))
    if optimizer.stats.strides != [dist.get_world_size()] * (WARM_UP + sweeps):
        raise RuntimeError(f"strides {optimizer.stats.strides}: a sweep did not make all its steps")
    counted = {name: values[WARM_UP:] for name, values in phases.items()}
    return walls[WARM_UP:], spent[WARM_UP:], counted


def time_data_parallel(numel: int, drift_ms: float, steps: int) -> tuple[list[float], list[float]]:
    """Waits as a part of the batch takes, and averages one flat gradient: milliseconds a step, and of the sum."""
    ranks = dist.get_world_size()
    parameters = make_parameters(numel)
    flat = torch.zeros(sum(p.numel() for p in parameters))
    views = [part.view_as(p) for part, p in zip(flat.chunk(TENSORS), parameters, strict=True)]
    base = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    closure = waiting_closure(parameters, drift_ms, [])
    walls, reduces = [], []
    for _ in range(WARM_UP + steps):
        dist.barrier()
        start = time.perf_counter()
        closure()
        torch._foreach_copy_(views, [p.grad for p in parameters])
        reducing = time.perf_counter()
        dist.all_reduce(flat)
        reduces.append(1e3 * (time.perf_counter() - reducing))
        flat /= ranks
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view
        base.step()
        walls.append(1e3 * (time.perf_counter() - start))
    return walls[WARM_UP:], reduces[WARM_UP:]


def work(numel: int, whole_ms: float, part_ms: float, repeats: int) -> Timings:
    """One rank's measurements."""
    torch.set_num_threads(1)
    sweeps, drifts, phases = time_picard(numel, whole_ms, repeats)
    return Timings(sweeps, drifts, phases, *time_data_parallel(numel, part_ms, repeats))


def summarize(ranks: int, numel: int, timings: list[Timings]) -> list[str]:
    """One row of the table: medians over sweeps; a sweep lasts as long as its slowest rank."""
    slowest, sweeps = _slowest(t.drifts for t in timings), _slowest(t.sweeps for t in timings)
    overhead = statistics.median(s - d for s, d in zip(sweeps, slowest, strict=True))
    phases = [statistics.median(_slowest(t.phases[name] for t in timings)) for name in PHASES]
    exchange, *others = phases
    reduce = statistics.median(_slowest(t.reduces for t in timings))
    parallel = _slowest(t.steps for t in timings)
    drift, sweep = statistics.median(slowest), statistics.median(sweeps)
    cells = [drift, sweep, overhead, exchange, reduce, *others]
    texts = [number(cell) for cell in [*cells, sweep / ranks, statistics.median(parallel)]]
    return [str(ranks), f"{numel:,}", *texts[:3], f"{overhead / drift:.0%}", *texts[3:]]


def _slowest(of_ranks: Iterable[list[float]]) -> list[float]:
    """The slowest rank's values."""
    return [max(values) for values in zip(*of_ranks, strict=True)]


HEADERS = (
    *("ranks", "parameters", "drift", "sweep", "overhead", "of drift"),
    *("exchange", "all_reduce", "rollout", "commits", "Picard, a step", "data parallel, a step"),
)
NOTES = """
Milliseconds. The closure **waits** (sleep) as long as a gradient of {views} views takes, or of the
part that a data-parallel rank has: {curve}.
It is as a host that waits for its accelerator, and returns a ready gradient: all that computes here is
picardopt, gloo and Adam, on far fewer cores than ranks, so with many ranks the replicated rollouts
stand in line for the cores. *drift*: the slowest rank's
closure; *sweep*: the slowest rank's wall time for one sweep and all its commits; *overhead*: their
difference; *exchange, rollout, commits*: the parts, from `optimizer.stats.seconds` (the slowest
rank's; medians over {repeats} sweeps, and steps). Window = ranks; everything is accepted, so a sweep
makes as many steps as there are ranks, and *Picard, a step* is sweep / ranks at best: real runs make
fewer steps a sweep. *Data parallel*: a part of the batch, one all_reduce of the gradients, one step;
*all_reduce* is that call. It and the exchange include waiting for slower ranks; of the gradients of
n ranks an exchange moves n / 2 times as many bytes. The audit of closures is off. A load average above
zero at the start is other work on the machine: it lengthens all of this.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--parameters", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000]
    )
    parser.add_argument("--views", type=int, default=16, help="a step's batch")
    parser.add_argument("--curve", nargs="+", help="VIEWS:MILLISECONDS ...; default: a GPU's")
    parser.add_argument("--repeats", type=int, default=10, help="sweeps (and steps) that count")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    return parser.parse_args()


def said(curve: Curve) -> str:
    """A curve in words."""
    points = ", ".join(f"{size}: {number(1e3 * each)}" for size, each in curve.points.items())
    return f"milliseconds by views {points}, and straight lines between them ({curve.source})"


def main() -> None:
    options = parse_arguments()
    where, rows, curve = machine(), [], parse(options.curve) if options.curve else gpu()
    for ranks in options.ranks:
        for numel in options.parameters:
            waits = [1e3 * curve.seconds(-(-options.views // n)) for n in (1, ranks)]
            args = (numel, *waits, options.repeats)
            rows.append(summarize(ranks, numel, launch(work, workers=ranks, args=args)))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    command = " ".join(["python benchmarks/overhead.py", *sys.argv[1:]])
    notes = NOTES.format(views=options.views, repeats=options.repeats, curve=said(curve))
    text = document("Overhead of a sweep", command, where, notes, markdown(HEADERS, rows))
    publish(text, options.out)


if __name__ == "__main__":
    main()
