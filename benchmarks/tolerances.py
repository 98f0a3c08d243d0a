"""Tolerances at equal steps and at equal quality: what each one loses, and what making up for it costs.

    python benchmarks/tolerances.py                 # everything, or what is missing of it

The first stage of each recipe, by each rule, with one process that evaluates a window's slots one after the other.
Schedules may be stretched: every step that a recipe names is multiplied; the run then has more steps of each kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from method_runs import PICTURES, RECIPES, TEXTS, recipe_of, subject
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.config import ImageTo3DConfig, RunConfig, TextTo3DConfig
from picardopt_3d.images import save_reference
from picardopt_3d.methods import StageConfig, stage_seed
from picardopt_3d.picard import groups_by_loss
from picardopt_3d.run.loop import closure_of
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.scenes import HashConfig
from picardopt_3d.world.pictures import true_reference
from picardopt_3d.world.yardstick import psnr_against_truth
from result_store import Figures, ResultStore
from tables import markdown

from picardopt import (
    AdaptiveTolerance,
    DriftTolerance,
    ParallelPicardOptimizer,
    StepRelativeTolerance,
)

RULES: dict[str, dict[str, Any]] = {
    "sequential": {"window": 1},
    "step-relative": {"tolerance": StepRelativeTolerance},
    "step-relative, scene judged": {"tolerance": StepRelativeTolerance, "judged": "scene"},
    "drift": {"tolerance": DriftTolerance},
    "drift, no secants": {"tolerance": DriftTolerance, "secants": 0},
    "drift, 24 secants": {"tolerance": DriftTolerance, "secants": 24},
    "drift 0.01": {"tolerance": partial(DriftTolerance, 0.01, 0.03)},
    "drift 0.05": {"tolerance": partial(DriftTolerance, 0.05)},
    "drift 0.5": {"tolerance": partial(DriftTolerance, 0.5)},
    "drift 1": {"tolerance": partial(DriftTolerance, 1.0)},
    "drift 1, 16 secants": {"tolerance": partial(DriftTolerance, 1.0), "secants": 16},
    "drift 2, 16 secants": {"tolerance": partial(DriftTolerance, 2.0), "secants": 16},
    "drift, scene judged": {"tolerance": DriftTolerance, "judged": "scene"},
    "drift, as one loss": {"tolerance": DriftTolerance, "judged": "as one loss"},
    "drift 0.05, as one loss": {
        "tolerance": partial(DriftTolerance, 0.05),
        "judged": "as one loss",
    },
    "the paper's": {"tolerance": AdaptiveTolerance, "predictor": "hold"},
    "everything": {"tolerance": lambda: float("inf")},
}
"""Options of the optimizer, by the name of the rule; a window of 8 unless said. `judged`: what is, where the guidance
trains a LoRA; without it, scene and LoRA, each by its own loss."""
LAST = (9, 6, 3, 0)
"""Steps before the last one whose iterates' PSNR is averaged: that of one iterate moves by up to a decibel."""
NAMED_STEPS = {"steps", "ambient_steps", "after", "between", "start", "stop"}
"""Fields of a stage's configuration that are numbers of steps."""


@dataclass(frozen=True)
class Run:
    """One run of a recipe's first stage."""

    recipe: str
    caption: str
    seed: int
    rule: str
    window: int = 8
    stretch: float = 1.0

    @property
    def name(self) -> str:
        name = f"{self.recipe}/{self.caption}/{self.seed}/{self.rule}"
        if self.rule != "sequential":
            name += f"/{self.window}"
        return name + (f"/{self.stretch:g}" if self.stretch != 1 else "")


def stretched(config: Any, factor: float) -> Any:
    """Returns a configuration with every number of steps in it multiplied."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in NAMED_STEPS and isinstance(value, int):
            changes[item.name] = round(value * factor)
        elif item.name in NAMED_STEPS and isinstance(value, tuple):
            changes[item.name] = tuple(round(step * factor) for step in value)
        elif isinstance(config, HashConfig) and item.name == "every":
            changes[item.name] = max(1, round(value * factor))
        elif isinstance(value, tuple) and all(_is_pair(pair) for pair in value):
            changes[item.name] = tuple((round(step * factor), x) for step, x in value)
        elif dataclasses.is_dataclass(value):
            changes[item.name] = stretched(value, factor)
    return dataclasses.replace(config, **changes)


def _is_pair(value: Any) -> bool:
    """Whether this is a (step, value) pair of a schedule."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int)


def configuration(run: Run, out: Path) -> RunConfig[Any]:
    """The run's options, with its picture if it has one."""
    command, method, preset = RECIPES[run.recipe]
    options: dict[str, Any] = {"out": out, "method": method, "preset": preset, "device": "cpu"}
    options |= {"recipe": recipe_of(run.recipe), "seed": run.seed}
    if command == "text-to-3d":
        return TextTo3DConfig(prompt=run.caption, **options)
    elevation, azimuth = PICTURES[run.caption]
    picture = out / "input.png"
    save_reference(true_reference(subject(run.caption), orbit_cameras(elevation, azimuth)), picture)
    return ImageTo3DConfig(image=picture, elevation=elevation, azimuth=azimuth, **options)


def optimize(run: Run) -> tuple[str, Figures]:
    """Carries out one run in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(run, Path(folder))
        stage: StageConfig = stretched(config.recipe.stages()[0].config, run.stretch)
        seed = stage_seed(run.seed, 0)
        picture = Path(folder, "input.png")
        problem = build_problem(stage, config.task, picture, torch.device("cpu"), seed)
    options = {"window": run.window} | RULES[run.rule]
    judged, measured = options.pop("judged", None), problem.measured()
    losses = groups_by_loss(problem)
    if judged == "scene":
        measured = measured[:1]
    if "tolerance" in options:
        by_loss = losses is not None and judged is None and "drift" in run.rule
        options["tolerance"] = options["tolerance"](**({"losses": losses} if by_loss else {}))
    bases = problem.optimizers()
    optimizer = ParallelPicardOptimizer(
        bases[0] if len(bases) == 1 else bases,
        total_steps=stage.steps,
        seed=seed,
        carry=problem.carry(),
        restructure=problem.restructure(),
        lr_scheduler=problem.lr_scheduler(),
        measured=measured,
        audit="never",
        **options,
    )
    closure, scheduler = closure_of(problem), problem.lr_scheduler()
    curve = []
    for step in range(1, stage.steps + 1):
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
        if step % max(1, stage.steps // 10) == 0 or stage.steps - step in LAST:
            psnr = psnr_against_truth(problem.scene, subject(run.caption), stage.final_pixels)
            curve.append((step, optimizer.stats.sweeps, psnr))
    stats = optimizer.stats
    return run.name, {
        "psnr": statistics.fmean(psnr for step, _, psnr in curve if stage.steps - step in LAST),
        "steps": stage.steps,
        "sweeps": stats.sweeps,
        "drift_evaluations": stats.drift_evaluations,
        "drift_error": stats.drift_error,
        "drift_noise": stats.drift_noise,
        "curve": curve,
    }


def runs(recipes: list[str], rules: list[str], subjects: int, windows: list[int]) -> list[Run]:
    """Every run, those first that others are compared with."""
    listed = []
    for recipe in recipes:
        captions = TEXTS if RECIPES[recipe][0] == "text-to-3d" else tuple(PICTURES)
        for caption in captions[:subjects]:
            listed += [Run(recipe, caption, seed, "sequential") for seed in (0, 1)]
            for rule in rules:
                if rule != "sequential":
                    listed += [Run(recipe, caption, 0, rule, window) for window in windows]
    return listed


def body(content: Figures) -> tuple[str, str]:
    """Notes and tables of the document."""
    found = content["runs"]
    keys = {(name.split("/")[0], *name.split("/")[3:]) for name in found}
    heads = ["recipe", "rule, window, stretch", "runs", "PSNR from sequential, dB", "apart, dB"]
    heads += ["steps a sweep", "sequential steps / sweeps", "evaluations a step", "drift error"]
    rows = []
    for recipe, *rest in sorted(keys, key=lambda key: (list(RECIPES).index(key[0]), key[1:])):
        names = [n for n in found if (n.split("/")[0], *n.split("/")[3:]) == (recipe, *rest)]
        if rest == ["sequential"]:
            rows.append([recipe, "another seed", *_row(found, [n for n in names if "/1/" in n])])
        else:
            rows.append([recipe, ", ".join(rest), *_row(found, names)])
    return NOTES, markdown(heads, rows)


def _row(found: dict[str, Figures], names: list[str]) -> list[str]:
    pairs = []
    for name in names:
        recipe, caption, *_ = name.split("/")
        other = found.get(Run(recipe, caption, 0, "sequential").name)
        if other is not None:
            pairs.append((found[name], other))
    if not pairs:
        return [""] * 7
    errors = [max(run["drift_error"]) for run, _ in pairs if run["drift_error"]]

    def mean(values: list[float]) -> str:
        return f"{statistics.fmean(values):.2f}"

    return [
        str(len(pairs)),
        mean([run["psnr"] - other["psnr"] for run, other in pairs]),
        mean([abs(run["psnr"] - other["psnr"]) for run, other in pairs]),
        mean([run["steps"] / run["sweeps"] for run, _ in pairs]),
        mean([other["steps"] / run["sweeps"] for run, other in pairs]),
        mean([run["drift_evaluations"] / run["steps"] for run, _ in pairs]),
        f"{100 * statistics.fmean(errors):.0f} %" if errors else "",
    ]


NOTES = """
The first stage of each method's `small` preset, window and rule as named (`RULES` in the script), against the
sequential run of the same subject with seed 0; means over the subjects that were run. *Another seed* is the
sequential run with seed 1. *Stretch*: every number of steps in the recipe times this. *Sequential steps / sweeps*:
how many times fewer rounds the run took than the sequential one; a speed at equal quality where the PSNR is not
below it. *Drift error*: of the parameter group that is off most, at the first slot that a sweep does not keep. PSNR
(32 held-out views) is the mean over four of the last ten iterates, because that of one moves by up to a decibel; the
JSON has it ten times along each run too, with the sweeps until there. *Drift 0.5*: another share of the noise than 0.2.
Guesses of ProlificDreamer's LoRA are judged by its own loss, unless *scene judged* (not at all) or *as one loss*.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=["zero123"])
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=list(RULES))
    parser.add_argument("--subjects", type=int, default=3, help="texts or pictures a recipe")
    parser.add_argument("--windows", nargs="+", type=int, default=[8])
    parser.add_argument("--stretch", nargs="+", type=float, default=[1.0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tolerances.json"))
    options = parser.parse_args()
    store = ResultStore(options.out, "python benchmarks/tolerances.py", {}, "Tolerances", body)
    for stretch in options.stretch:
        listed = [
            dataclasses.replace(run, stretch=1.0 if run.rule == "sequential" else stretch)
            for run in runs(options.recipes, options.rules, options.subjects, options.windows)
        ]
        tasks = [(run.name, run) for run in listed]
        store.carry_out(optimize, tasks, options.processes, said)
    sys.stdout.write(options.out.with_suffix(".md").read_text())


def said(found: Figures) -> str:
    """What is printed of a run."""
    return f"{found['psnr']:.2f} dB, {found['steps'] / found['sweeps']:.2f} steps a sweep"


if __name__ == "__main__":
    main()
