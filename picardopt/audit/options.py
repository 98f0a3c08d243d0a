"""Refuses closures that write to their optimizer's options (learning rate, betas, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from picardopt.errors import ImpureClosureError


def options_of(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns copies of the groups' options (lr, betas, ...), for a later comparison."""
    return [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in groups
    ]


def refuse_changed_options(
    groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]
) -> None:
    """Raises if a closure wrote to its optimizer's groups (a warm-up, a scheduler), and undoes the change.

    Args:
        groups: The groups after the closure.
        before: Their `options_of` before it.

    Raises:
        ImpureClosureError: If an option has changed.
    """
    changed = set()
    for group, old in zip(groups, before, strict=False):
        for key, value in old.items():
            now = group.get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor):
                if not torch.equal(now, value):
                    changed.add(key)
                    now.copy_(value)
            elif now is not value and now != value:
                changed.add(key)
                group[key] = value
    if changed:
        raise ImpureClosureError(
            f"the closure set {', '.join(sorted(changed))} in the optimizer's groups: evaluated ahead of time, it "
            "would set a later step's value now. Set it after step(), or use an LR scheduler in your loop and give "
            "it as lr_scheduler="
        )
