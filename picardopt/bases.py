"""Joins several optimizers: one per tensor, as in Gaussian-splatting codebases, or one each for scene and LoRA.

Each keeps its own class, code, groups and state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class JoinedOptimizer(Optimizer):
    """Steps several optimizers in order and shows them as one.

    Args:
        optimizers: The optimizers, over disjoint parameters.

    Raises:
        ValueError: If the list is empty, or two optimizers hold the same parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        if not self.optimizers:
            raise ValueError("base=[]: give at least one optimizer")
        seen: set[int] = set()
        for index, optimizer in enumerate(self.optimizers):
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if seen & own:
                raise ValueError(
                    f"base[{index}] holds a parameter that an earlier optimizer holds too: give each to one optimizer"
                )
            seen |= own
        Optimizer.__setstate__(self, {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All groups, in the order of the optimizers; the dicts are the optimizers' own."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """All per-parameter state, collected; the values are the optimizers' own."""
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            state.update(optimizer.state)
        return state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The first optimizer's defaults."""
        return self.optimizers[0].defaults

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps each optimizer once, in order."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls each optimizer's own zero_grad."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses a new group, because it could belong to any of the optimizers.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "several optimizers are stepped as one: call add_param_group on the one that should hold the group"
        )

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.optimizers))

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizers" in state:  # unpickled or copied
            self.optimizers = state["optimizers"]
            Optimizer.__setstate__(self, {})
            return
        # From Optimizer.load_state_dict: hand each optimizer its groups and its parameters' state.
        groups = list(state["param_groups"])
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            own, groups = groups[:count], groups[count:]
            parameters = {p for group in own for p in group["params"]}
            part: defaultdict[Tensor, Any] = defaultdict(dict)
            part.update({k: v for k, v in state["state"].items() if k in parameters})
            optimizer.__setstate__({"state": part, "param_groups": own})


def unmeasured_bases(base: Optimizer, measured: Sequence[Optimizer] | None) -> list[Optimizer]:
    """Returns the optimizers whose parameters do not count in residuals.

    Args:
        base: The optimizer, or several joined.
        measured: The optimizers that count; None for all.

    Raises:
        ValueError: If one of `measured` is not a base, or `measured` is empty.
    """
    if measured is None:
        return []
    members = base.optimizers if isinstance(base, JoinedOptimizer) else [base]
    for index, optimizer in enumerate(measured):
        if all(optimizer is not member for member in members):
            raise ValueError(
                f"measured[{index}] is not one of the base optimizers: give some of those in base=[...]"
            )
    if not measured:
        raise ValueError(
            "measured=[]: with nothing measured, every guess would be accepted; give at least one base, or None for all"
        )
    return [member for member in members if all(member is not m for m in measured)]
