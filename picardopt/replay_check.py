"""Checks that a snapshot holds all state of the base's step, which running ahead depends on.

A base may count or draw random numbers outside the reach of `Snapshot`: in its class or module, in a closure, in an
iterator, in a file. Two rollouts from one state over the same drifts then end at different parameters.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from picardopt.bases import JoinedOptimizer
from picardopt.errors import UnsupportedOptimizerError
from picardopt.layout import Row
from picardopt.sweep import squares

_LONGEST_GAP = 1000  # sweeps
_LARGEST_NOISE = 0.01  # relative to the rollout's length; larger differences are not rounding


def due(sweep: int) -> bool:
    """Returns whether to roll out twice in this sweep: often at first, then rarely."""
    return sweep & (sweep + 1) == 0 or sweep % _LONGEST_GAP == 0


def repeats(first: Row, again: Row, head: Row) -> bool:
    """Returns whether two rollouts from the head ended at the same parameters.

    On one CPU thread, where sums have one order, the numbers must be equal; elsewhere rounding errors are accepted.

    Args:
        first: Last iterate of the first rollout.
        again: Last iterate of the second rollout.
        head: Their first iterate.
    """
    pairs = zip(first.segments, again.segments, strict=True)
    if all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs):
        return True
    if head.buffer.device.type == "cpu" and torch.get_num_threads() == 1:
        return False
    others = [again.segments, head.segments]
    difference, length = squares([first.segments] * len(others), others).tolist()
    return not difference > _LARGEST_NOISE**2 * length  # a NaN proves nothing


def hidden_state(base: Optimizer, step: int) -> UnsupportedOptimizerError:
    """Returns the error for a base whose second rollout ended elsewhere.

    Args:
        base: The wrapped optimizer.
        step: First step of both rollouts.
    """
    bases = base.optimizers if isinstance(base, JoinedOptimizer) else [base]
    names = ", ".join(dict.fromkeys(type(each).__name__ for each in bases))
    return UnsupportedOptimizerError(
        f"base={names}: rolled out twice from the same state over the same gradients (from step {step} on), it gave "
        "other parameters, so it (or the lr_scheduler) counts or draws somewhere that running ahead cannot restore: "
        "in a class or module variable, a closure, an iterator, a file. Keep such state in optimizer.state, in a group "
        "or in plain attributes, and draw from torch's, numpy's or random's generators; or use window=1"
    )
