"""The interface of scenes: parameters in named groups that can be trained, rendered and exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from picardopt import Carry, Restructure
from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.views import Light, Render


@dataclass(frozen=True)
class Surface:
    """A closed surface in a sphere about the origin, given by a function of points.

    Attributes:
        radius: Radius of the sphere that contains the surface, world units.
        level_set: Maps points `[count, 3]` to values `[count]`: positive inside, negative outside, 0 on the surface.
        colour: Maps points `[count, 3]` to their albedo, RGB in [0, 1], `[count, 3]`.
        device: Device that the points must be on.
    """

    radius: float
    level_set: Callable[[Tensor], Tensor]
    colour: Callable[[Tensor], Tensor]
    device: torch.device


@dataclass(frozen=True)
class Shell:
    """The triangles of a scene that consists of them.

    Attributes:
        triangles: The triangles, on the scene's device; closed or not.
        colour: Maps points on them, `[count, 3]`, to their albedo, RGB in [0, 1], `[count, 3]`.
    """

    triangles: Triangles
    colour: Callable[[Tensor], Tensor]


class Scene(nn.Module, ABC):
    """An object around the origin that can be trained, rendered and exported.

    Attributes:
        config: The scene's configuration, a frozen dataclass that `build_scene` accepts.
    """

    config: Any

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def repeatable(self) -> bool:
        """Whether views and their gradients repeat; otherwise no run is exact, nor can its steps be checked."""
        return True

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by role, each in exactly one group; a recipe sets a learning rate per group."""

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

        Random numbers come from torch's global CPU generator. Without gradients, memory stays bounded for any number
        of pixels.

        Args:
            cameras: The cameras to render from.
            size: Pixels along each edge, or (height, width).
            jitter: Whether samples are displaced at random (for training).
            normals: Whether to compute normals and the penalties on them.
            normal_smoothness: Whether to measure how fast normals change in space.
            light: Light on the surface; None: the albedo is shown.
            background: Colour in place of the scene's own background, RGB in [0, 1], `[batch, 3]`.
            step: Step of the run, for levels that are added progressively; None: all of them (a finished scene).
        """

    def prepare(self) -> None:
        """Takes the measurements that a new scene's first steps need; a stage calls this once, before step 0."""

    def measure(self, step: int, *renders: Render) -> dict[str, Tensor]:
        """Returns a step's measurements for the update of `carry`, by name; the step returns them in `Losses.aux`.

        Args:
            step: The step.
            renders: Its views; `backward` may add to what was measured of them.
        """
        return {}

    def carry(self) -> Carry | None:
        """Returns the tensors other than parameters that steps rewrite, with an update that takes a step's `Losses`."""
        return None

    def restructure(self, optimizers: Sequence[Optimizer]) -> Restructure | None:
        """Returns when and how steps change the number of parameters.

        Args:
            optimizers: The scene's optimizers; their groups and states change with the parameters.
        """
        return None

    def counts(self) -> dict[str, int]:
        """Returns how many parts of each kind the scene has now, by their name for people ("Gaussians")."""
        return {}

    def surface(self) -> Surface:
        """Returns the surface that a mesh is extracted from.

        Raises:
            ValueError: The scene has no surface.
        """
        raise ValueError(
            f"a {type(self).__name__} has no surface: a mesh needs a scene that implements `surface`"
        )

    def shell(self) -> Shell | None:
        """Returns the scene's own triangles; None: a mesh is extracted from `surface`."""
        return None

    @classmethod
    def converts(cls, other: type[Scene]) -> bool:
        """Returns whether `from_scene` takes scenes of another kind, as far as the kind tells."""
        own: Any = cls.from_scene
        return own.__func__ is not Scene.from_scene.__func__  # type: ignore[attr-defined]

    @classmethod
    def from_scene(cls, config: Any, other: Scene) -> Self:
        """Converts another scene, such as that of a recipe's previous stage.

        Args:
            config: Configuration of the new scene.
            other: The scene to convert.

        Raises:
            TypeError: There is no conversion between the two kinds.
        """
        raise TypeError(_no_conversion(type(other), cls))

    @classmethod
    def check_conversion(cls, config: Any, other: type[Scene], given: Any) -> None:
        """Checks what is known of a conversion before there are scenes.

        Args:
            config: Configuration of the new scene.
            other: The kind of the scene to convert.
            given: Its configuration.

        Raises:
            TypeError: There is no conversion between the two kinds.
            ValueError: There is none between the two configurations.
        """
        if not cls.converts(other):
            raise TypeError(_no_conversion(other, cls))


def _no_conversion(other: type[Scene], kind: type[Scene]) -> str:
    """Says that a scene cannot become one of another kind."""
    return f"a {other.__name__} cannot be converted to a {kind.__name__}: give the stages scenes that can"
