"""A tetrahedral grid as a scene (DMTet, arXiv 2111.04276): each step finds its surface anew and draws it.

The parameters do not change in number, but the triangles do. They are a function of the parameters alone, and nothing
of them is kept from one step to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.colours import Colours
from picardopt_3d.scenes.mesh.config import TetrahedralConfig
from picardopt_3d.scenes.mesh.conversion import Cube, shape_of
from picardopt_3d.scenes.mesh.geometry import length, unit, vertex_normals
from picardopt_3d.scenes.mesh.marching import march
from picardopt_3d.scenes.mesh.painting import paint, repaint
from picardopt_3d.scenes.mesh.rasterize import antialias, chosen, interpolate, rasterize
from picardopt_3d.scenes.mesh.tetrahedra import border, lattice, vertex_count
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.networks import Background
from picardopt_3d.scenes.scene import Scene, Shell
from picardopt_3d.scenes.tiles import joined
from picardopt_3d.scenes.views import Light, Render
from picardopt_3d.scenes.volume import lambert

_PIXELS_AT_ONCE = 1 << 18
"""Pixels that are drawn together when no gradient is needed, or one view."""

_REACH = 0.25
"""How far a vertex of the grid can move along each axis, in cells: so far that no two of them meet."""


class Tetrahedral(Scene):
    """A signed distance at the vertices of a tetrahedral grid, with colours in space.

    It starts as a sphere. Nothing on the border of the grid is inside, so that the surface is always closed.

    Args:
        config: The configuration.

    Attributes:
        distance: Signed distances at the grid's vertices, in cells, negative inside, `[vertices]`.
        offsets: Displacements of the vertices: their tanh, times a quarter of a cell, `[vertices, 3]`.
        centre: Centre of the grid's cube, world units, `[3]`.
        cell: Edge of a cell, world units, a scalar.
    """

    config: TetrahedralConfig
    centre: Tensor
    cell: Tensor
    lattice: Tensor
    border: Tensor

    def __init__(self, config: TetrahedralConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TetrahedralConfig()
        count, shape = config.resolution, config.trained != "colour"
        cell = 2 * config.radius / count
        self.register_buffer("lattice", lattice(count), persistent=False)
        self.register_buffer("border", border(count), persistent=False)
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("cell", torch.tensor(cell))
        sphere = self.lattice.norm(dim=1) - min(0.5, 0.75 * config.radius) / cell
        # A vertex right on the sphere would have faces without an area around it.
        sphere = torch.where(sphere.abs() < 0.01, 0.01, sphere)
        self.distance = nn.Parameter(sphere, requires_grad=shape)
        offsets = torch.zeros(vertex_count(count), 3)
        self.offsets = nn.Parameter(offsets, requires_grad=shape and config.deform)
        self.colours = Colours(config.encoding, config.radius, config.width, config.depth)
        self.background = Background(config.background, config.background_colour)
        for module in (self.colours, self.background):
            module.requires_grad_(config.trained != "shape")

    def prepare(self) -> None:
        """Refuses a rasterizer that cannot be used here: before step 0, where all processes end in one line.

        Raises:
            ValueError: See `rasterize`.
        """
        chosen(self.config.rasterizer, self.device)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the parameters by role: "shape", "encoding", "networks", "background"; what is kept is left out."""
        roles: Mapping[str, list[nn.Parameter]] = {
            "shape": [self.distance, self.offsets],
            "encoding": list(self.colours.encoding.parameters()),
            "networks": list(self.colours.network.parameters()),
            "background": list(self.background.parameters()),
        }
        return {
            role: [parameter for parameter in parameters if parameter.requires_grad]
            for role, parameters in roles.items()
        }

    def triangles(self) -> Triangles:
        """Returns the surface, in the graph of the parameters."""
        cells = self.lattice + _REACH * torch.tanh(self.offsets)
        outside = self.distance.clamp_min(1e-3)
        distance = torch.where(self.border, outside, self.distance)
        cut = march(cells, distance, self.config.resolution)
        return Triangles(self.centre + self.cell * cut.vertices, cut.faces)

    def shell(self) -> Shell:
        """Returns the surface, without a graph, and its colours."""
        with torch.no_grad():
            return Shell(self.triangles(), lambda points: self.colours(points).T)

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
        """Draws the surface; see `Scene.render`. Nothing is drawn at random.

        An empty surface leaves the background, with gradients of 0.

        Raises:
            ValueError: The smoothness of normals in space is asked for, which triangles do not have.
        """
        if normal_smoothness:
            raise ValueError(
                "a mesh has no normals off its surface: leave weights.normal_smoothness_3d at 0"
            )
        shape = (size, size) if isinstance(size, int) else size
        triangles = self.triangles()

        def draw(part: slice) -> Render:
            lit = light and replace(light, position=light.position[part])
            behind = None if background is None else background[part]
            return self._draw(triangles, cameras[part], shape, normals, lit, behind, step)

        views = max(1, _PIXELS_AT_ONCE // (shape[0] * shape[1]))
        if torch.is_grad_enabled() or len(cameras) <= views:
            return draw(slice(None))
        parts = [draw(slice(first, first + views)) for first in range(0, len(cameras), views)]
        return replace(joined([[part] for part in parts], [1] * len(parts)), triangles=triangles)

    def _draw(
        self,
        triangles: Triangles,
        cameras: Cameras,
        shape: tuple[int, int],
        normals: bool,
        light: Light | None,
        background: Tensor | None,
        step: int | None,
    ) -> Render:
        """Draws all views at once."""
        image = self._behind(cameras, shape, background)
        image = F.pad(image, (0, 5 if normals else 2))  # colour, opacity, depth, normal
        fragments = covered = None
        if len(triangles.faces):
            fragments = rasterize(triangles, cameras, *shape, rasterizer=self.config.rasterizer)
            covered = (fragments.face.view(-1) >= 0).nonzero().squeeze(1)
        if fragments is not None and covered is not None and len(covered):
            corners = triangles.vertices
            if normals or light is not None:
                corners = torch.cat([corners, vertex_normals(triangles)], 1)
            found = interpolate(fragments, triangles.faces, corners)
            found = found.flatten(0, 2).index_select(0, covered)  # [count, 3 or 6]
            view = covered // (shape[0] * shape[1])
            seen = self._seen(found, cameras.position[view], view, light, step)
            seen = seen[:, : image.shape[-1]]
            image = image.flatten(0, 2).index_copy(0, covered, seen).view(image.shape)
            image = antialias(image, fragments, triangles, cameras)
        elif torch.is_grad_enabled():
            image = image + self._nothing()
        image = image.permute(0, 3, 1, 2)
        return Render(
            rgb=image[:, :3],
            opacity=image[:, 3:4],
            depth=image[:, 4:5],
            normal=image[:, 5:] if normals else None,
            triangles=triangles,
        )

    def _seen(
        self, found: Tensor, eye: Tensor, view: Tensor, light: Light | None, step: int | None
    ) -> Tensor:
        """Returns colour, opacity, depth and unit normal (where it is given) of points of the surface.

        Args:
            found: Positions and, unless neither light nor normals are asked for, normals, `[count, 3 or 6]`.
            eye: Position of the camera that sees each, `[count, 3]`.
            view: Index of its view, `[count]`.
            light: The views' lights.
            step: Step of the run.
        """
        points, normal = found[:, :3], unit(found[:, 3:])
        colour = self.colours(points, step)
        if light is not None:
            towards = F.normalize(light.position.to(points)[view] - points, dim=1)
            colour = lambert(colour, normal.T, towards.T, light)
        depth = length(points - eye)[:, None]
        return torch.cat([colour.T, torch.ones_like(depth), depth, normal], 1)

    def _behind(
        self, cameras: Cameras, shape: tuple[int, int], background: Tensor | None
    ) -> Tensor:
        """Returns the colour behind each pixel, `[views, height, width, 3]`."""
        pixels = (len(cameras), *shape, 3)
        if background is not None:
            return background.to(self.distance)[:, None, None].expand(pixels)
        if self.background.network is None:
            return self.background.colour.expand(pixels)
        directions = cameras.rays(*shape)[1].reshape(-1, 3)
        behind: Tensor = self.background(directions)
        return behind.view(pixels)

    def _nothing(self) -> Tensor:
        """Returns 0 in the graph of all trained parameters, so that the loss of an empty view can be differentiated."""
        trained = [
            parameter.view(-1)[:1] for group in self.groups().values() for parameter in group
        ]
        return 0.0 * torch.cat(trained).sum()

    @classmethod
    def converts(cls, other: type[Scene]) -> bool:
        """Returns whether scenes of the other kind are such grids too, or have a surface."""
        return issubclass(other, Tetrahedral) or other.surface is not Scene.surface

    @classmethod
    def check_conversion(cls, config: Any, other: type[Scene], given: Any) -> None:
        """Checks what is known before there are scenes, and that another grid has as many cells."""
        super().check_conversion(config, other, given)
        if issubclass(other, Tetrahedral) and given.resolution != config.resolution:
            raise ValueError(
                f"resolution={config.resolution}: the grid before has {given.resolution} cells, and its vertices are "
                "copied; give this stage's scene.resolution the same value as that of the stage before"
            )

    @classmethod
    def from_scene(cls, config: TetrahedralConfig, other: Scene) -> Self:
        """Starts with the surface and the colours of another scene.

        The shape of another tetrahedral grid is copied bit for bit. That of a field lies where its density has a
        level that leaves its outlines as they are; any other scene needs a surface. The grid's cube is fitted to it.
        Colours are copied from another grid of the same configuration, otherwise trained; random numbers come from
        torch's global CPU generator.

        Args:
            config: Configuration of the new scene.
            other: The other scene; the new one is on its device.

        Raises:
            ValueError: The other scene is empty or has no surface, or is a grid of another resolution.
        """
        scene = cls(config).to(other.device)
        if isinstance(other, Tetrahedral):
            cls.check_conversion(config, type(other), other.config)
            for name in ("distance", "offsets", "centre", "cell"):
                getattr(scene, name).data.copy_(getattr(other, name).data)
        else:
            whole = Cube(scene.lattice, config.resolution, scene.centre, float(scene.cell))
            cube, distance = shape_of(other, whole, scene.border)
            scene.distance.data.copy_(distance)
            scene.centre.copy_(cube.centre)
            scene.cell.fill_(cube.cell)
        with torch.no_grad():
            triangles = scene.triangles()
        paint(scene.colours, triangles, other, float(scene.cell))
        repaint(scene.background, other)
        return scene
