"""A stage at work: a scene, its guidance and its optimizers, and the loss of each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from picardopt import Carry, Restructure
from picardopt_3d.methods.optim import build_optimizer, build_scheduler
from picardopt_3d.methods.recipe import Context, StageConfig
from picardopt_3d.problem import Losses
from picardopt_3d.scenes import Scene, build_scene


class Stage(ABC):
    """A `Problem`: the loss is a function of the parameters, the step and its randomness alone.

    Args:
        config: The stage's numbers.
        context: What they are used on.
        previous: The scene that the stage before has made.

    Attributes:
        scene: What is trained.
        guidance: Judges rendered views.
        prompt: What to make, as the guidance has encoded it.
        device: Where the scene lives.
    """

    def __init__(
        self, config: StageConfig, context: Context, previous: Scene | None = None
    ) -> None:
        self.device, self.guidance = context.device, context.guidance
        self.prompt = context.guidance.encode(context.prompt)
        self.scene: Scene = build_scene(config.scene, previous).to(context.device)
        self.scene.prepare()
        own = build_optimizer(config, self.scene.groups())
        self._scene_optimizers, self._lr_scheduler = [own], build_scheduler(config, own)
        self._carry, self._restructure = self.scene.carry(), self.scene.restructure([own])

    @abstractmethod
    def loss(self, step: int) -> Losses:
        """Evaluates one step's loss; subclasses make their terms and hand them to `total`."""

    def total(self, terms: Mapping[str, Tensor], weights: Mapping[str, float], step: int) -> Losses:
        """Sums a step's terms by their weights, and has the scene measure what its carry needs.

        Args:
            terms: Scalars by name; those without a weight are left out of the sum.
            weights: From `Weights.at`.
            step: The step.
        """
        counted = [weight * terms[name] for name, weight in weights.items() if name in terms]
        total = torch.stack(counted).sum()
        return Losses(total, dict(terms), self.scene.measure(step))

    def optimizers(self) -> list[Optimizer]:
        """Returns the scene's optimizers, then the guidance's."""
        return [*self._scene_optimizers, *self.guidance.optimizers()]

    def measured(self) -> list[Optimizer]:
        """Returns the scene's optimizers: a LoRA's parameters do not count in residuals."""
        return list(self._scene_optimizers)

    def carry(self) -> Carry | None:
        """Returns the scene's carry."""
        return self._carry

    def restructure(self) -> Restructure | None:
        """Returns how the scene changes its number of parameters."""
        return self._restructure

    def lr_scheduler(self) -> LRScheduler | None:
        """Returns the scheduler of rates that move."""
        return self._lr_scheduler

    def state_dict(self) -> dict[str, Any]:
        """Returns the scene with its carry, and what the guidance has learnt."""
        state = {"scene": self.scene.state_dict(), "guidance": self.guidance.state_dict()}
        if self._lr_scheduler is not None:
            state["lr_scheduler"] = self._lr_scheduler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned, also that of versions whose guidance had no state.

        Raises:
            RuntimeError, KeyError: It is of another configuration.
        """
        self.scene.load_state_dict(state["scene"])
        self.guidance.load_state_dict(state.get("guidance", {}))
        if self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(state["lr_scheduler"])
