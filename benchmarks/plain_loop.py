"""The oracle of the benchmarks: what sequential means, without picardopt's optimizer."""

from __future__ import annotations

from picardopt_3d.problem import Problem
from torch import Tensor

from picardopt import step_rng


def sequential_step(problem: Problem, seed: int, step: int) -> Tensor:
    """Takes one step by the plain loop, and returns its loss."""
    optimizers, carry = problem.optimizers(), problem.carry()
    with step_rng(seed, step):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses = problem.loss(step)
        losses.total.backward()
        for optimizer in optimizers:
            optimizer.step()
        if carry is not None and carry.update is not None:
            carry.update(losses)
    return losses.total.detach()
