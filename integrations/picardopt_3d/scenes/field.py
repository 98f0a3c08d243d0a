"""Scenes that are functions of space, rendered along rays; only the modules of fields work with rays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

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
"""Points that are evaluated together; a larger render is split, and each part is recomputed in the backward pass."""

_RAYS_AT_ONCE = 1 << 14
"""Rays that are rendered together when no gradient is needed."""


@dataclass(frozen=True)
class FieldSample:
    """Density, colour and normals of a field at some points.

    Attributes:
        density: Density per world unit, `[count]`.
        colour: Albedo, in [0, 1], `[3, count]`.
        normal: Outward normals, `[3, count]`; None if not requested.
        eikonal: (|grad sdf| - 1)^2 of a signed distance, `[count]`; None unless normals were requested.
    """

    density: Tensor
    colour: Tensor
    normal: Tensor | None = None
    eikonal: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[FieldSample]) -> FieldSample:
        """Concatenates samples of several groups of points, in their order."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        joined: Any = (None if one[0] is None else torch.cat(one, -1) for one in columns)
        return cls(*joined)


class Field(Scene):
    """Density and colour in a sphere about the origin, rendered by alpha compositing along rays.

    Attributes:
        radius: Radius of the sphere that contains the scene, world units.
        samples: Samples along a ray's path through the sphere.
        background: Maps the directions of rays, `[rays, 3]`, to the colour behind them, `[3]`, or `[rays, 3]` if it
            depends on the direction.
        occupancy: The grid of occupied cells, if the field keeps one; its values are a carry.
    """

    radius: float
    samples: int
    background: nn.Module
    occupancy: OccupancyGrid | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.radius, self.samples = config, config.radius, config.samples
        # Set on the object: an attribute of the class would hide the module that a field assigns later.
        self.occupancy = None

    @abstractmethod
    def query(self, points: Tensor, step: int | None, normals: bool) -> FieldSample:
        """Evaluates the field at some points.

        Args:
            points: Points, world units, `[count, 3]`.
            step: Step of the run, for levels that are added progressively; None: all of them are active.
            normals: Whether to compute normals.
        """

    @abstractmethod
    def level_set(self, points: Tensor) -> Tensor:
        """Returns values that are positive inside the surface, negative outside and 0 on it.

        Args:
            points: Points, world units, `[count, 3]`.

        Returns:
            The values, `[count]`.
        """

    def colour(self, points: Tensor) -> Tensor:
        """Returns the albedo of points `[count, 3]`, RGB in [0, 1], `[count, 3]`."""
        return self.query(points, None, False).colour.T

    def density(self, points: Tensor) -> Tensor:
        """Returns the density at points `[count, 3]`, per world unit, `[count]`; the occupancy grid records it."""
        return self.query(points, None, False).density

    def surface(self) -> Surface:
        """Returns the zero level set with its colours."""
        return Surface(self.radius, self.level_set, self.colour, self.device)

    @classmethod
    def converts(cls, other: type[Scene]) -> bool:
        """Returns whether the other kind is a field too."""
        return issubclass(other, Field)

    @classmethod
    def from_scene(cls, config: Any, other: Scene) -> Self:
        """Builds a field that looks like another one: a copy if their configurations agree, otherwise fitted to it.

        Args:
            config: Configuration of the new field.
            other: The other field; the new one is on its device.

        Raises:
            TypeError: The other scene is not a field.
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
        """Measures the occupancy grid, so that the steps of the first window do not sample empty space."""
        if self.occupancy is not None:
            self.occupancy.update(self.occupancy.measure(self.density))

    def measure(self, step: int, *renders: Render) -> dict[str, Tensor]:
        """Measures the occupancy grid if an update is due at this step."""
        grid = self.occupancy
        if grid is None or not grid.due(step):
            return {}
        return {"occupancy": grid.measure(self.density)}

    def carry(self) -> Carry | None:
        """Returns the occupancy grid, which measurements of the steps update."""
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

        Random numbers come from torch's global CPU generator, one per ray whether or not the ray meets anything, so
        that a ray's number does not depend on other rays. If nothing is drawn and no gradient is needed, the rays are
        rendered in parts.

        Args:
            origins: Origins of the rays, world units, `[batch, height, width, 3]`.
            directions: Unit vectors, `[batch, height, width, 3]`.
            jitter: Whether samples are displaced at random; see `Scene.render` for this and the following.
            normals: Whether to compute normals.
            normal_smoothness: Whether to measure how fast normals change in space.
            light: Light on the surface.
            background: Colour in place of the field's background, RGB in [0, 1], `[batch, 3]`.
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
        """Composites all rays at once; returns the render and how many samples were evaluated."""
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
        """Evaluates the field in parts, so that the backward pass holds the activations of one part at a time."""
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
                    preserve_rng_state=False,  # `query` draws nothing
                )
                for part in points.split(_POINTS_AT_ONCE)
            ]
        )
