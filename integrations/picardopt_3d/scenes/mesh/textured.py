"""A mesh with a texture as a scene: what a later stage of a run refines, and what other programs open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.bake import bake
from picardopt_3d.scenes.mesh.config import TexturedMeshConfig
from picardopt_3d.scenes.mesh.geometry import length, unit, vertex_normals
from picardopt_3d.scenes.mesh.lookup import Lookup, sampled
from picardopt_3d.scenes.mesh.outline import outlined
from picardopt_3d.scenes.mesh.rasterize import antialias, chosen, interpolate, rasterize
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped, unwrap
from picardopt_3d.scenes.scene import Scene, Shell
from picardopt_3d.scenes.tiles import joined
from picardopt_3d.scenes.views import Light, Render
from picardopt_3d.scenes.volume import lambert

_PIXELS_AT_ONCE = 1 << 18
"""Pixels that are drawn together when no gradient is needed, or one view."""

_BY_MESH = ("vertices", "faces", "coordinates", "coordinate_faces", "offsets")
"""Tensors whose number of rows is the mesh's own."""


class TexturedMesh(Scene):
    """A mesh whose colours are a texture. Without a mesh it is empty, until a state is loaded.

    Args:
        config: The configuration.
        triangles: The mesh; None: none.
        unwrapped: Where its triangles lie on the texture.
        colours: The texture, RGB in [0, 1], row 0 on top, `[size, size, 3]`; None: grey.

    Attributes:
        vertices: Positions before the offsets, world units, `[vertices, 3]`.
        faces: Indices of three vertices each, counter-clockwise seen from outside, `[faces, 3]`.
        coordinates: Texture coordinates from the left and from the top, in [0, 1], `[count, 2]`.
        coordinate_faces: Indices of three texture coordinates for each face, `[faces, 3]`.
        texture: Logits of the colours (sRGB), row 0 on top, `[size, size, 3]`.
        offsets: Displacements of the vertices, world units, `[vertices, 3]`.
    """

    config: TexturedMeshConfig
    vertices: Tensor
    faces: Tensor
    coordinates: Tensor
    coordinate_faces: Tensor

    def __init__(
        self,
        config: TexturedMeshConfig,
        triangles: Triangles | None = None,
        unwrapped: Unwrapped | None = None,
        colours: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, size = config, config.texture
        triangles = triangles or Triangles(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
        unwrapped = unwrapped or Unwrapped(torch.zeros(0, 2), torch.zeros(0, 3, dtype=torch.int64))
        self.register_buffer("vertices", triangles.vertices.float())
        self.register_buffer("faces", triangles.faces)
        self.register_buffer("coordinates", unwrapped.coordinates.float())
        self.register_buffer("coordinate_faces", unwrapped.faces)
        texture = torch.zeros(size, size, 3) if colours is None else colours.logit(1e-3)
        self.texture = nn.Parameter(texture, requires_grad=config.trained != "shape")
        offsets = torch.zeros_like(self.vertices)
        self.offsets = nn.Parameter(offsets, requires_grad=config.trained != "colour")

    def prepare(self) -> None:
        """Refuses what cannot be drawn: before step 0, where all processes end in one line.

        Raises:
            ValueError: There is no mesh, or see `rasterize`.
        """
        if not len(self.faces):
            raise ValueError(
                "a textured mesh is made from another scene: give its stage a stage before it"
            )
        chosen(self.config.rasterizer, self.device)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the groups "texture" and "offsets"; what is not trained is left out."""
        roles = {"texture": self.texture, "offsets": self.offsets}
        return {name: [each] if each.requires_grad else [] for name, each in roles.items()}

    def counts(self) -> dict[str, int]:
        """Returns the number of triangles."""
        return {"triangles": len(self.faces)}

    def triangles(self) -> Triangles:
        """Returns the mesh, in the graph of the offsets."""
        return Triangles(self.vertices + self.offsets, self.faces)

    def unwrapped(self) -> Unwrapped:
        """Returns where the triangles lie on the texture."""
        return Unwrapped(self.coordinates, self.coordinate_faces)

    def colours(self) -> Tensor:
        """Returns the texture's colours, RGB in [0, 1], row 0 on top, `[size, size, 3]`."""
        return torch.sigmoid(self.texture)

    def shell(self) -> Shell:
        """Returns the mesh, without a graph, and the texture's colours on it."""
        with torch.no_grad():
            triangles = self.triangles()
            return Shell(triangles, Lookup(triangles, self.unwrapped(), self.texture))

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
        """Draws the mesh; see `Scene.render`. Nothing is drawn at random, and `step` changes nothing.

        Raises:
            ValueError: The smoothness of normals in space is asked for, which triangles do not have.
        """
        if normal_smoothness:
            raise ValueError(
                "a mesh has no normals off its surface: leave weights.normal_smoothness_3d at 0"
            )
        shape = (size, size) if isinstance(size, int) else size
        shape = (shape[0] * self.config.samples, shape[1] * self.config.samples)
        triangles = self.triangles()
        if background is None:
            background = self.vertices.new_tensor([self.config.background]).expand(len(cameras), 3)

        def draw(part: slice) -> Render:
            lit = light and replace(light, position=light.position[part])
            return self._draw(triangles, cameras[part], shape, normals, lit, background[part])

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
        background: Tensor,
    ) -> Render:
        """Draws all views at once, from pictures of the height and width `shape`, whose pixels are averaged."""
        fragments = rasterize(triangles, cameras, *shape, rasterizer=self.config.rasterizer)
        image = background.to(triangles.vertices)[:, None, None].expand(len(cameras), *shape, 3)
        image = F.pad(image, (0, 5 if normals else 2))  # colour, opacity, depth, normal
        covered = (fragments.face.view(-1) >= 0).nonzero().squeeze(1)
        corners = triangles.vertices
        if normals or light is not None:
            corners = torch.cat([corners, vertex_normals(triangles)], 1)
        found = interpolate(fragments, triangles.faces, corners).flatten(0, 2)[covered]
        places = interpolate(fragments, self.coordinate_faces, self.coordinates)
        colour = sampled(self.texture, places.flatten(0, 2)[covered])
        view = covered // (shape[0] * shape[1])
        points, normal = found[:, :3], unit(found[:, 3:])
        if light is not None:
            towards = F.normalize(light.position.to(points)[view] - points, dim=1)
            colour = lambert(colour.T, normal.T, towards.T, light).T
        depth = length(points - cameras.position[view])[:, None]
        seen = torch.cat([colour, torch.ones_like(depth), depth, normal], 1)
        seen = seen[:, : image.shape[-1]]
        image = image.flatten(0, 2).index_copy(0, covered, seen).view(image.shape)
        image = antialias(image, fragments, triangles, cameras).permute(0, 3, 1, 2)
        if self.config.samples > 1:
            image = F.avg_pool2d(image, self.config.samples)
        return Render(
            rgb=image[:, :3],
            opacity=image[:, 3:4],
            depth=image[:, 4:5],
            normal=image[:, 5:] if normals else None,
            triangles=triangles,
        )

    @classmethod
    def converts(cls, other: type[Scene]) -> bool:
        """Returns whether scenes of the other kind have triangles or a surface."""
        return other.shell is not Scene.shell or other.surface is not Scene.surface

    @classmethod
    def from_scene(cls, config: TexturedMeshConfig, other: Scene) -> Self:
        """Starts with the surface and the colours of another scene.

        Args:
            config: Configuration of the new scene.
            other: The other scene; the new one is on its device.

        Raises:
            ValueError: The other scene is empty or has no surface.
        """
        triangles = outlined(other, config)
        unwrapped = unwrap(triangles, config.texture)
        triangles = Triangles(*(part.to(other.device) for part in triangles))
        unwrapped = Unwrapped(*(part.to(other.device) for part in unwrapped))
        colours = bake(triangles, unwrapped, other, config)
        return cls(config, triangles, unwrapped, colours)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads another mesh too; optimizers keep the same parameters, in their new size.

        Raises:
            RuntimeError: Names or shapes do not fit. Nothing is loaded then.
        """
        own = self.state_dict()
        wrong = [f"{name} is missing" for name in own.keys() - state_dict if strict]
        wrong += [f"{name} is unknown" for name in state_dict.keys() - own if strict]
        sizes = {name: tuple(state_dict[name].shape) for name in own.keys() & state_dict}
        for name, found in sizes.items():
            free = name in _BY_MESH and len(found) == 2
            expected = (found[0], *own[name].shape[1:]) if free else tuple(own[name].shape)
            if found != expected:
                wrong.append(f"{name} has shape {found} instead of {expected}")
        for one, two in (("vertices", "offsets"), ("faces", "coordinate_faces")):
            if sizes.get(one, tuple(own[one].shape)) != sizes.get(two, tuple(own[two].shape)):
                wrong.append(f"{one} and {two} have different shapes")
        if wrong:
            raise RuntimeError(
                f"the state is not that of this textured mesh: {', '.join(sorted(wrong))}"
            )
        for name in _BY_MESH:
            tensor = getattr(self, name)
            if name in sizes and sizes[name] != tuple(tensor.shape):
                tensor.data = tensor.data.new_zeros(sizes[name])
                tensor.grad = None
        return super().load_state_dict(state_dict, strict, assign)
