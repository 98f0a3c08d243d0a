"""Is the base's step a function of what a snapshot holds? Running ahead is only right if it is.

A base may count or draw somewhere that `Snapshot` does not reach: in its class or module, in a closure, in an
iterator, in a file. Rolled out twice from one state over the same drifts, it then gives other parameters.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from picardopt.bases import JoinedOptimizer
from picardopt.errors import UnsupportedOptimizerError
from picardopt.layout import Row
from picardopt.sweep import squared_difference

_LONGEST_GAP = 1000  # sweeps
_LARGEST_NOISE = 0.01  # of the rollout's length: more than that is no rounding


def due(sweep: int) -> bool:
    """Whether to roll out twice in this sweep: in the first ones, then ever more rarely."""
    return sweep & (sweep + 1) == 0 or sweep % _LONGEST_GAP == 0


def repeats(first: Row, again: Row, head: Row, scratch: torch.Tensor) -> bool:
    """Whether two rollouts from the head ended at the same parameters.

    One CPU thread adds in one order: there only equal bits will do; elsewhere rounding is let pass.

    Args:
        first: Where the first one ended.
        again: Where the second one ended.
        head: Where both began.
        scratch: float64 tensor [any length] that may be overwritten.
    """
    pairs = zip(first.segments, again.segments, strict=True)
    if all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs):
        return True
    if head.buffer.device.type == "cpu" and torch.get_num_threads() == 1:
        return False
    difference = squared_difference(first.segments, again.segments, scratch)
    length = squared_difference(first.segments, head.segments, scratch)
    return not bool(difference > _LARGEST_NOISE**2 * length)  # NaN tells nothing


def hidden_state(base: Optimizer, step: int) -> UnsupportedOptimizerError:
    """The error for a base that did not give its own rollout again.

    Args:
        base: The base.
        step: The step at which both rollouts began.
    """
    bases = base.optimizers if isinstance(base, JoinedOptimizer) else [base]
    names = ", ".join(dict.fromkeys(type(each).__name__ for each in bases))
    return UnsupportedOptimizerError(
        f"base={names}: rolled out twice from the same state over the same gradients (from step {step} on), it gave "
        "other parameters, so it (or the lr_scheduler) counts or draws somewhere that running ahead cannot put back: "
        "in a class or module variable, a closure, an iterator, a file. Keep such state in optimizer.state, in a group "
        "or in plain attributes, and draw from torch's, numpy's or random's generators; or use window=1"
    )
