"""Scenes that are functions of space, rendered along rays; no other module of the package knows of rays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from picardopt import Carry
from picardopt_3d.cameras import Cameras
from picardopt_3d.problem import Losses
from picardopt_3d.scenes.fitting import fit
from picardopt_3d.scenes.occupancy import OccupancyGrid
from picardopt_3d.scenes.rays import Rays
from picardopt_3d.scenes.sampling import sample
from picardopt_3d.scenes.scene import Scene, Surface
from picardopt_3d.scenes.tiles import joined, tiles_of
from picardopt_3d.scenes.views import Light, Render
from picardopt_3d.scenes.volume import composite, mean, perturbation, shade

_POINTS_AT_ONCE = 1 << 19
"""Points of a render that are evaluated together; of more, each part is computed again in the backward pass."""

_RAYS_AT_ONCE = 1 << 14
"""Rays that are rendered together where no gradient is needed."""


@dataclass(frozen=True)
class FieldSample:
    """What is at some points.

    Attributes:
        density: Per world unit. [count]
        colour: Albedo, in [0, 1]. [3, count]
        normal: Outward normals; None if not asked for. [3, count]
        eikonal: (|grad sdf| - 1)^2 of a signed distance; None unless normals were asked for. [count]
    """

    density: Tensor
    colour: Tensor
    normal: Tensor | None = None
    eikonal: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[FieldSample]) -> FieldSample:
        """Joins what is at the points of several, one after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        joined: Any = (None if one[0] is None else torch.cat(one, -1) for one in columns)
        return cls(*joined)


class Field(Scene):
    """Density and colour in a sphere about the origin, rendered by alpha compositing along rays.

    Attributes:
        radius: Of the sphere that holds everything, world units.
        samples: Samples along a ray's chord through the sphere.
        background: The colour behind rays by their direction. [rays, 3] -> [3], or [rays, 3] where it depends on the
            direction
        occupancy: Where there is something, if the field keeps a grid of it; its values are a carry.
    """

    radius: float
    samples: int
    background: nn.Module
    occupancy: OccupancyGrid | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.radius, self.samples = config, config.radius, config.samples
        # On the object: an attribute of the class would hide the module that a field puts in its place.
        self.occupancy = None

    @abstractmethod
    def query(self, points: Tensor, step: int | None, normals: bool) -> FieldSample:
        """Evaluates the field.

        Args:
            points: World units. [count, 3]
            step: Step of the run, for what comes in progressively; None: everything is in.
            normals: Whether to give normals too.
        """

    @abstractmethod
    def level_set(self, points: Tensor) -> Tensor:
        """Returns values that are positive inside of the surface and negative outside; a mesh is cut out where it is 0.

        Args:
            points: World units. [count, 3]

        Returns:
            [count]
        """

    def colour(self, points: Tensor) -> Tensor:
        """Returns the albedo, RGB in [0, 1]. [count, 3] -> [count, 3]."""
        return self.query(points, None, False).colour.T

    def density(self, points: Tensor) -> Tensor:
        """Returns the density that the occupancy grid keeps track of. [count, 3] -> [count]."""
        return self.query(points, None, False).density

    def surface(self) -> Surface:
        """Returns the level set with its colours."""
        return Surface(self.radius, self.level_set, self.colour, self.device)

    @classmethod
    def from_scene(cls, config: Any, other: Scene) -> Self:
        """Makes a field that looks like another field: a copy where the shapes are the same, else fitted to it.

        Args:
            config: The new field's shape.
            other: The other field; its device is the new one's too.

        Raises:
            TypeError: The other scene is no field.
        """
        if not isinstance(other, Field):
            return super().from_scene(config, other)
        field = cls(config).to(other.device)
        if config == other.config:
            field.load_state_dict(other.state_dict())
        else:
            fit(field, other)
        return field

    # -- the occupancy grid -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Measures the occupancy grid: without, all of the first window's steps would sample everything."""
        if self.occupancy is not None:
            self.occupancy.update(self.occupancy.measure(self.density))

    def measure(self, step: int) -> dict[str, Tensor]:
        """Measures the occupancy grid in the steps that are due."""
        grid = self.occupancy
        if grid is None or not grid.due(step):
            return {}
        return {"occupancy": grid.measure(self.density)}

    def carry(self) -> Carry | None:
        """Returns the occupancy grid, rewritten by what the steps measured."""
        grid = self.occupancy
        if grid is None:
            return None

        def update(returned: Losses) -> None:
            if "occupancy" in returned.aux:
                grid.update(returned.aux["occupancy"])

        return Carry([grid.values], update)

    # -- rendering --------------------------------------------------------------------------------------

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
        """Composites the field along the rays through the pixels; see `Scene.render`."""
        height, width = (size, size) if isinstance(size, int) else size
        return self.render_rays(
            *cameras.rays(height, width),
            jitter=jitter,
            normals=normals,
            normal_smoothness=normal_smoothness,
            light=light,
            background=background,
            step=step,
        )

    def render_rays(
        self,
        origins: Tensor,
        directions: Tensor,
        *,
        jitter: bool = False,
        normals: bool = False,
        normal_smoothness: bool = False,
        light: Light | None = None,
        background: Tensor | None = None,
        step: int | None = None,
    ) -> Render:
        """Composites the field along rays.

        What it draws comes from torch's global CPU generator, a number a ray whether or not the ray meets anything, so
        that a ray's draw does not depend on others. Where nothing is drawn and no gradient needed, it renders some rays
        at a time.

        Args:
            origins: Where rays start, world units. [batch, height, width, 3]
            directions: Unit vectors. [batch, height, width, 3]
            jitter: As in `Scene.render`, and so all that follow.
            normals: Also give normals.
            normal_smoothness: Also measure how normals change.
            light: Lights the surface.
            background: In place of the field's own. [batch, 3]
            step: Step of the run.
        """

        def render(rays: Rays, part: slice) -> tuple[Render, int]:
            lit = light and replace(light, position=light.position[part])
            behind = None if background is None else background[part]
            return self._render(rays, jitter, normals, normal_smoothness, lit, behind, step)

        whole = jitter or normal_smoothness or torch.is_grad_enabled()
        if whole or origins[..., 0].numel() <= _RAYS_AT_ONCE:
            return render(Rays.of(origins, directions), slice(None))[0]
        groups, counts = [], []
        for group in tiles_of(origins.shape[:3], _RAYS_AT_ONCE):
            strips = []
            for tile in group:
                found, count = render(Rays.of(origins[tile], directions[tile]), tile[0])
                strips.append(found)
                counts.append(count)
            groups.append(strips)
        return joined(groups, counts)

    def _render(
        self,
        rays: Rays,
        jitter: bool,
        normals: bool,
        normal_smoothness: bool,
        light: Light | None,
        background: Tensor | None,
        step: int | None,
    ) -> tuple[Render, int]:
        """Composites all rays at once; also returns how many samples were evaluated."""
        samples = sample(rays, self.radius, self.samples, jitter, self.occupancy)
        shown = normals or normal_smoothness
        seen = self._query(samples.points, step, shown or light is not None)
        colour, normal = seen.colour, seen.normal
        if light is not None and normal is not None:
            colour = shade(colour, F.normalize(normal, dim=0), light, rays, samples)
        own: Tensor = self.background(rays.directions)
        behind = own if background is None else rays.repeated(background.to(own))
        render = composite(rays, samples, seen.density, colour, behind, normal if shown else None)
        if shown and seen.eikonal is not None:
            render = replace(render, eikonal=mean(seen.eikonal))
        if normal_smoothness and normal is not None:
            beside = samples.points + perturbation(rays, samples)
            there = self._query(beside, step, True).normal
            if there is not None:
                render = replace(render, normal_smoothness=mean((normal - there).abs()))
        return render, len(samples.points)

    def _query(self, points: Tensor, step: int | None, normals: bool) -> FieldSample:
        """`query`, keeping what its backward pass needs of one part of the points at a time."""
        if len(points) <= _POINTS_AT_ONCE:
            return self.query(points, step, normals)
        return FieldSample.joined(
            [
                checkpoint(
                    self.query,
                    part,
                    step,
                    normals,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing is drawn in there
                )
                for part in points.split(_POINTS_AT_ONCE)
            ]
        )
