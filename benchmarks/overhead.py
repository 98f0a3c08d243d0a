"""What a sweep costs besides its drifts, over several processes; and plain data parallelism for comparison.

The closure *waits*, as a host does for its accelerator, and then returns a ready gradient. So a few
cores can stand in for many devices, and what is left is the cost of running ahead. Everything is
accepted (infinite tolerance), so a sweep of n ranks makes n steps; real runs make fewer.

    python benchmarks/overhead.py --ranks 1 2 4 8 --parameters 10000 1000000
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tables import document, machine, markdown, number, publish

from picardopt import ParallelPicardOptimizer, launch

TENSORS = 20
WARM_UP = 3
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Timings:
    """One rank's milliseconds.

    Attributes:
        sweeps: Wall time of each sweep, from the first of its steps to the last one's end.
        drifts: Time inside the closure, one per sweep.
        phases: Mean per sweep of each phase in `optimizer.stats.seconds`.
        steps: Wall time of each data-parallel step.
    """

    sweeps: list[float]
    drifts: list[float]
    phases: dict[str, float]
    steps: list[float]


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


def time_picard(numel: int, drift_ms: float, sweeps: int) -> tuple[list[float], list[float], dict]:
    """Runs ahead with one slot per rank; returns sweeps, drifts and phases in milliseconds."""
    parameters = make_parameters(numel)
    base = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    optimizer = ParallelPicardOptimizer(base, tolerance=float("inf"), audit="never")
    spent: list[float] = []
    closure = waiting_closure(parameters, drift_ms, spent)
    walls = []
    for sweep in range(WARM_UP + sweeps):
        if sweep == WARM_UP:
            before = dict(optimizer.stats.seconds)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(optimizer.window):
            optimizer.step(closure)
        walls.append(1e3 * (time.perf_counter() - start))
    if optimizer.stats.strides != [dist.get_world_size()] * (WARM_UP + sweeps):
        raise RuntimeError(f"strides {optimizer.stats.strides}: a sweep did not make all its steps")
    phases = {
        name: 1e3 * (seconds - before[name]) / sweeps
        for name, seconds in optimizer.stats.seconds.items()
    }
    return walls[WARM_UP:], spent[WARM_UP:], phases


def time_data_parallel(numel: int, drift_ms: float, steps: int) -> list[float]:
    """Splits the waiting over the ranks and averages one flat gradient: milliseconds a step."""
    ranks = dist.get_world_size()
    parameters = make_parameters(numel)
    flat = torch.zeros(sum(p.numel() for p in parameters))
    views = [part.view_as(p) for part, p in zip(flat.chunk(TENSORS), parameters, strict=True)]
    base = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    closure = waiting_closure(parameters, drift_ms / ranks, [])
    walls = []
    for _ in range(WARM_UP + steps):
        dist.barrier()
        start = time.perf_counter()
        closure()
        torch._foreach_copy_(views, [p.grad for p in parameters])
        dist.all_reduce(flat)
        flat /= ranks
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view
        base.step()
        walls.append(1e3 * (time.perf_counter() - start))
    return walls[WARM_UP:]


def work(numel: int, drift_ms: float, repeats: int) -> Timings:
    """One rank's measurements."""
    torch.set_num_threads(1)
    sweeps, drifts, phases = time_picard(numel, drift_ms, repeats)
    steps = time_data_parallel(numel, drift_ms, repeats)
    return Timings(sweeps, drifts, phases, steps)


def summarize(ranks: int, numel: int, timings: list[Timings]) -> list[str]:
    """One row of the table: medians over sweeps; a sweep lasts as long as its slowest rank."""
    slowest = [max(values) for values in zip(*(t.drifts for t in timings), strict=True)]
    sweeps = [max(values) for values in zip(*(t.sweeps for t in timings), strict=True)]
    overhead = statistics.median(s - d for s, d in zip(sweeps, slowest, strict=True))
    phases = {
        name: statistics.mean(t.phases[name] for t in timings)
        for name in ("exchange", "rollout", "commit")
    }
    parallel = [max(values) for values in zip(*(t.steps for t in timings), strict=True)]
    drift, sweep = statistics.median(slowest), statistics.median(sweeps)
    cells = [drift, sweep, overhead, *phases.values(), sweep / ranks, statistics.median(parallel)]
    texts = [number(cell) for cell in cells]
    return [str(ranks), f"{numel:,}", *texts[:3], f"{overhead / drift:.0%}", *texts[3:]]


HEADERS = (
    *("ranks", "parameters", "drift", "sweep", "overhead", "of drift"),
    *("exchange", "rollout", "commits", "Picard, a step", "data parallel, a step"),
)
NOTES = """
Milliseconds. The closure **waits** (sleep), as a host waits for its accelerator, and returns a
ready gradient: all that computes here is picardopt, gloo and Adam, on far fewer cores than ranks,
so with many ranks the replicated rollouts stand in line for the cores. *drift*: the slowest rank's
closure; *sweep*: the slowest rank's wall time for one sweep and all its commits; *overhead*: their
difference (medians over {repeats} sweeps); *exchange, rollout, commits*: the parts, from
`optimizer.stats.seconds` (means; the exchange includes waiting for slower ranks). Window = ranks;
everything is accepted, so a sweep makes as many steps as there are ranks, and *Picard, a step* is
sweep / ranks at best: real runs make fewer steps a sweep. *Data parallel*: the same waiting split
over the ranks, one all_reduce of the gradient, one step. That is its best case: it assumes that a
part of a batch takes the same part of the time, which a real device does not give (it has a smallest
useful batch). The audit of closures is off. A load average above zero at the start is other work on
the machine: it lengthens all of this.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--parameters", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000]
    )
    parser.add_argument("--drift-ms", type=float, default=100.0, help="how long the closure waits")
    parser.add_argument("--repeats", type=int, default=10, help="sweeps (and steps) that count")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    where, rows = machine(), []
    for ranks in options.ranks:
        for numel in options.parameters:
            args = (numel, options.drift_ms, options.repeats)
            rows.append(summarize(ranks, numel, launch(work, workers=ranks, args=args)))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    command = (
        f"python benchmarks/overhead.py --ranks {' '.join(map(str, options.ranks))} "
        f"--parameters {' '.join(map(str, options.parameters))} "
        f"--drift-ms {options.drift_ms:g} --repeats {options.repeats}"
    )
    notes = NOTES.format(repeats=options.repeats)
    text = document("Overhead of a sweep", command, where, notes, markdown(HEADERS, rows))
    publish(text, options.out)


if __name__ == "__main__":
    main()
