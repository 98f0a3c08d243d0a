"""What every scene is: parameters in named groups that can be trained, rendered and exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from picardopt import Carry, Restructure
from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.views import Light, Render


@dataclass(frozen=True)
class Surface:
    """A closed surface in a sphere about the origin, given by a function of points.

    Attributes:
        radius: Of the sphere that holds everything, world units.
        level_set: Positive inside, negative outside, 0 on the surface. [count, 3] -> [count]
        colour: Albedo, RGB in [0, 1]. [count, 3] -> [count, 3]
        device: Where the points have to be.
    """

    radius: float
    level_set: Callable[[Tensor], Tensor]
    colour: Callable[[Tensor], Tensor]
    device: torch.device


class Scene(nn.Module, ABC):
    """Something about the origin that can be trained, rendered and exported.

    Attributes:
        config: Its shape; a frozen dataclass that `build_scene` takes.
    """

    config: Any

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by role, each in exactly one group; a recipe gives each group a learning rate."""

    @abstractmethod
    def render(
        self,
        cameras: Cameras,
        size: int | tuple[int, int],
        *,
        jitter: bool = False,
        normals: bool = False,
        normal_smoothness: bool = False,
        light: Light | None = None,
        background: Tensor | None = None,
        step: int | None = None,
    ) -> Render:
        """Renders the scene.

        What it draws comes from torch's global CPU generator. Without gradients memory stays bounded, however many
        pixels are asked for.

        Args:
            cameras: Where from.
            size: Pixels along each edge, or (height, width).
            jitter: Whether samples are displaced at random (for training).
            normals: Whether to give normals too, and what is penalized about them.
            normal_smoothness: Whether to measure how fast normals change in space.
            light: Lights the surface; None: albedo.
            background: Colour behind the object, in place of the scene's own background. [batch, 3]
            step: Step of the run, for what comes in progressively; None: everything is in (a finished scene).
        """

    def prepare(self) -> None:
        """Measures what a fresh scene's first steps need; a stage calls it once, before step 0."""

    def measure(self, step: int) -> dict[str, Tensor]:
        """Measures what the update of `carry` needs of a step, by name; the step returns it in `Losses.aux`."""
        return {}

    def carry(self) -> Carry | None:
        """Returns what steps rewrite besides parameters; its update takes a step's `Losses`."""
        return None

    def restructure(self, optimizers: Sequence[Optimizer]) -> Restructure | None:
        """Returns when and how steps change the number of parameters.

        Args:
            optimizers: Those of the scene; their groups and states change with the parameters.
        """
        return None

    def surface(self) -> Surface:
        """Returns what a mesh is made of.

        Raises:
            ValueError: There is no surface.
        """
        raise ValueError(f"a {type(self).__name__} has no surface that a mesh could be made of")

    @classmethod
    def from_scene(cls, config: Any, other: Scene) -> Self:
        """Converts another scene, such as that of a recipe's previous stage.

        Args:
            config: The new scene's shape.
            other: What it is to look like.

        Raises:
            TypeError: This kind cannot be made of that one.
        """
        raise TypeError(
            f"a {cls.__name__} cannot be made of a {type(other).__name__}: give the stages scenes that convert"
        )
