"""The training loop; it knows nothing of 3D."""

from __future__ import annotations

from collections.abc import Callable

import torch

from picardopt import ParallelPicardOptimizer
from picardopt.interrupts import interrupts_deferred
from picardopt_3d.problem import Losses, Problem
from picardopt_3d.run.record import Recorder


def train(
    problem: Problem,
    optimizer: ParallelPicardOptimizer,
    recorder: Recorder,
    steps: int,
    view: Callable[[int, Losses], None],
    save: Callable[[], None],
) -> None:
    """Takes the steps that are left.

    Whatever ends the loop early, Ctrl-C or an error, the last committed step is recorded and saved.

    Args:
        problem: What is trained.
        optimizer: Wraps the problem's optimizers.
        recorder: Records each step of the same problem.
        steps: Where to end.
        view: Called after each step, with its losses.
        save: Called at the end, if a step was ever taken.
    """
    closure, scheduler = closure_of(problem), problem.lr_scheduler()
    try:
        for step in range(recorder.record.step, steps):
            with interrupts_deferred():  # a step that is done is counted too
                losses = optimizer.step(closure)
                if scheduler is not None:
                    scheduler.step()
                recorder.took(step, losses)
            view(step, losses)
    finally:
        recorder.count()
        if recorder.record.step:
            with interrupts_deferred():
                save()


def closure_of(problem: Problem) -> Callable[[int], Losses]:
    """Returns the closure that makes the gradients of a step's loss."""
    optimizers = problem.optimizers()

    def closure(step: int) -> Losses:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        try:
            losses = problem.loss(step)
            losses.total.backward()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{error}\nA step does not fit into the device's memory: lower recipe.batch, recipe.pixels or "
                "recipe.scene.samples, or give the score model less (recipe.guidance.options: dtype, offload, slicing)"
            ) from error
        return losses

    return closure
