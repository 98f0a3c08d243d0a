"""The stages of the `paper` presets as they are measured: their largest step, and scenes that are as far as that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from picardopt_3d.cameras import Cameras, orbit_cameras
from picardopt_3d.guidance import Encoded, EncodedText, Guidance
from picardopt_3d.images import ReferenceImage
from picardopt_3d.methods import METHODS, Context, Stage, StageConfig
from picardopt_3d.methods import stage as stage_module
from picardopt_3d.methods.schedules import current
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.scenes import (
    Field,
    GaussiansConfig,
    Scene,
    TetrahedralConfig,
    TexturedMesh,
    TexturedMeshConfig,
    build_scene,
)
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped
from torch import Tensor

GAUSSIANS = 50_000
"""3D Gaussians of a scene that has grown."""
RINGS = 200
"""Rings, and quadrilaterals a ring, of the sphere whose texture is refined: 79,600 triangles."""
BALL = 0.5
"""Radius of the ball whose cells are occupied in a field that has grown, as a share of the field's."""


@dataclass(frozen=True)
class Row:
    """A stage of a preset.

    Attributes:
        name: For tables and options, "method/stage" with the preset where it is not `paper`.
        config: Its configuration.
        before: That of the stage before, if there is one.
        from_picture: Whether the run starts from a picture.
    """

    name: str
    config: StageConfig
    before: StageConfig | None
    from_picture: bool

    def largest(self) -> int:
        """The last of the steps with the most pixels."""
        firsts = {0}
        for milestones in (self.config.batch, self.config.pixels):
            firsts |= set() if isinstance(milestones, int) else {first for first, _ in milestones}
        ends = [first - 1 for first in sorted(firsts - {0})] + [self.config.steps - 1]
        return max(ends, key=lambda step: math.prod(self.views(step)) * self.views(step)[1])

    def views(self, step: int) -> tuple[int, int]:
        """Views of a step, and pixels along each edge."""
        return current(self.config.batch, step), current(self.config.pixels, step)

    def pixels_at(self, step: int) -> int:
        """Pixels of all views of a step, with that of a picture's camera."""
        batch, size = self.views(step)
        beside: Any = getattr(self.config, "reference_pixels", 0) if self.from_picture else 0
        return batch * size**2 + current(beside, step) ** 2

    def shrunk(self) -> Row:
        """The row with small hash tables, to be tried on a CPU."""
        pair = (_shrunk(each) for each in (self.config, self.before))
        return replace(self, config=next(pair), before=next(pair))

    def states(self) -> tuple[str, ...]:
        """What its scene is measured as; a mesh needs no more at work than when it is new."""
        mesh = isinstance(self.config.scene, TetrahedralConfig | TexturedMeshConfig)
        return ("new",) if mesh else ("new", "grown")


def _shrunk(config: Any) -> Any:
    if config is None or not hasattr(config.scene, "encoding"):
        return config
    encoding = replace(config.scene.encoding, log2_size=10)
    return replace(config, scene=replace(config.scene, encoding=encoding))


def paper_rows() -> Iterator[Row]:
    """Every stage of every preset with published settings; two commands may share a name."""
    for command, methods in METHODS.items():
        for method, entry in methods.items():
            for preset, recipe in entry.presets.items():
                if not preset.startswith("paper"):
                    continue
                before = None
                for name, config in recipe.stages():
                    full = method + ("" if preset == "paper" else f"-{preset}")
                    full += "" if len(recipe.stages()) == 1 else f"/{name}"
                    if command == "image-to-3d":
                        full += " (picture)"
                    yield Row(full, config, before, command == "image-to-3d")
                    before = config


class Brightness(Guidance):
    """Stands in for a model where only the scene is measured: the mean square of the views."""

    size = 64

    def encode(self, prompt: str | TextPrompt | ImagePrompt) -> Encoded:
        nothing = torch.zeros(1, 1, 1)
        return EncodedText(TextPrompt("nothing"), nothing, nothing)

    def __call__(
        self,
        views: Tensor,
        prompt: Encoded,
        cameras: Cameras,
        timestep_range: tuple[float, float] = (0.02, 0.98),
    ) -> Tensor:
        return views.square().mean()


def build_stage(
    row: Row, guidance: Guidance, device: torch.device, step: int, grown: bool
) -> Stage:
    """The stage on a new scene, or on one that has grown; seeded."""
    torch.manual_seed(0)
    config: Any = row.config
    image = picture(config) if row.from_picture else None
    prompt = (
        config.guidance.text_prompt("a red cube in a forest") if image is None else image.prompt()
    )
    context = Context(guidance, prompt, device, image)
    if isinstance(config.scene, TexturedMeshConfig):
        # Unwrapping a real surface takes a minute and changes nothing here.
        mesh = _sphere(config.scene)
        with mock.patch.object(stage_module, "build_scene", return_value=mesh):
            return config.build(context)
    previous = None
    if isinstance(config.scene, TetrahedralConfig) and row.before is not None:
        previous = _first_field(row.before).to(device)
    if grown and isinstance(config.scene, GaussiansConfig):
        config = replace(config, scene=replace(config.scene, count=GAUSSIANS))
    stage: Stage = config.build(context, previous)
    if grown and isinstance(stage.scene, Field) and stage.scene.occupancy is not None:
        stage.scene.occupancy.values.copy_(_ball(stage.scene.occupancy.values))
    return stage


def _first_field(config: StageConfig) -> Scene:
    """A new field of the kind that a recipe begins with, whose density is a blob."""
    scene: Any = config.scene
    if isinstance(scene, TetrahedralConfig):  # the third stage starts from the second one's mesh
        scene = next(row.config.scene for row in paper_rows() if row.name == "prolificdreamer/nerf")
    return build_scene(scene)


def _ball(values: Tensor) -> Tensor:
    """Densities of an occupancy grid, high in a ball about its centre and 0 around it."""
    axis = (torch.arange(len(values)) + 0.5) * (2 / len(values)) - 1
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.where(x**2 + y**2 + z**2 < BALL**2, 100.0, 0.0)


def picture(config: Any) -> ReferenceImage:
    """A grey disc over white, from the middle of the training cameras."""
    size = 512
    axis = torch.linspace(-1, 1, size)
    alpha = (axis[:, None] ** 2 + axis**2 < 0.5).float()[None]
    distance, fov = config.cameras.middle
    camera = orbit_cameras(0.0, 0.0, distance, fov)
    return ReferenceImage((1 - 0.5 * alpha).expand(3, -1, -1), alpha, camera)


def _sphere(config: TexturedMeshConfig) -> TexturedMesh:
    """A sphere of radius 0.5 with a texture that is not unwrapped but laid out by longitude and latitude."""
    ring = torch.arange(RINGS + 1) / RINGS
    latitude, longitude = torch.meshgrid(math.pi * ring, 2 * math.pi * ring, indexing="ij")
    places = torch.stack(
        [
            latitude.sin() * longitude.cos(),
            latitude.sin() * longitude.sin(),
            latitude.cos(),
        ],
        dim=-1,
    ).view(-1, 3)
    corner = torch.arange((RINGS + 1) ** 2).view(RINGS + 1, RINGS + 1)
    a, b, c, d = corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]
    # At the poles one triangle of each two has no area.
    lower, upper = torch.stack([a, b, c], -1)[:-1], torch.stack([a, c, d], -1)[1:]
    faces = torch.cat([lower.reshape(-1, 3), upper.reshape(-1, 3)])
    flat = torch.stack([longitude, 2 * latitude], -1).view(-1, 2) / (2 * math.pi)
    unwrapped = Unwrapped(flat, faces)
    return TexturedMesh(config, Triangles(0.5 * places, faces), unwrapped)
