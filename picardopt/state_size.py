"""How much memory an optimizer's state takes, before its first step too."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from picardopt.bases import JoinedOptimizer
from picardopt.stepper import hooks_disabled


def state_bytes(base: Optimizer) -> int | None:
    """Returns the bytes of an optimizer's state; of one of torch's that has not stepped yet, what they will be.

    Args:
        base: The optimizer; nothing of it changes.

    Returns:
        None where that cannot be known before the first step.
    """
    if isinstance(base, JoinedOptimizer):
        parts = [state_bytes(each) for each in base.optimizers]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None
    if base.state:
        return _bytes_of(base.state)
    if not type(base).__module__.startswith("torch.optim."):
        return None  # its attributes may hold more than this knows
    try:
        return _bytes_of(_state_after_a_step(base))
    except Exception:  # it reads values, or takes a closure
        return None


def _state_after_a_step(base: Optimizer) -> Mapping[Any, Any]:
    """Returns the state of the same optimizer after a step over tensors without memory."""
    shadow = type(base).__new__(type(base))
    groups = [_without_memory(group) for group in base.param_groups]
    state = {"defaults": base.defaults, "state": defaultdict(dict), "param_groups": groups}
    shadow.__setstate__(state)
    with hooks_disabled(shadow, own=True):
        shadow.step()
    return shadow.state


def _without_memory(group: Mapping[str, Any]) -> dict[str, Any]:
    twins = [torch.empty_like(p, device="meta").requires_grad_() for p in group["params"]]
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    options = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    slow = {name: False for name in ("fused", "foreach", "capturable") if name in options}
    return options | slow | {"params": twins}


def _bytes_of(state: Mapping[Any, Any]) -> int:
    tensors = [leaf for leaf in tree_leaves(list(state.values())) if isinstance(leaf, Tensor)]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
