"""What a committed step costs on one process, in plain steps of the base, and what memory it takes, in copies.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost.md

The closure costs nothing: it hands over a ready gradient. What is left is picardopt and Adam. Plain and Picard blocks
alternate, because others may share the machine, and the least of each counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tables import document, machine, markdown, number
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from picardopt import DriftTolerance, ParallelPicardOptimizer, StepRelativeTolerance
from picardopt.tolerance import Tolerance

WINDOW = 8
WARM_UP = 10
"""Sweeps; in some of the first the rollout is repeated, and the audit is busy."""
TOLERANCES: dict[str, Callable[[], Tolerance]] = {
    "step": StepRelativeTolerance,
    "drift": DriftTolerance,
}
CASES = ((10_000, 20), (1_000_000, 20), (10_000_000, 20), (4_000, 1000))
"""Numbers of parameters and of tensors."""
MEMORY_NUMEL = 1_000_000
PHASES = ("drift", "rollout", "commit")


@dataclass(frozen=True)
class Cost:
    """Least milliseconds over the blocks.

    Attributes:
        plain: A plain step.
        picard: A committed step.
        stride: Steps a sweep.
        phases: Milliseconds a committed step, by phase of `optimizer.stats.seconds`.
    """

    plain: float
    picard: float
    stride: float
    phases: dict[str, float]


def make_parameters(numel: int, tensors: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (numel // tensors,)
    return [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(tensors)]


def ready_closure(parameters: Sequence[Tensor]) -> Callable[[], Tensor]:
    gradients, loss = [torch.randn_like(p) for p in parameters], torch.zeros(())

    def closure() -> Tensor:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    return closure


def block_of(step: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return 1e3 * (time.perf_counter() - start) / count


def cost(numel: int, tensors: int, tolerance: Tolerance, seconds: float) -> Cost:
    """Times blocks of 8 plain steps and 16 Picard steps in turn."""
    alone, ahead = make_parameters(numel, tensors), make_parameters(numel, tensors)
    plain_base, closure = torch.optim.Adam(alone, lr=1e-3), ready_closure(alone)
    base = torch.optim.Adam(ahead, lr=1e-3)
    optimizer = ParallelPicardOptimizer(base, window=WINDOW, tolerance=tolerance, audit="never")
    closure_ahead = ready_closure(ahead)

    def plain() -> None:
        closure()
        plain_base.step()

    def picard() -> None:
        optimizer.step(closure_ahead)

    block_of(plain, WINDOW)
    while optimizer.stats.sweeps < WARM_UP:
        picard()
    swept, final = optimizer.stats.sweeps, optimizer.stats.final
    steps, before = optimizer.stats.steps, dict(optimizer.stats.seconds)
    plains, picards, begun = [], [], time.perf_counter()
    while len(plains) < 4 or time.perf_counter() - begun < seconds:
        plains.append(block_of(plain, WINDOW))
        picards.append(block_of(picard, 2 * WINDOW))
    stats = optimizer.stats
    phases = {name: 1e3 * (stats.seconds[name] - before[name]) for name in PHASES}
    return Cost(
        min(plains),
        min(picards),
        (stats.final - final) / (stats.sweeps - swept),
        {name: spent / (stats.steps - steps) for name, spent in phases.items()},
    )


def time_table(seconds: float) -> str:
    rows = []
    for numel, tensors in CASES:
        for name, tolerance in TOLERANCES.items():
            found = cost(numel, tensors, tolerance(), seconds)
            cells = [found.plain, found.picard, found.picard / found.plain, found.stride]
            cells += [found.phases[phase] / found.plain for phase in PHASES]
            rows.append([f"{numel:,}", tensors, name, *map(number, cells)])
            print(*rows[-1], file=sys.stderr, flush=True)
    headers = ("parameters", "tensors", "tolerance", "plain, ms", "Picard, ms", "ratio", "stride")
    return markdown([*headers, *PHASES], rows)


def peak_copies(window: int, tolerance: str, tensors: int) -> float:
    """The most memory that torch allocates in a run, in copies of the parameters; window 0 is the plain loop."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(MEMORY_NUMEL, tensors, window, tolerance)
    events = profiler.profiler.kineto_results.events()
    found = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(found))) / (4 * MEMORY_NUMEL)


def _train(numel: int, tensors: int, window: int, tolerance: str) -> None:
    parameters = make_parameters(numel, tensors)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=1e-3)
    if window:
        given = TOLERANCES[tolerance]()
        optimizer = ParallelPicardOptimizer(optimizer, window=window, tolerance=given)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for parameter in parameters:
            loss = loss + parameter.sum()
        loss.backward()
        return loss

    for _ in range(3 * max(1, window)):
        optimizer.step(closure)


def memory_table() -> str:
    rows = []
    for tensors in (1, 20):
        for window, tolerance in ((0, "step"), (1, "step"), (WINDOW, "step"), (WINDOW, "drift")):
            copies = peak_copies(window, tolerance, tensors)
            kind = "plain loop" if window == 0 else f"window {window}"
            rows.append([tensors, kind, tolerance if window > 1 else "", number(copies)])
            print(*rows[-1], file=sys.stderr, flush=True)
    return markdown(("tensors", "run", "tolerance", "copies"), rows)


NOTES = """
One thread, float32 Adam. *Plain* is a step of Adam with the same closure, *Picard* a committed step at
window 8, both the least of blocks in turn; *ratio* is one by the other. *Drift, rollout, commit* are
the parts in plain steps (means, so they may add up to more). Three plain steps are owed: rollout,
predictor, commit. *Step* is `StepRelativeTolerance()`, *drift* `DriftTolerance()` with its 8 secants.
The audit is off in the first table.
"""
MEMORY_NOTES = """
The most memory that torch allocates, in copies of the parameters (1 M, float32, Adam), the parameters and
gradients among them. At window 8 two are the gauge's pair; with *drift* 16 more are 8 secants.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per row of the first table")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    tables = (
        f"{time_table(options.seconds)}\n\n## Memory\n\n{MEMORY_NOTES.strip()}\n\n{memory_table()}"
    )
    command = f"python benchmarks/step_cost.py --seconds {options.seconds:g}"
    text = document("Cost of a committed step", command, where, NOTES, tables)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
