"""A stage of a run: a scene, its guidance and optimizers, and the loss of each step."""

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
from picardopt_3d.scenes import Render, Scene, build_scene


class Stage(ABC):
    """A `Problem` whose loss is a function of the parameters, the step and its randomness alone.

    Args:
        config: The stage's configuration.
        context: Guidance, prompt and device of the run.
        previous: The scene of the previous stage; None: a new scene.

    Attributes:
        scene: The scene that is trained.
        guidance: The guidance, a loss on rendered views.
        prompt: The prompt, encoded by the guidance.
        device: Device of the scene.
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
        """Evaluates one step's loss; subclasses compute the terms and pass them to `total`."""

    def total(
        self,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float],
        step: int,
        *renders: Render,
    ) -> Losses:
        """Returns the weighted sum of a step's terms, with the measurements for the scene's carry.

        Where no term has a weight, it is 0 with gradients of 0, as at a step at which weights begin to grow.

        Args:
            terms: Scalars by name, at least one; those without a weight are left out of the sum.
            weights: From `Weights.at`.
            step: The step.
            renders: Its views.
        """
        counted = [weight * terms[name] for name, weight in weights.items() if name in terms]
        total = torch.stack(counted or [0 * term for term in terms.values()]).sum()
        return Losses(total, dict(terms), self.scene.measure(step, *renders))

    @property
    def repeatable(self) -> bool:
        """Whether a step's loss is a function of its parameters and randomness; see `Guidance` and `Scene`."""
        return self.guidance.repeatable and self.scene.repeatable

    def optimizers(self) -> list[Optimizer]:
        """Returns the scene's optimizers, then the guidance's."""
        return [*self._scene_optimizers, *self.guidance.optimizers()]

    def measured(self) -> list[Optimizer]:
        """Returns all optimizers: what guesses of a LoRA are off by costs quality, too."""
        return self.optimizers()

    def carry(self) -> Carry | None:
        """Returns the scene's carry."""
        return self._carry

    def restructure(self) -> Restructure | None:
        """Returns when and how the scene changes its number of parameters."""
        return self._restructure

    def counts(self) -> dict[str, int]:
        """Returns how many parts of each kind the scene has now."""
        return self.scene.counts()

    def lr_scheduler(self) -> LRScheduler | None:
        """Returns the scheduler of learning rates that change, or None."""
        return self._lr_scheduler

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the scene (with its carry), the guidance and the scheduler."""
        state = {"scene": self.scene.state_dict(), "guidance": self.guidance.state_dict()}
        if self._lr_scheduler is not None:
            state["lr_scheduler"] = self._lr_scheduler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned, including states of older versions, whose guidance had no state.

        Raises:
            RuntimeError: The state belongs to another configuration.
            KeyError: The state lacks an entry that this configuration has.
        """
        self.scene.load_state_dict(state["scene"])
        self.guidance.load_state_dict(state.get("guidance", {}))
        if self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(state["lr_scheduler"])
