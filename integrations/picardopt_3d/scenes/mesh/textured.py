"""A mesh with a texture as a scene: what a later stage of a run refines, and what other programs open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from picardopt_3d.cameras import Cameras
from picardopt_3d.scenes.mesh.bake import bake
from picardopt_3d.scenes.mesh.config import TexturedMeshConfig
from picardopt_3d.scenes.mesh.drawing import Covered, Drawable, draw_mesh
from picardopt_3d.scenes.mesh.lookup import Lookup, sampled
from picardopt_3d.scenes.mesh.outline import outlined
from picardopt_3d.scenes.mesh.rasterize import check_usable, interpolate
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped, unwrap
from picardopt_3d.scenes.scene import Scene, Shell
from picardopt_3d.scenes.views import Light, Render

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

    @property
    def repeatable(self) -> bool:
        """Whether views and their gradients repeat: nvdiffrast's do not."""
        return self.config.rasterizer != "nvdiffrast"

    def prepare(self) -> None:
        """Refuses what cannot be drawn: before step 0, where all processes end in one line.

        Raises:
            ValueError: There is no mesh, or see `rasterize`.
        """
        if not len(self.faces):
            raise ValueError(
                "a textured mesh is made from another scene: put a stage that trains one before it"
            )
        check_usable(self.config.rasterizer, self.device)

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
        mesh = Drawable(
            self.triangles(),
            self._seen,
            self._around,
            [each for group in self.groups().values() for each in group],
            self.config.rasterizer,
            self.config.samples,
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

    def _seen(self, covered: Covered) -> Tensor:
        """Returns the texture's colours at pixels, RGB in [0, 1], `[3, count]`."""
        places = interpolate(covered.fragments, self.coordinate_faces, self.coordinates)
        return sampled(self.texture, places.flatten(0, 2)[covered.index]).T

    def _around(self, cameras: Cameras, shape: tuple[int, int]) -> Tensor:
        """Returns the background's colour at each pixel, `[views, height, width, 3]`."""
        colour = self.vertices.new_tensor(self.config.background)
        return colour.expand(len(cameras), *shape, 3)

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
