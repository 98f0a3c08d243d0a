"""The one changed line of the training loop, and the options that it takes from recipe and command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from picardopt import ParallelPicardOptimizer
from picardopt_3d.problem import Problem
from picardopt_3d.tolerances import TolConfig, ToleranceOption, build_tolerance

Predictor = Literal["coast", "hold"]


@dataclass(frozen=True)
class PicardConfig:
    """How a run evaluates steps ahead unless its command says otherwise (the paper's Tables 3 and 4).

    Attributes:
        window: Steps evaluated by one sweep; None: one per worker.
        tolerance: Largest residual that is accepted, as `tolerances` describes it; None: the optimizer's own rule.
        predictor: What fills the window's new slots: "coast", or "hold" (the paper's).
        secants: Pairs of drifts that correct drifts at wrong guesses, 0: none; None: the optimizer's own number for the
            tolerance.
    """

    window: int | None = None
    tolerance: ToleranceOption = None
    predictor: Predictor = "coast"
    secants: int | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: One is too small.
        """
        for name, least in (("window", 1), ("secants", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give a whole number of at least {least}")


@dataclass(frozen=True)
class PicardOptions:
    """A recipe's `PicardConfig` with a command's options laid over it; None leaves the recipe's.

    Attributes:
        recipe: The recipe's.
        window: As in `PicardConfig`.
        tolerance: Likewise.
        predictor: Likewise.
        secants: Likewise.
        sequential: Evaluate nothing ahead: a window of 1, whatever the others say.
    """

    recipe: PicardConfig
    window: int | None = None
    tolerance: TolConfig | None = None
    predictor: Predictor | None = None
    secants: int | None = None
    sequential: bool = False

    def arguments(self, losses: Sequence[int] | None = None) -> dict[str, Any]:
        """Returns the arguments of `ParallelPicardOptimizer` that these options decide.

        Args:
            losses: How many parameter groups each loss has, where there are several losses.
        """
        window = self.recipe.window if self.window is None else self.window
        given = {
            "window": 1 if self.sequential else window,
            "tolerance": build_tolerance(self.tolerance, self.recipe.tolerance, losses),
            "predictor": self.predictor or self.recipe.predictor,
            "secants": self.recipe.secants if self.secants is None else self.secants,
        }
        return {name: value for name, value in given.items() if value is not None}


def make_optimizer(
    problem: Problem, options: PicardOptions, steps: int, seed: int
) -> ParallelPicardOptimizer:
    """Wraps the optimizers of a problem.

    Where there are several (a scene's and its LoRA's), each has a loss of its own, and drifts are judged loss by loss.

    Args:
        problem: What is trained.
        options: How far ahead, and what is accepted.
        steps: Optimizer steps of the whole run.
        seed: Of the randomness of each step.
    """
    bases = problem.optimizers()
    return ParallelPicardOptimizer(
        bases[0] if len(bases) == 1 else bases,
        total_steps=steps,
        seed=seed,
        carry=problem.carry(),
        restructure=problem.restructure(),
        lr_scheduler=problem.lr_scheduler(),
        measured=problem.measured(),
        audit="auto" if problem.repeatable else "never",
        **options.arguments(groups_by_loss(problem)),
    )


def groups_by_loss(problem: Problem) -> list[int] | None:
    """Returns how many parameter groups with anything to measure each loss has; None for a single loss."""
    measured = [optimizer.param_groups for optimizer in problem.measured()]
    if len(measured) == 1:
        return None
    counts = [sum(any(p.numel() for p in group["params"]) for group in own) for own in measured]
    return [count for count in counts if count]
