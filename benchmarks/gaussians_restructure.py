"""What adding and removing Gaussians costs DreamGaussian in strides, by how the window treats such a step.

    python benchmarks/gaussians_restructure.py   # everything, or what is missing of it

Every run is the `small` preset of `dreamgaussian` on a text of `methods.py`, in one process with one thread: the
window's drifts are evaluated one after the other, so that everything but the time is the same for any number of
workers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from method_runs import TEXTS, subject
from picardopt_3d.methods import Stage
from picardopt_3d.methods.dreamgaussian import SMALL, DreamGaussianConfig
from picardopt_3d.picard import PicardOptions
from picardopt_3d.run.loop import closure_of
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.task import TextTask
from picardopt_3d.world.yardstick import psnr_against_truth
from result_store import Figures, ResultStore
from tables import markdown, mean

from picardopt import ParallelPicardOptimizer, step_rng
from picardopt.stats import SweepRecord

MODES = ("sequential", "never", "dropped", "ends", "across")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        text: What is asked for.
        seed: Of the run.
        mode: How the window treats a change.
    """

    text: str
    seed: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.text}/{self.seed}/{self.mode}"


@dataclass(frozen=True)
class Setup:
    """What all runs have in common.

    Attributes:
        steps: Steps a run; None: the preset's.
        every: Steps to the first change and from one to the next; None: the preset's.
        window: Of all but the sequential run.
    """

    steps: int | None
    every: int | None
    window: int

    def recipe(self, mode: str) -> DreamGaussianConfig:
        """The preset with what the mode changes in it."""
        scene = replace(SMALL.scene, across=mode == "across")
        strategy = scene.strategy
        if self.every is not None:
            strategy = replace(strategy, start=self.every, every=self.every)
        scene = replace(scene, strategy=None if mode == "never" else strategy)
        return replace(SMALL, steps=self.steps or SMALL.steps, scene=scene)


def measure(task: tuple[Run, Setup]) -> tuple[str, Figures]:
    """Carries out one run in this process."""
    run, setup = task
    torch.set_num_threads(1)
    recipe = setup.recipe(run.mode)
    stage = build_problem(recipe, TextTask(run.text), Path(), CPU, run.seed)
    began = time.process_time()
    optimizer, changes = train(stage, recipe, run, setup.window)
    stats = optimizer.stats
    found: Figures = {
        "steps_per_sweep": stats.steps / stats.sweeps,
        "evaluations": stats.drift_evaluations / stats.steps,
        "changes": len(changes),
        "gaussians": stage.counts()["Gaussians"],
        "psnr": psnr_against_truth(stage.scene, subject(run.text), recipe.final_pixels),
        "cpu_seconds": time.process_time() - began,
    }
    if run.mode not in ("sequential", "never"):
        found |= between(list(stats.records), changes, setup.window)
    return run.name, found


def train(
    stage: Stage, recipe: DreamGaussianConfig, run: Run, window: int
) -> tuple[ParallelPicardOptimizer, list[int]]:
    """Trains the stage; returns its optimizer, and the steps after which Gaussians were added and removed.

    "dropped" is what a loop does that knows nothing of `Restructure`: it changes the Gaussians between two calls of
    `step`.
    """
    change, scheduler, closure = stage.restructure(), stage.lr_scheduler(), closure_of(stage)
    options = PicardOptions(recipe.picard, window, sequential=run.mode == "sequential")
    optimizer = ParallelPicardOptimizer(
        stage.optimizers(),
        total_steps=recipe.steps,
        seed=run.seed,
        carry=stage.carry(),
        restructure=None if run.mode == "dropped" else change,
        lr_scheduler=scheduler,
        measured=stage.measured(),
        **options.arguments(),
    )
    changes = []
    for step in range(recipe.steps):
        optimizer.step(closure)
        if change is not None and change.due(step):
            changes.append(step)
            if run.mode == "dropped":
                with step_rng(run.seed, step):
                    change.function(step)
                optimizer.flush()
        if scheduler is not None:
            scheduler.step()
    return optimizer, changes


def between(records: Sequence[SweepRecord], changes: Sequence[int], window: int) -> Figures:
    """The strides of sweeps that no change is near, and how many sweeps more a change costs.

    From the first change to the last one: sweeps whose head is at least a window behind a change, and whose window
    ends at the next one or before.
    """
    if len(changes) < 2:
        return {}
    inside = [each for each in records if changes[0] < each.step <= changes[-1]]

    def quiet(record: SweepRecord) -> bool:
        behind = record.step - 1 - max(each for each in changes if each < record.step)
        ahead = min(each for each in changes if each >= record.step) + 1 - record.step
        return behind >= window and ahead >= window

    strides = [record.stride for record in inside if quiet(record)]
    if not strides:
        return {}
    far = statistics.fmean(strides)
    more = len(inside) - (changes[-1] - changes[0]) / far
    return {"steps_per_sweep_between": far, "sweeps_a_change": more / (len(changes) - 1)}


def body(content: Figures) -> tuple[str, str]:
    """Notes and table of the document."""
    heads = ["at a change", "steps a sweep", "far from changes", "sweeps a change costs"]
    heads += ["evaluations a step", "PSNR, dB", "apart, dB", "Gaussians", "CPU seconds"]
    texts, seeds = content["setup"]["texts"], content["setup"]["seeds"]
    return NOTES, markdown(heads, [row(content["runs"], texts, seeds, mode) for mode in MODES])


def row(runs: dict[str, Figures], texts: Sequence[str], seeds: int, mode: str) -> list[str]:
    """A row of the table: means over texts and seeds."""
    cells = [(text, seed) for text in texts for seed in range(seeds)]
    own = {cell: runs[Run(*cell, mode).name] for cell in cells if Run(*cell, mode).name in runs}
    apart = []
    for (text, seed), found in own.items():
        other = (seed + 1) % seeds if mode == "sequential" else seed
        reference = runs.get(Run(text, other, "sequential").name)
        itself = (mode, other) == ("sequential", seed)
        if reference is not None and not itself and mode != "never":
            apart.append(abs(found["psnr"] - reference["psnr"]))

    def all_of(name: str) -> Iterable[float]:
        return [found[name] for found in own.values() if name in found]

    return [
        mode,
        mean(all_of("steps_per_sweep")),
        mean(all_of("steps_per_sweep_between")),
        mean(all_of("sweeps_a_change")),
        mean(all_of("evaluations")),
        mean(all_of("psnr")),
        mean(apart),
        mean(all_of("gaussians"), "{:,.0f}"),
        mean(all_of("cpu_seconds"), "{:.0f}"),
    ]


NOTES = """
"Never": Gaussians are neither added nor removed, the ceiling (of another run, with fewer Gaussians). "Dropped": the
loop changes them between two calls of `step`, and what was evaluated beyond is dropped (its splits draw other random
numbers, so that *apart* is also chance). "Ends": the window ends at a
change. "Across": it runs across, as in the paper. The default tolerance. *Far from changes*: steps a sweep of the
sweeps, between the first change and the last, whose window neither reaches a change nor lies within a window behind
one. *Sweeps a change costs*: how many more there are than if all had made so many steps final. *PSNR*: 32 held-out
views against the true ones; *apart*: mean absolute difference from the sequential run of the same seed, of the
sequential runs from that of the other seed.
"""


def said(setup: Setup, found: Figures) -> str:
    """What is printed of a run."""
    return f"{found['steps_per_sweep']:.2f} of {setup.window} steps a sweep, {found['psnr']:.2f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS[:3]))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="steps a run; the preset's if left out")
    parser.add_argument("--every", type=int, help="steps between changes; the preset's if left out")
    parser.add_argument("--window", type=int, default=8)
    default = Path("benchmarks/results/gaussians_restructure.json")
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    setup = Setup(options.steps, options.every, options.window)
    common = vars(setup) | {"texts": options.texts, "seeds": options.seeds}
    command = " ".join(["python benchmarks/gaussians_restructure.py", *sys.argv[1:]])
    title = "What adding and removing Gaussians costs in strides"
    kept = ResultStore(options.out, command, common, title, body)
    runs = [
        Run(text, seed, mode)
        for seed in range(options.seeds)
        for text in options.texts
        for mode in MODES
    ]
    tasks = [(run.name, (run, setup)) for run in runs]
    kept.carry_out(measure, tasks, options.processes, partial(said, setup))
    sys.stdout.write(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
