"""Puts other parameters in the place of old ones, in a dict and in the groups and states of their optimizers.

Everything is computed before anything is replaced: an error leaves all as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def replace_rows(
    parameters: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    values: Mapping[str, Tensor],
    parents: Tensor,
    new: Tensor,
) -> None:
    """Replaces parameters by others whose rows stem from theirs.

    Of an optimizer's state for a parameter, every tensor with a row for each of the parameter's is taken along by the
    parents; the rest (counts of steps) stays. So it works for any optimizer whose states are per parameter. Two kinds
    are known by their names: a matrix's column factors (Adafactor's `col_var`), of which none belongs to a row,
    however many there are, and step sizes (Rprop's `step_size`), which new rows take from their parents.

    Args:
        parameters: The parameters by name; the replaced ones are put in.
        optimizers: The optimizers that train them, each any number.
        values: The new values by name.
        parents: The old row of each new one, int64. [rows]
        new: The rows whose states begin at zero, apart from step sizes. [rows]
    """
    made = {
        id(parameters[name]): nn.Parameter(value, requires_grad=parameters[name].requires_grad)
        for name, value in values.items()
    }
    states: list[dict[Tensor, dict[str, Any]]] = [
        {
            made.get(id(old), old): {
                key: _remapped(key, value, old, parents, new) for key, value in state.items()
            }
            if id(old) in made
            else state
            for old, state in optimizer.state.items()
        }
        for optimizer in optimizers
    ]
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.state.clear()
        optimizer.state.update(state)
        for group in optimizer.param_groups:
            group["params"][:] = [made.get(id(each), each) for each in group["params"]]
    for name in values:
        parameters[name] = made[id(parameters[name])]


def _remapped(key: str, value: Any, old: Tensor, parents: Tensor, new: Tensor) -> Any:
    """Returns the new rows' part of a state that has a row for each old one; any other state as it is."""
    of_columns = old.ndim == 2 and "col" in key.split("_")
    if of_columns or not isinstance(value, Tensor) or value.shape[:1] != old.shape[:1]:
        return value
    taken = value[parents]
    if key != "step_size":
        taken[new] = 0
    return taken
