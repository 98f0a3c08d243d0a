"""The one changed line of the training loop, with what a run's options say of it."""

from __future__ import annotations

from typing import Any

import torch

from picardopt import AdaptiveTolerance, ParallelPicardOptimizer, StepRelativeTolerance

from .config import RunConfig
from .problem import Problem


def wrap(
    base: torch.optim.Optimizer, problem: Problem, config: RunConfig[Any]
) -> ParallelPicardOptimizer:
    """Wrap a problem's optimizers; what the command does not say, the recipe does."""
    picard = config.recipe.picard
    options: dict[str, Any] = {
        "total_steps": config.recipe.steps,
        "seed": config.seed,
        "carry": problem.carry(),
        "restructure": problem.restructure(),
        "measured": problem.measured(),
        "lr_scheduler": problem.lr_scheduler(),
        "predictor": config.predictor or picard.predictor,
    }
    window = picard.window if config.window is None else config.window
    if window is not None:
        options["window"] = window
    rule = config.tolerance
    if rule is None and picard.rule == "adaptive":
        rule = "adaptive"
    if rule == "adaptive":
        options["tolerance"] = AdaptiveTolerance(
            picard.initial, decay=picard.decay, statistic=picard.statistic
        )
    elif rule == "step-relative":
        options["tolerance"] = StepRelativeTolerance()
    elif rule is not None:
        options["tolerance"] = rule
    optimizers = problem.optimizers()
    return ParallelPicardOptimizer(base if len(optimizers) == 1 else optimizers, **options)
