"""The trainings of `plan_check.py`: those of `beyond_3d.py`, the settings of `rounds.py`, and small recipes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from beyond_3d import STEPS as BEYOND_STEPS
from beyond_3d import Run as BeyondRun
from beyond_3d import task_of, wrapped
from beyond_tasks import PRETRAINING
from method_runs import PICTURES, RECIPES, TEXTS
from picardopt_3d.methods import Context
from picardopt_3d.methods.dreamfusion import SMALL
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.picard import PicardOptions, make_optimizer
from picardopt_3d.run.loop import closure_of
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.tolerances import DriftTol
from plan_tables import BEYOND, ROUNDS
from rounds import SETTINGS
from small_scenes import guidance_of
from tolerances import Run as RecipeRun
from tolerances import configuration

from picardopt import DriftTolerance, ParallelPicardOptimizer

PROMPT = "a red cube"


@dataclass
class Training:
    """A loop.

    Attributes:
        optimizer: What it steps.
        step: Takes one step of everything that the loop steps.
    """

    optimizer: ParallelPicardOptimizer
    step: Callable[[], object]


def training(name: str, window: int, cache: Path, short: bool) -> Training:
    """A training before its first step, by the rule on drift errors.

    Args:
        name: One of `plan_tables.STEPS`.
        window: Of the optimizer.
        cache: Where the Llama of the LoRA is kept.
        short: Whether that is trained for a few steps only.
    """
    if name in BEYOND:
        return _beyond(name, window, cache, short)
    return _setting(name, window) if name in ROUNDS else _recipe(name, window)


def _beyond(name: str, window: int, cache: Path, short: bool) -> Training:
    pretraining = 5 if short else PRETRAINING
    run = BeyondRun(name, "drift error", window, 0, 1.0, BEYOND_STEPS[name], pretraining, cache)
    task = task_of(run)
    optimizer, scheduler = wrapped(run, task)

    def step() -> None:
        optimizer.step(task.closure)
        scheduler.step()
        if task.after_step is not None:
            task.after_step()

    return Training(optimizer, step)


def _setting(name: str, window: int) -> Training:
    batch, rate = SETTINGS[name]
    recipe = replace(SMALL, batch=batch, rates=field_rates(encoding=rate))
    torch.manual_seed(0)
    prompt = recipe.guidance.text_prompt(PROMPT)
    stage = recipe.build(Context(guidance_of("exact", PROMPT), prompt, torch.device("cpu")))
    (base,) = stage.optimizers()
    optimizer = ParallelPicardOptimizer(
        base, window=window, tolerance=DriftTolerance(), total_steps=recipe.steps, audit="never"
    )
    closure = closure_of(stage)
    return Training(optimizer, lambda: optimizer.step(closure))


def _recipe(name: str, window: int) -> Training:
    caption = TEXTS[0] if RECIPES[name][0] == "text-to-3d" else next(iter(PICTURES))
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(RecipeRun(name, caption, 0, "drift"), Path(folder))
        stage: Any = config.recipe.stages()[0].config
        picture = Path(folder, "input.png")
        problem = build_problem(stage, config.task, picture, torch.device("cpu"), 0)
    options = PicardOptions(stage.picard, window=window, tolerance=DriftTol())
    optimizer = make_optimizer(problem, options, stage.steps, 0)
    closure, scheduler = closure_of(problem), problem.lr_scheduler()

    def step() -> None:
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()

    return Training(optimizer, step)
