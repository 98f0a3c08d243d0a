"""The one changed line of the training loop, with what a run's options say of it."""

from __future__ import annotations

from typing import Any

import torch

from picardopt import AdaptiveTolerance, Carry, ParallelPicardOptimizer, StepRelativeTolerance

from .config import RunConfig


def wrap(
    base: torch.optim.Optimizer, carry: Carry | None, config: RunConfig[Any]
) -> ParallelPicardOptimizer:
    """Wrap a recipe's optimizer; what the command does not say, the recipe does."""
    picard = config.recipe.picard
    options: dict[str, Any] = {
        "total_steps": config.recipe.steps,
        "seed": config.seed,
        "carry": carry,
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
    return ParallelPicardOptimizer(base, **options)
