"""Running ahead beyond 3D: a transformer of characters, a LoRA and a diffusion model that nothing was chosen for.

    python benchmarks/beyond_3d.py                       # everything, or what is missing of it
    python benchmarks/beyond_3d.py --tasks lora          # one task
    python benchmarks/beyond_3d.py --render              # write the tables of the runs that are there

A window's drifts are evaluated one after the other here: everything but the time is that of any number of workers.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from beyond_tables import body, said
from beyond_tasks import PRETRAINING, Task, characters, diffusion, lora, manual, source
from result_store import Figures, ResultStore
from torch.optim.lr_scheduler import LambdaLR

from picardopt import (
    AdaptiveTolerance,
    DriftTolerance,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
)

STEPS = {
    "characters": 400,
    "characters, Muon": 400,
    "lora": 300,
    "lora, low rate": 300,
    "diffusion": 300,
}
"""Steps of each task's schedule."""
LORA_RATES = {"lora": 1e-3, "lora, low rate": 2e-4}
"""Both are usual; of the two the first one learns faster here."""
POINTS, LAST = 12, 5
"""Points of a loss curve, and steps at the end whose held-out losses are averaged."""
LINES = [
    ("sequential", 1, 0, 1.0),
    ("sequential", 1, 1, 1.0),
    ("drift error", 8, 0, 1.0),
    ("drift error", 64, 0, 1.0),
    ("sequential", 1, 2, 1.0),
    ("sequential", 1, 3, 1.0),
    ("step lengths", 8, 0, 1.0),
    ("the paper's rule", 8, 0, 1.0),
    ("drift error", 8, 0, 1.1),
    ("drift error", 8, 0, 1.25),
    ("drift error", 16, 0, 1.0),
    ("drift error", 32, 0, 1.0),
    ("drift error", 64, 0, 1.1),
    ("drift error", 64, 0, 1.25),
]
"""Rule, window, seed and stretch of each run of a task."""


@dataclass(frozen=True)
class Run:
    """One run of a task."""

    task: str
    rule: str
    window: int
    seed: int
    stretch: float
    steps: int
    pretraining: int
    cache: Path

    @property
    def name(self) -> str:
        return f"{self.task}/{self.rule}/window {self.window}/seed {self.seed}/stretch {self.stretch:g}"


def task_of(run: Run) -> Task:
    """The run's training, before its first step."""
    if run.task in LORA_RATES:
        return lora(run.seed, run.cache, run.pretraining, LORA_RATES[run.task])
    if run.task == "diffusion":
        return diffusion(run.seed)
    return characters(run.seed, muon=run.task.endswith("Muon"))


def rule_of(run: Run) -> dict[str, Any]:
    """The optimizer's options that make the rule."""
    if run.rule == "step lengths":
        return {"tolerance": StepRelativeTolerance(2.0, 0.2), "secants": 0}
    if run.rule == "the paper's rule":
        return {"tolerance": AdaptiveTolerance(), "predictor": "hold"}
    if run.rule == "drift error":
        return {"tolerance": DriftTolerance()}
    return {}


def wrapped(run: Run, task: Task) -> tuple[ParallelPicardOptimizer, LambdaLR]:
    """The optimizer that runs ahead, and its warm-up over a twentieth and cosine decay to a tenth of the rate."""
    optimizer = ParallelPicardOptimizer(
        task.bases if len(task.bases) > 1 else task.bases[0],
        window=run.window,
        total_steps=run.steps,
        seed=run.seed,
        audit="never",
        **rule_of(run),
    )
    warm = max(1, run.steps // 20)

    def rate(step: int) -> float:
        cosine = (1 + math.cos(math.pi * min(1.0, step / run.steps))) / 2
        return min(1.0, (step + 1) / warm) * (0.1 + 0.9 * cosine)

    scheduler = LambdaLR(optimizer, rate)
    optimizer.lr_scheduler = scheduler
    return optimizer, scheduler


def optimize(run: Run) -> tuple[str, Figures]:
    """Carries out one run in this process."""
    torch.set_num_threads(1)
    task = task_of(run)
    optimizer, scheduler = wrapped(run, task)
    looked_at = {round(run.steps * point / POINTS) for point in range(1, POINTS + 1)}
    curve, last, seconds = [], [], 0.0
    for step in range(1, run.steps + 1):
        begin = time.process_time()
        optimizer.step(task.closure)
        scheduler.step()
        if task.after_step is not None:
            task.after_step()
        seconds += time.process_time() - begin
        if step in looked_at or step > run.steps - LAST:
            loss = task.evaluate()
            if step > run.steps - LAST:
                last.append(loss)
            if step in looked_at:
                curve.append([step, optimizer.stats.sweeps, loss])
    stats = optimizer.stats
    return run.name, {
        "steps": run.steps,
        "sweeps": stats.sweeps,
        "steps_per_sweep": run.steps / stats.sweeps,
        "evaluations_per_step": stats.drift_evaluations / run.steps,
        "loss": statistics.fmean(last),
        "drift_error": list(stats.drift_error),
        "drift_noise": list(stats.drift_noise),
        "parameters": [sum(p.numel() for p in g["params"]) for g in optimizer.param_groups],
        "curve": curve,
        "strides": stats.strides if run.window > 1 else [],
        "cpu_seconds": seconds,
    }


def runs_of(options: argparse.Namespace) -> list[Run]:
    """All runs, the most telling ones first."""
    found = []
    for rule, window, seed, stretch in LINES:
        if window not in options.windows or rule not in options.rules:
            continue
        for task in options.tasks:
            steps = round(stretch * (options.steps or STEPS[task]))
            settings = (options.steps or PRETRAINING, options.cache)
            found.append(Run(task, rule, window, seed, stretch, steps, *settings))
    return found


def main() -> None:
    rules = list(dict.fromkeys(rule for rule, *_ in LINES))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--rules", nargs="+", choices=rules, default=rules)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, help="of every task and of the Llama, for a trial")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/beyond_3d.json"))
    parser.add_argument("--cache", type=Path, default=Path("build/beyond_3d"))
    parser.add_argument("--render", action="store_true", help="only write the tables")
    options = parser.parse_args()
    text = zlib.crc32(torch.cat([manual(), source()]).to(torch.uint8).numpy().tobytes())
    setup = {"steps": options.steps, "text": text}
    command = "python benchmarks/beyond_3d.py"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = ResultStore(options.out, command, setup, "Beyond 3D", body)
    if options.render:
        kept.write()
    else:
        todo = [(run.name, run) for run in runs_of(options)]
        kept.carry_out(optimize, todo, options.processes, said)
    sys.stdout.write(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
