"""Puts other parameters in the place of old ones, in a dict and in the groups and states of their optimizers.

Everything is computed before anything is replaced: an error leaves all as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_States = dict[tuple[int, int], dict[str, Any]]  # by the ids of an optimizer and an old parameter


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
    states: _States = {}
    for optimizer in optimizers:
        for name in values:
            old = parameters[name]
            if old in optimizer.state:
                states[id(optimizer), id(old)] = {
                    key: _inherited(key, value, old, parents, new)
                    for key, value in optimizer.state[old].items()
                }
    _swap(parameters, optimizers, values, states)


@torch.no_grad()
def replace_values(
    parameters: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    values: Mapping[str, Tensor],
) -> None:
    """Replaces parameters by others with given values, of any number of rows, and drops the optimizers' states.

    For loading a checkpoint with another number of rows: afterwards load the optimizers' states.

    Args:
        parameters: The parameters by name; the replaced ones are put in.
        optimizers: The optimizers that train them, each any number.
        values: The new values by name, copied to the parameters' devices and dtypes.

    Raises:
        ValueError: If there is no parameter of a name.
    """
    for name in values:
        if name not in parameters:
            raise ValueError(f"{name!r} is none of the parameters {', '.join(parameters)}")
    copied = {
        name: value.detach().to(parameters[name], copy=True, memory_format=torch.contiguous_format)
        for name, value in values.items()
    }
    _swap(parameters, optimizers, copied, {})


def _inherited(key: str, value: Any, old: Tensor, parents: Tensor, new: Tensor) -> Any:
    """Returns the new rows' part of a state that has a row for each old one; any other state as it is."""
    of_columns = old.ndim == 2 and "col" in key.split("_")
    if of_columns or not isinstance(value, Tensor) or value.shape[:1] != old.shape[:1]:
        return value
    taken = value[parents]
    if key != "step_size":
        taken[new] = 0
    return taken


def _swap(
    parameters: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    values: Mapping[str, Tensor],
    states: _States,
) -> None:
    """Makes the parameters, then replaces; states that are not given are dropped."""
    made = {
        id(parameters[name]): nn.Parameter(value, requires_grad=parameters[name].requires_grad)
        for name, value in values.items()
    }
    for optimizer in optimizers:
        items = list(optimizer.state.items())
        optimizer.state.clear()
        for parameter, state in items:  # in the same order as before
            if id(parameter) not in made:
                optimizer.state[parameter] = state
            elif (id(optimizer), id(parameter)) in states:
                optimizer.state[made[id(parameter)]] = states[id(optimizer), id(parameter)]
        for group in optimizer.param_groups:
            group["params"][:] = [made.get(id(each), each) for each in group["params"]]
    for name in values:
        parameters[name] = made[id(parameters[name])]
