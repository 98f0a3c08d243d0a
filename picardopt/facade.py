"""The part of the torch.optim contract that is the base's own: groups, state, defaults, hooks of state dicts.

They are live views: ``load_state_dict`` replaces those objects, so a reference kept from construction goes stale.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from picardopt.frameworks import refuse_unscaling


class OptimizerFacade(Optimizer):
    """An optimizer that shows another one's groups and state as its own.

    Attributes:
        base: The other one.
    """

    base: Optimizer

    @property
    def _speculates(self) -> bool:
        """Whether a closure may be evaluated for another step than the present one."""
        raise NotImplementedError

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups, live."""
        if self._speculates:
            refuse_unscaling(sys._getframe(1))
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base's state, live."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults, live."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base; the window is rebuilt at the next step."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's own zero_grad."""
        self.base.zero_grad(set_to_none)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        """Registers on the base, whose state dict it is."""
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        """Registers on the base, whose state dict it is."""
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> Any:
        """Registers on the base, which loads it."""
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> Any:
        """Registers on the base, which loads it."""
        return self.base.register_load_state_dict_post_hook(hook, prepend)
