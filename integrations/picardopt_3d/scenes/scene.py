"""What every scene is: parameters in named groups, what a point looks like, and a surface to take a mesh from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .occupancy import OccupancyGrid
from .views import Light, Render
from .volume import Rays, behind, composite, mean, perturbation, sample, shade

_AT_ONCE = 1 << 19
"""Points of a render that are looked at together; of more, each part is computed again in the backward pass."""


@dataclass(frozen=True)
class Look:
    """What is at some points.

    Args:
        density: per world unit. # [count]
        colour: albedo, in [0, 1]. # [3, count]
        normal: outward normals; None if not asked for. # [3, count]
        eikonal: (|grad sdf| - 1)^2 of a signed distance; None unless normals were asked for. # [count]
    """

    density: Tensor
    colour: Tensor
    normal: Tensor | None = None
    eikonal: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Look]) -> Look:
        """What is at the points of several, one after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        joined: Any = (None if one[0] is None else torch.cat(one, -1) for one in columns)
        return cls(*joined)


class Scene(nn.Module, ABC):
    """Something in a sphere about the origin that can be optimised, rendered and cut out as a mesh.

    Attributes:
        radius: of the sphere that holds everything, world units.
        samples: samples along a ray's chord through the sphere.
        occupancy: where there is something, if the scene keeps a grid of it; its values are a carry.
    """

    radius: float
    samples: int
    occupancy: OccupancyGrid | None

    def __init__(self) -> None:
        super().__init__()
        # On the object: an attribute of the class would hide the module that a scene puts in its place.
        self.occupancy = None

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by role, each in exactly one group; a recipe gives each group a learning rate.

        Names: "encoding" (grids, hash tables), "networks" (MLP heads, the variance of a signed distance),
        "background".
        """

    @abstractmethod
    def look(self, points: Tensor, step: int | None, normals: bool) -> Look:
        """What is at some points.

        Args:
            points: world units. # [count, 3]
            step: step of the run, for what comes in progressively; None: everything is in.
            normals: also give normals.
        """

    @abstractmethod
    def backdrop(self, directions: Tensor) -> Tensor:
        """The scene's own background. [rays, 3] -> [3], or [rays, 3] where it depends on the direction."""

    @abstractmethod
    def inside(self, points: Tensor) -> Tensor:
        """Positive inside of the surface, negative outside; a mesh is cut out where it is 0.

        Args:
            points: world units. # [count, 3]

        Returns:
            [count]
        """

    def colour(self, points: Tensor) -> Tensor:
        """Albedo, RGB in [0, 1]. [count, 3] -> [count, 3]."""
        return self.look(points, None, False).colour.T

    def occupied_density(self, points: Tensor) -> Tensor:
        """The density that the occupancy grid keeps track of. [count, 3] -> [count]."""
        return self.look(points, None, False).density

    def render(
        self,
        origins: Tensor,
        directions: Tensor,
        *,
        jitter: bool = False,
        normals: bool = False,
        roughness: bool = False,
        light: Light | None = None,
        backdrop: Tensor | None = None,
        step: int | None = None,
    ) -> Render:
        """Composite the scene along rays.

        What it draws comes from torch's global CPU generator, a number a ray whether or not the ray
        meets anything, so that a ray's draw does not depend on others.

        Args:
            origins: where rays start, world units. # [batch, height, width, 3]
            directions: unit vectors. # [batch, height, width, 3]
            jitter: displace each ray's samples by one random fraction of their spacing (for training).
            normals: also composite normals, and what is penalised about them.
            roughness: also measure how fast normals change in space.
            light: lights the surface; None: albedo.
            backdrop: colour behind the object, in place of the scene's own background. # [batch, 3]
            step: step of the run, for what comes in progressively; None: everything is in (a finished scene).
        """
        rays = Rays.of(origins, directions)
        samples = sample(rays, self.radius, self.samples, jitter, self.occupancy)
        shown = normals or roughness
        seen = self._look(samples.points, step, shown or light is not None)
        colour, normal = seen.colour, seen.normal
        if light is not None and normal is not None:
            colour = shade(colour, F.normalize(normal, dim=0), light, rays, samples)
        background = behind(rays, self.backdrop(rays.directions), backdrop)
        render = composite(
            rays, samples, seen.density, colour, background, normal if shown else None
        )
        if shown and seen.eikonal is not None:
            render = replace(render, eikonal=mean(seen.eikonal))
        if roughness and normal is not None:
            beside = samples.points + perturbation(rays, samples)
            there = self._look(beside, step, True).normal
            if there is not None:
                render = replace(render, roughness=mean((normal - there).abs()))
        return render

    def _look(self, points: Tensor, step: int | None, normals: bool) -> Look:
        """`look`, keeping what its backward pass needs of one part of the points at a time."""
        if len(points) <= _AT_ONCE:
            return self.look(points, step, normals)
        return Look.joined(
            [
                checkpoint(
                    self.look,
                    part,
                    step,
                    normals,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing is drawn in there
                )
                for part in points.split(_AT_ONCE)
            ]
        )
