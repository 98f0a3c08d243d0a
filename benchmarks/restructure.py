"""What steps that change the number of parameters cost in strides, by how the window treats them.

    python benchmarks/restructure.py --out benchmarks/results/restructure.md

The scene is that of `examples/gaussian_fitting.py`. "ends": the window ends at a densification; "across": it runs
across, as in the paper; "dropped": the loop densifies between two calls of step, and what was evaluated beyond is
dropped; "never": no densification at all, the ceiling. Deviation is the difference between the fitted pictures of a run
and of the sequential run of its seed, divided by that between the sequential runs of two seeds.
"""

from __future__ import annotations

import functools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from picardopt import Restructure, step_rng

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gaussian_fitting import Config, Fitting

MODES = ("never", "dropped", "ends", "across")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        steps: Steps a run.
        every: Steps from one densification to the next.
        windows: Windows.
        tolerances: None is the default.
        seeds: Runs a row.
        out: Markdown file; the table is printed anyway.
    """

    steps: int = 200
    every: tuple[int, ...] = (25, 50)
    windows: tuple[int, ...] = (8, 16)
    tolerances: tuple[float | None, ...] = (None, 1e-4)
    seeds: int = 2
    out: Path | None = None


@dataclass(frozen=True)
class Run:
    """The figures of one run."""

    stride: float
    wasted: float
    psnr: float
    deviation: float


@functools.cache
def sequential(steps: int, every: int, seed: int, densify: bool) -> Fitting:
    """The plain loop."""
    config = Config(steps=steps, every=every, seed=seed)
    task = Fitting(config)
    for t in range(config.steps):
        with step_rng(config.seed, t):
            task.closure()
            for optimizer in task.optimizers.values():
                optimizer.step()
            if densify and task.due(t):
                task.densify(t)
    return task


def speculative(config: Config, mode: str) -> tuple[Fitting, float, float]:
    """Runs it with Picard iteration; returns the task, steps per sweep and the share of evaluations thrown away."""
    task = Fitting(config)
    declared = mode in ("ends", "across")
    optimizer = task.wrap(
        Restructure(task.densify, task.due, across=mode == "across") if declared else None
    )
    for t in range(config.steps):
        optimizer.step(task.closure)
        if mode == "dropped" and task.due(t):
            with step_rng(config.seed, t):
                task.densify(t)
    stats = optimizer.stats
    return task, stats.steps / stats.sweeps, stats.wasted_evaluations / stats.drift_evaluations


def apart(a: Fitting, b: Fitting) -> float:
    """Distance of two pictures."""
    return float((a.picture() - b.picture()).square().mean().sqrt())


def measure(config: Config, mode: str, reference: Fitting, spread: float) -> Run:
    """One run beside the sequential one of its seed."""
    task, stride, wasted = speculative(config, mode)
    return Run(
        stride, wasted, task.psnr() - reference.psnr(), apart(task, reference) / max(spread, 1e-12)
    )


def table(options: Options) -> list[str]:
    """Measures everything; returns the lines of the table."""
    lines = [
        "| every | window | tolerance | at a densification | steps a sweep | thrown away | PSNR, dB | deviation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    cells = [(e, w, t) for e in options.every for w in options.windows for t in options.tolerances]
    for every, window, tolerance in tqdm(cells):
        for mode in MODES:
            runs = []
            for seed in range(options.seeds):
                config = Config(
                    steps=options.steps, every=every, window=window, tolerance=tolerance, seed=seed
                )
                reference, other = (
                    sequential(options.steps, every, s, mode != "never")
                    for s in (seed, seed + options.seeds)
                )
                runs.append(measure(config, mode, reference, apart(reference, other)))
            stride, wasted, psnr, deviation = (
                statistics.fmean(getattr(run, name) for run in runs)
                for name in ("stride", "wasted", "psnr", "deviation")
            )
            shown = "default" if tolerance is None else f"{tolerance:g}"
            measured = f"{stride:.2f} | {wasted:.0%} | {psnr:+.2f} | {deviation:.0%}"
            lines.append(f"| {every} | {window} | {shown} | {mode} | {measured} |")
    return lines


def main(options: Options) -> None:
    """Prints the table, and writes it."""
    torch.set_num_threads(1)
    lines = table(options)
    print("\n".join(lines))
    if options.out is not None:
        command = "python benchmarks/restructure.py " + " ".join(sys.argv[1:])
        head = f"`{command}`, torch {torch.__version__}, {options.seeds} seeds a row, {options.steps} steps a run.\n"
        options.out.write_text("\n".join([__doc__.split("\n\n")[0], "", head, *lines, ""]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
