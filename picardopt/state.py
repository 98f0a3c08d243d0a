"""Saves the wrapper's part of a state dict, and loads both parts or neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from picardopt.errors import CheckpointError
from picardopt.layout import parameters_of
from picardopt.snapshot import Snapshot
from picardopt.tolerance import Tolerance


def saved_state(step: int, seed: int, tolerance: Tolerance, base: Optimizer) -> dict[str, Any]:
    """Returns the wrapper's part of a state dict, for `load_state`."""
    return {
        "step": step,
        "seed": seed,
        "tolerance": tolerance.state_dict(),
        "shapes": [list(p.shape) for p in parameters_of(base)],
    }


def load_state(
    base: Optimizer, tolerance: Tolerance, state: Mapping[str, Any], ours: Mapping[str, Any] | None
) -> tuple[int, int] | None:
    """Loads a base's state dict and the tolerance; both or neither.

    Args:
        base: The wrapped optimizer.
        tolerance: The tolerance.
        state: The base's state dict.
        ours: The wrapper's part, from `saved_state`; or None.

    Returns:
        The step and the seed, if `ours` was given.

    Raises:
        CheckpointError: If the state is invalid, or belongs to another model or optimizer.
    """
    before = Snapshot([base, tolerance])
    before.capture(parameters_of(base))
    try:
        loaded = None
        if ours is not None:
            loaded = int(ours["step"]), int(ours["seed"])
            tolerance.load_state_dict(ours["tolerance"])
        base.load_state_dict(dict(state))
        if ours is not None:  # torch's optimizers accept a state of the wrong shape silently
            _check_shapes(ours.get("shapes"), parameters_of(base))
        return loaded
    except BaseException as error:
        before.restore()
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"this state cannot be loaded into this optimizer ({type(error).__name__}: {error}); nothing was "
            "changed: build the model and the optimizer that it was saved from"
        ) from error


def _check_shapes(saved: Sequence[Sequence[int]] | None, parameters: Sequence[Tensor]) -> None:
    if saved is None:  # written by a version that did not save shapes
        return
    shapes = [list(p.shape) for p in parameters]
    if len(saved) != len(shapes):
        raise ValueError(f"it was saved with {len(saved)} parameters, there are {len(shapes)} now")
    for index, (was, now) in enumerate(zip(saved, shapes, strict=True)):
        if list(was) != now:
            raise ValueError(
                f"parameter {index} had the shape {list(was)} when it was saved, now {now}"
            )
