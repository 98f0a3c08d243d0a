"""The part of the wrapper that mirrors the base optimizer: its groups, state and hooks, and the run's options.

Groups and state are live views: ``load_state_dict`` replaces those objects, so a reference kept from construction goes
stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from picardopt.checks import check_lr_scheduler, check_step_index
from picardopt.options import Options
from picardopt.ranks import RankGrid
from picardopt.stepper import BaseStepper


class OptimizerFacade(Optimizer):
    """Presents the groups and the state of another optimizer as its own.

    Attributes:
        base: That other optimizer.
    """

    base: Optimizer
    _options: Options
    _grid: RankGrid | None
    _stepper: BaseStepper
    _step_index: int

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups, live."""
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
        """Calls the base's own zero_grad."""
        self.base.zero_grad(set_to_none)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        """Registers the hook on the base, which makes the state dict."""
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        """Registers the hook on the base, which makes the state dict."""
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> Any:
        """Registers the hook on the base, which loads the state dict."""
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> Any:
        """Registers the hook on the base, which loads the state dict."""
        return self.base.register_load_state_dict_post_hook(hook, prepend)

    @property
    def window(self) -> int:
        """Number of steps evaluated per sweep, the paper's p."""
        return self._options.window

    @property
    def data_rank(self) -> int:
        """Index of the part of a step's batch that this process evaluates, 0 .. data_size - 1."""
        return self._grid.data.rank if self._grid else 0

    @property
    def data_size(self) -> int:
        """Number of equal parts that each step's batch is split into; above 1 only with a mesh."""
        return self._grid.data.size if self._grid else 1

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the whole run, the paper's T; None if it was not given."""
        return self._options.total_steps

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._options.seed

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """The scheduler that gives future learning rates; your loop still steps it."""
        return self._stepper.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, value: LRScheduler | None) -> None:
        check_lr_scheduler(value)
        self._stepper.follow(value, self)

    @property
    def step_index(self) -> int:
        """Index of the next step: the number of committed steps. Setting it drops the queue."""
        return self._step_index

    @step_index.setter
    def step_index(self, value: int) -> None:
        check_step_index(value)
        self._forget()
        self._step_index = value

    def _forget(self) -> None:
        """Drops the queue and all guesses."""
        raise NotImplementedError
