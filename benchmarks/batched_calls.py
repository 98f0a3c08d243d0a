"""What one device gains from joined calls of the guidance: score distillation by the models that ship.

    python benchmarks/batched_calls.py --out benchmarks/results/batched_calls.md

Three runs take blocks of steps in turn, because others may share the machine: the plain sequential loop, Picard
iteration whose slots call the guidance one after the other, and Picard iteration that joins these calls.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from picardopt_3d.methods.dreamfusion import SMALL, SMALL_NERF, DreamFusionConfig
from picardopt_3d.picard import PicardOptions, make_optimizer
from picardopt_3d.problem import Problem
from picardopt_3d.run.loop import closure_of
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.task import TextTask
from plain_loop import sequential_step
from tables import document, machine, markdown, number, publish

from picardopt import ParallelPicardOptimizer
from picardopt.closure import StepClosure, as_step_closure

PROMPT = "a blue chair"
SCENES: dict[str, DreamFusionConfig] = {"voxels": SMALL, "hash grid": SMALL_NERF}
WARM_UP = 48
"""Steps; the first sweep's slots are evaluated alone, and what is joined is checked."""
BLOCK = 24
"""Steps between two readings of the clock."""


@dataclass
class Timed:
    """A run.

    Attributes:
        step: Takes one step.
        optimizer: Its optimizer; None for the plain loop.
        blocks: Milliseconds of the processor a step, by block.
        start: Sweeps and steps that were final after the warm-up.
    """

    step: Callable[[], object]
    optimizer: ParallelPicardOptimizer | None = None
    blocks: list[float] = field(default_factory=list)
    start: tuple[int, int] = (0, 0)

    def warm_up(self, steps: int) -> None:
        """Takes steps that are not timed."""
        for _ in range(steps):
            self.step()
        if self.optimizer is not None:
            self.start = self.optimizer.stats.sweeps, self.optimizer.stats.final

    def take(self, steps: int) -> None:
        """Times a block."""
        before = time.process_time()  # not the time that others have the processor
        for _ in range(steps):
            self.step()
        self.blocks.append(1e3 * (time.process_time() - before) / steps)

    def cells(self, plain: Timed) -> list[str]:
        """Milliseconds a step, the sequential run's by them, steps a sweep, joined and saved calls."""
        ratios = [a / b for a, b in zip(plain.blocks, self.blocks, strict=True)]
        cells = [number(statistics.median(self.blocks)), number(statistics.median(ratios))]
        if self.optimizer is None:
            return [*cells, "", "", ""]
        stats, (sweeps, final) = self.optimizer.stats, self.start
        stride = (stats.final - final) / max(1, stats.sweeps - sweeps)
        return [*cells, number(stride), str(stats.joined_calls), str(stats.calls_saved)]


def problem_of(scene: str, batch: int) -> tuple[DreamFusionConfig, Problem]:
    """Returns a recipe at a batch size, and its problem before the first step."""
    recipe = replace(SCENES[scene], batch=batch)
    problem = build_problem(recipe, TextTask(PROMPT), Path(), torch.device("cpu"), 0)
    return recipe, problem


def plain(scene: str, batch: int) -> Timed:
    """The sequential loop."""
    _, problem = problem_of(scene, batch)
    steps = iter(range(1_000_000))
    return Timed(lambda: sequential_step(problem, 0, next(steps)))


def picard(scene: str, batch: int, window: int, joined: bool) -> Timed:
    """Picard iteration with the recipe's own tolerance."""
    recipe, problem = problem_of(scene, batch)
    options = PicardOptions(recipe.picard, window=window)
    optimizer = make_optimizer(problem, options, recipe.steps, 0)
    closure = closure_of(problem)
    if not joined:
        given = as_step_closure(closure)
        assert isinstance(given, StepClosure)
        optimizer._audit.sharing.of(given).given_up = True
    return Timed(lambda: optimizer.step(closure), optimizer)


def rows_of(scene: str, batch: int, window: int, rounds: int, warm_up: int) -> list[list[str]]:
    """Times the three runs in turn."""
    runs = {
        "sequential": plain(scene, batch),
        "slot by slot": picard(scene, batch, window, joined=False),
        "joined": picard(scene, batch, window, joined=True),
    }
    for run in runs.values():
        run.warm_up(warm_up)
    for _ in range(rounds):
        for run in runs.values():
            run.take(min(BLOCK, 3 * window))
    first = runs["sequential"]
    found = [[scene, str(batch), name, *run.cells(first)] for name, run in runs.items()]
    for row in found:
        print(*row, file=sys.stderr, flush=True)
    return found


def table(
    scenes: Sequence[str], batches: Sequence[int], window: int, rounds: int, warm_up: int
) -> str:
    """The table of all runs."""
    rows = [
        row
        for scene in scenes
        for batch in batches
        for row in rows_of(scene, batch, window, rounds, warm_up)
    ]
    headers = ("scene", "views", "run", "ms a step", "speed", "steps a sweep", "joined", "saved")
    return markdown(headers, rows)


NOTES = """
One thread. *Ms a step*: of the processor, the median of blocks of {block} steps after {warm_up} steps that are not
timed; *speed*: the sequential run's milliseconds in the same round by these, the median. Steps that were refused, the
rollout and the checks are in it. *Joined* and *saved* count calls of the guidance over the whole run.
Window {window}, the recipe's own tolerance, "{prompt}".
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="views a step")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each run")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps that are not timed")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where, size = machine(), (options.window, options.rounds, options.warm_up)
    found = table(options.scenes, options.batches, *size)
    command = " ".join(["python", "benchmarks/batched_calls.py", *sys.argv[1:]])
    notes = NOTES.format(
        block=min(BLOCK, 3 * options.window),
        warm_up=options.warm_up,
        window=options.window,
        prompt=PROMPT,
    )
    publish(document("Joined calls of the guidance", command, where, notes, found), options.out)


if __name__ == "__main__":
    main()
