"""What a committed step costs on one process, in plain steps of the base, and what memory it takes, in copies.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost.md

The closure costs nothing: it hands over a ready gradient. What is left is picardopt and Adam. Plain and Picard blocks
alternate, because others may share the machine, and the least of each counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tables import document, machine, markdown, number, publish
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
CASES: tuple[tuple[int, int], ...] = (
    (10_000, 20),
    (1_000_000, 20),
    (10_000_000, 20),
    (4_000, 1000),
)
"""Numbers of parameters and of tensors."""
MEMORY_NUMEL = 1_000_000
AUDITED = 300
"""Steps of the runs whose audits are counted."""
PHASES = ("drift", "rollout", "commit")


@dataclass(frozen=True)
class Cost:
    """Milliseconds of the processor a step.

    Attributes:
        plain: Plain steps, by block.
        picard: Committed steps, by block.
        stride: Steps a sweep.
        phases: Shares of the wall time of committed steps, by phase of `optimizer.stats.seconds`.
    """

    plain: list[float]
    picard: list[float]
    stride: float
    phases: dict[str, float]

    def cells(self) -> list[float]:
        """Least times and their ratio, the median of the blocks' ratios, the stride, and the phases in plain steps."""
        ratios = [b / a for a, b in zip(self.plain, self.picard, strict=True)]
        least, median = min(self.picard) / min(self.plain), statistics.median(ratios)
        times = [min(self.plain), min(self.picard), least, median, self.stride]
        return [*times, *(self.phases[name] * median for name in PHASES)]


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
    start = time.thread_time()  # not the time that others have the processor
    for _ in range(count):
        step()
    return 1e3 * (time.thread_time() - start) / count


def cost(numel: int, tensors: int, tolerance: Tolerance, seconds: float) -> Cost:
    """Times blocks of 32 plain steps and 16 Picard steps in turn."""
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
    before, wall = dict(optimizer.stats.seconds), 0.0
    plains, picards, begun = [], [], time.perf_counter()
    while len(plains) < 4 or time.perf_counter() - begun < seconds:
        plains.append(block_of(plain, 4 * WINDOW))
        start = time.perf_counter()
        picards.append(block_of(picard, 2 * WINDOW))
        wall += time.perf_counter() - start
    stats = optimizer.stats
    return Cost(
        plains,
        picards,
        (stats.final - final) / (stats.sweeps - swept),
        {name: (stats.seconds[name] - before[name]) / wall for name in PHASES},
    )


def time_table(cases: Sequence[tuple[int, int]], seconds: float) -> str:
    rows = []
    for numel, tensors in cases:
        for name, tolerance in TOLERANCES.items():
            found = cost(numel, tensors, tolerance(), seconds)
            rows.append([f"{numel:,}", tensors, name, *map(number, found.cells())])
            print(*rows[-1], file=sys.stderr, flush=True)
    times = ("plain, ms", "Picard, ms", "ratio", "median ratio", "stride")
    return markdown(["parameters", "tensors", "tolerance", *times, *PHASES], rows)


def audit_table() -> str:
    """Counts what the audit evaluates in a run of 300 steps: on one process, and as a share of the sweeps."""
    rows = []
    for window in (2, WINDOW):
        parameters = make_parameters(1000, 1)
        base = torch.optim.Adam(parameters, lr=1e-3)
        optimizer = ParallelPicardOptimizer(base, window=window, total_steps=AUDITED)
        closure = ready_closure(parameters)
        for _ in range(AUDITED):
            optimizer.step(closure)
        stats = optimizer.stats
        shares = stats.audits / stats.drift_evaluations, stats.audits / stats.sweeps
        rows.append([window, stats.sweeps, stats.audits, *(f"{share:.1%}" for share in shares)])
    return markdown(("window", "sweeps", "audits", "of evaluations", "of sweeps"), rows)


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
window 8, both the least of blocks in turn; *ratio* is one by the other, *median ratio* that of blocks
that follow each other. *Drift, rollout, commit* are the parts, in plain steps. Three plain steps
are owed: rollout, predictor, commit. *Step* is `StepRelativeTolerance()`, *drift* `DriftTolerance()` with its
8 secants. The audit is off in the first table.
"""
MEMORY_NOTES = """
The most memory that torch allocates, in copies of the parameters (1 M, float32, Adam), the parameters and
gradients among them. At window 8 two are the gauge's pair; with *drift* 16 more are 8 secants.
"""


AUDIT_NOTES = """
What the audit evaluates again in 300 steps whose guesses are accepted: one drift at a time, which is as long as
a sweep where each process evaluates one slot (*of sweeps*).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per row of the first table")
    parser.add_argument("--cases", nargs="+", help="such as 10000x20: parameters x tensors")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where, cases = machine(), CASES
    if options.cases:
        cases = tuple((int(n), int(t)) for n, _, t in (c.partition("x") for c in options.cases))
    parts = [time_table(cases, options.seconds)]
    parts += ["## Memory", MEMORY_NOTES.strip(), memory_table()]
    parts += ["## Audit", AUDIT_NOTES.strip(), audit_table()]
    command = " ".join(["python", "benchmarks/step_cost.py", *sys.argv[1:]])
    text = document("Cost of a committed step", command, where, NOTES, "\n\n".join(parts))
    publish(text, options.out)


if __name__ == "__main__":
    main()
