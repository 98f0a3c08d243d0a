"""The frame of a recipe: a frozen config that builds a stage, and a stage that makes the loss of each step.

A recipe is one readable module: its numbers (a `RecipeConfig`, with the presets `SMALL` and `PAPER`) and its loss
(a `Stage`). What all recipes share is here: the scene's optimizer, its occupancy grid as carry, weights that move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from picardopt import Carry

from ..cameras import CameraConfig
from ..guidance import Guidance, SdsConfig, TimestepSchedule
from ..guidance.choose import GuidanceConfig
from ..images import ReferenceImage
from ..prompts import ImagePrompt, TextPrompt
from ..scenes import Scene, SceneConfig, build_scene
from .schedules import Milestones, Points, check_milestones, check_points, current, value_at


@dataclass(frozen=True)
class PicardConfig:
    """How a run goes ahead of itself unless the command says otherwise (the paper's Tables 3 and 4).

    Args:
        window: steps evaluated by one sweep; None: one per worker.
        rule: "default" (the optimizer's own tolerance) or "adaptive" (the paper's).
        initial: the adaptive rule's first threshold, squared distance per parameter.
        decay: its decay, the paper's gamma.
        statistic: what it averages, the paper's M.
        predictor: what fills new slots: "coast", or "hold" (the paper).
    """

    window: int | None = None
    rule: Literal["default", "adaptive"] = "default"
    initial: float = 5e-6
    decay: float = 0.9
    statistic: Literal["median", "mean"] = "median"
    predictor: Literal["coast", "hold"] = "coast"


@dataclass(frozen=True)
class Rates:
    """Learning rates by the scene's parameter groups.

    Args:
        encoding: grids and hash tables.
        networks: MLP heads, and the variance of a signed distance.
        background: a background that is learned.
    """

    encoding: float = 0.01
    networks: float = 0.01
    background: float = 0.001

    def __post_init__(self) -> None:
        """Refuse rates that are not positive."""
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise ValueError(
                    f"rates.{item.name}={getattr(self, item.name)}: give a positive number"
                )


@dataclass(frozen=True)
class Weights:
    """Weights of a recipe's losses by name, each a number or (step, value) pairs that it moves between."""

    sds: Points = 1.0

    def __post_init__(self) -> None:
        """Refuse weights that are negative or go backwards in time."""
        for item in fields(self):
            check_points(f"weights.{item.name}", getattr(self, item.name))

    def at(self, step: int) -> dict[str, float]:
        """The weights of one step, by name; those of 0 are left out."""
        values = {item.name: value_at(getattr(self, item.name), step) for item in fields(self)}
        return {name: value for name, value in values.items() if value > 0}


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(ABC):
    """The numbers that every recipe has.

    Args:
        steps: optimizer steps of the run.
        batch: views a step, a number or (first step, number) pairs.
        pixels: pixels along each edge of a view, likewise.
        scene: what is optimised, and its sizes.
        rates: learning rates.
        betas: Adam's.
        eps: Adam's.
        guidance: the score model and what it is told.
        sds: classifier-free guidance and the weighting of noise levels.
        timesteps: range of diffusion times, and how it moves.
        cameras: where views are taken from.
        picard: how the run goes ahead of itself unless the command says otherwise.
    """

    steps: int
    batch: Milestones
    pixels: Milestones
    scene: SceneConfig
    rates: Rates = field(default_factory=Rates)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-15
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    sds: SdsConfig = field(default_factory=SdsConfig)
    timesteps: TimestepSchedule = field(default_factory=TimestepSchedule)
    cameras: CameraConfig = field(default_factory=CameraConfig)
    picard: PicardConfig = field(default_factory=PicardConfig)

    def __post_init__(self) -> None:
        """Refuse numbers that make no step, by name, with the remedy."""
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a whole number of at least 1")
        check_milestones("batch", self.batch)
        check_milestones("pixels", self.pixels)

    @property
    def final_pixels(self) -> int:
        """Pixels along each edge of the last step's views."""
        return current(self.pixels, self.steps - 1)

    @abstractmethod
    def build(self, context: Context) -> Stage:
        """The recipe at work on a new scene."""


@dataclass(frozen=True)
class Context:
    """What a recipe is given besides its numbers.

    Args:
        guidance: judges rendered views.
        prompt: what to make.
        device: where the scene lives.
        image: the picture that it is made from, of recipes that take one.
    """

    guidance: Guidance
    prompt: TextPrompt | ImagePrompt
    device: torch.device
    image: ReferenceImage | None = None


class Stage(ABC):
    """A scene and the loss of each step, a function of the parameters, the step and its randomness alone.

    Args:
        config: the recipe's numbers.
        context: what they are used on.
    """

    def __init__(self, config: RecipeConfig, context: Context) -> None:
        self._config, self.device = config, context.device
        self.guidance = context.guidance
        self.prompt = context.guidance.encode(context.prompt)
        self.scene: Scene = build_scene(config.scene).to(context.device)
        grid = self.scene.occupancy
        if grid is not None:  # or all of the first window's steps would sample everything
            grid.update(grid.measure(self.scene.occupied_density))

    @abstractmethod
    def loss(self, step: int) -> dict[str, Tensor]:
        """One step's losses: "loss" is what to call `backward` on, from `total`; the others are to be logged.

        In the steps that measure the occupancy grid "occupancy" is what was measured.
        """

    def bases(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the scene: one Adam with a rate for each of its groups."""
        config = self._config
        groups = [
            {"params": parameters, "lr": getattr(config.rates, name), "name": name}
            for name, parameters in self.scene.groups().items()
            if parameters
        ]
        return [torch.optim.Adam(groups, betas=config.betas, eps=config.eps)]

    def carry(self) -> Carry | None:
        """What steps rewrite besides parameters: the occupancy grid, by what the steps measured."""
        grid = self.scene.occupancy
        if grid is None:
            return None

        def update(returned: Mapping[str, Tensor]) -> None:
            if "occupancy" in returned:
                grid.update(returned["occupancy"])

        return Carry([grid.values], update)

    def total(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float], step: int
    ) -> dict[str, Tensor]:
        """The weighted sum of a step's terms, with each of them for the log, and the occupancy grid's measurement.

        Args:
            terms: scalars by name; those without a weight are left out of the sum.
            weights: from `Weights.at`.
            step: the step.
        """
        counted = [weight * terms[name] for name, weight in weights.items() if name in terms]
        values = {"loss": torch.stack(counted).sum(), **terms}
        grid = self.scene.occupancy
        if grid is not None and grid.due(step):
            values["occupancy"] = grid.measure(self.scene.occupied_density)
        return values
