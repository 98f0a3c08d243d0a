"""A tetrahedral grid as a scene (DMTet, arXiv 2111.04276): each step finds its surface anew and draws it.

The parameters do not change in number, but the triangles do. They are a function of the parameters alone, and nothing
of them is kept from one step to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.colours import Colours
from picardopt_3d.scenes.mesh.config import TetrahedralConfig
from picardopt_3d.scenes.mesh.conversion import Cube, shape_of
from picardopt_3d.scenes.mesh.drawing import Drawable, draw_mesh
from picardopt_3d.scenes.mesh.marching import march
from picardopt_3d.scenes.mesh.painting import paint, repaint
from picardopt_3d.scenes.mesh.rasterize import check_usable
from picardopt_3d.scenes.mesh.tetrahedra import border, lattice, vertex_count
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.networks import Background
from picardopt_3d.scenes.scene import Scene, Shell
from picardopt_3d.scenes.views import Light, Render

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

    @property
    def repeatable(self) -> bool:
        """Whether views and their gradients repeat: nvdiffrast's do not."""
        return self.config.rasterizer != "nvdiffrast"

    def prepare(self) -> None:
        """Refuses a rasterizer that cannot be used here: before step 0, where all processes end in one line.

        Raises:
            ValueError: See `rasterize`.
        """
        check_usable(self.config.rasterizer, self.device)

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
        mesh = Drawable(
            self.triangles(),
            lambda covered: self.colours(covered.points, step),
            self._around,
            [each for group in self.groups().values() for each in group],
            self.config.rasterizer,
        )
        return draw_mesh(
            mesh,
            cameras,
            size,
            normals=normals,
            normal_smoothness=normal_smoothness,
            light=light,
            background=background,
        )

    def _around(self, cameras: Cameras, shape: tuple[int, int]) -> Tensor:
        """Returns the background's colour at each pixel, `[views, height, width, 3]`."""
        pixels = (len(cameras), *shape, 3)
        if self.background.network is None:
            return self.background.colour.expand(pixels)
        found: Tensor = self.background(cameras.rays(*shape)[1].reshape(-1, 3))
        return found.view(pixels)

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
