"""What a run loop needs of what it trains, and nothing of 3D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from picardopt import Carry, Restructure


class Losses(NamedTuple):
    """What one step's loss is made of; a tuple, so that picardopt detaches and sends it like any nested value.

    Attributes:
        total: A scalar to call `backward` on.
        terms: Scalars for the log, by name, before they are weighted.
        aux: What the step measured for `Carry.update`, by name.
    """

    total: Tensor
    terms: dict[str, Tensor]
    aux: dict[str, Tensor]


class Problem(Protocol):
    """Something that is trained step by step.

    The optimizers, the carry, the restructuring and the scheduler belong together: each method returns the same objects
    whenever it is called.
    """

    @property
    def repeatable(self) -> bool:
        """Whether a step's loss is what `loss` promises, so that evaluating it again is a check."""
        ...

    def optimizers(self) -> list[Optimizer]:
        """Returns all optimizers that a step steps, in order, one for each loss (a scene's, its LoRA's)."""
        ...

    def measured(self) -> list[Optimizer]:
        """Returns those whose guesses are judged."""
        ...

    def loss(self, step: int) -> Losses:
        """Evaluates one step's loss, a function of the parameters, the step and its randomness alone."""
        ...

    def carry(self) -> Carry | None:
        """Returns what steps rewrite besides parameters; its update takes a step's `Losses`."""
        ...

    def restructure(self) -> Restructure | None:
        """Returns when and how steps change the number of parameters."""
        ...

    def counts(self) -> dict[str, int]:
        """Returns how many parts of each kind there are now, such as 3D Gaussians, where `restructure` changes it."""
        ...

    def lr_scheduler(self) -> LRScheduler | None:
        """Returns the scheduler that the loop steps after each step; None where learning rates stay."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns all state that is not the optimizers'."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; other entries of the mapping are left alone."""
        ...
