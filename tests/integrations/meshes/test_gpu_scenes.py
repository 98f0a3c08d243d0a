"""On CUDA: scenes of triangles and what is made of other scenes, against the same on the CPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.guidance import DenoiseConfig
from picardopt_3d.guidance.denoise import Denoising
from picardopt_3d.guidance.pixel_diffusion import PixelDiffusion
from picardopt_3d.resizing import resize
from picardopt_3d.scenes import (
    Gaussians,
    GaussiansConfig,
    Light,
    Scene,
    Tetrahedral,
    TexturedMesh,
    TexturedMeshConfig,
)
from picardopt_3d.scenes.mesh.bake import bake
from picardopt_3d.scenes.mesh.geometry import laplacian, normal_consistency
from picardopt_3d.scenes.mesh.triangles import Triangles
from picardopt_3d.scenes.mesh.unwrap import Unwrapped, unwrap
from picardopt_3d.world.shapes import SHAPES
from torch import Tensor

from tests.integrations.helpers.analytic import voxels
from tests.integrations.helpers.splats import shell as shell_of_splats
from tests.integrations.helpers.tetrahedra import config
from tests.integrations.helpers.textures import ball

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
# Read once in a process, before the first matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TEXTURED = TexturedMeshConfig(
    resolution=24, faces=600, texture=64, view_pixels=32, trained="all", rasterizer="torch"
)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operations of torch that have no order raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def grid() -> Tetrahedral:
    """Almost a ball, in colours that differ from place to place."""
    torch.manual_seed(0)
    scene = Tetrahedral(config(10, background="neural", rasterizer="torch"))
    with torch.no_grad():
        scene.distance.add_(0.1 * torch.randn_like(scene.distance))
        scene.offsets.normal_(std=0.1)
        scene.colours.encoding.table.normal_()
        for parameter in scene.background.parameters():
            parameter.normal_()
    return scene


def textured(samples: int) -> TexturedMesh:
    triangles = ball(20, 300)
    colours = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    settings = TexturedMeshConfig(texture=32, samples=samples, trained="all", rasterizer="torch")
    return TexturedMesh(settings, triangles, unwrap(triangles, 32), colours)


SCENES = {"grid": grid, "textured": lambda: textured(1), "of four samples": lambda: textured(2)}


def stepped(scene: Scene, device: torch.device) -> dict[str, Tensor]:
    """Pictures and gradients of a step whose loss has all that meshes give, on the CPU."""
    scene = copy.deepcopy(scene).to(device)
    cameras = orbit_cameras(torch.tensor([-10.0, 30.0]), torch.tensor([0.0, 130.0])).to(device)
    light = Light(cameras.position + 0.3, 0.3, 0.7)
    render = scene.render(cameras, (24, 32), normals=True, light=light, step=0)
    assert render.normal is not None
    assert render.triangles is not None
    pictures = {"rgb": render.rgb, "opacity": render.opacity, "normal": render.normal}
    resized = resize(render.rgb, 16)
    loss = sum((picture - 0.4).square().sum() for picture in [*pictures.values(), resized])
    loss = loss + normal_consistency(render.triangles) + 10 * laplacian(render.triangles)
    loss.backward()
    found = pictures | {"depth": render.depth, "resized": resized}
    found |= {f"gradient of {name}": p.grad for name, p in scene.named_parameters()}
    return {name: part.detach().cpu() for name, part in found.items()}


@pytest.mark.parametrize("kind", list(SCENES))
def test_a_step_is_that_of_the_cpu(kind: str) -> None:
    """But for pixels whose centres lie on an edge to rounding."""
    scene: Any = SCENES[kind]()
    expected, found = stepped(scene, CPU), stepped(scene, CUDA)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert theirs.any(), name
        assert float((found[name] - theirs).norm()) < 0.02 * float(theirs.norm()), name


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", list(SCENES))
def test_a_step_repeats_every_bit(kind: str) -> None:
    scene: Any = SCENES[kind]()
    kept = stepped(scene, CUDA)
    for _ in range(3):
        for name, part in stepped(scene, CUDA).items():
            assert torch.equal(part, kept[name]), name


def others() -> dict[str, Scene]:
    splats = GaussiansConfig(count=600, strategy=None, rasterizer="torch")
    return {
        "field": voxels(SHAPES["snowman"], (0.8, 0.3, 0.2)),
        "gaussians": Gaussians(splats, shell_of_splats(600, 0.35, 0.03)),
        "grid": grid(),
    }


def assert_looks_alike(one: Scene, other: Scene, most: float) -> None:
    """Of the same kind, on any two devices: all around, in the mean over pixels."""
    pictures = []
    for scene in (one, other):
        with torch.no_grad():
            render = scene.render(turntable_cameras(4, elevation=20.0).to(scene.device), 32)
        pictures.append(torch.cat([render.rgb, render.opacity], 1).cpu())
    assert 0.02 < float(pictures[0][:, 3].mean()) < 0.98
    assert float((pictures[0] - pictures[1]).abs().mean()) < most


@pytest.mark.parametrize("before", ["field", "gaussians", "grid"])
def test_a_grid_is_made_of_a_scene(before: str) -> None:
    other = others()[before]
    settings = config(10 if before == "grid" else 14, rasterizer="torch")
    scenes = []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        scenes.append(Tetrahedral.from_scene(settings, other.to(device)))
        assert scenes[-1].device.type == device.type
    assert_looks_alike(*scenes, 0.02)


@pytest.mark.parametrize("before", ["field", "gaussians", "grid"])
def test_a_textured_mesh_is_made_of_a_scene(before: str) -> None:
    other = others()[before]
    scenes = []
    for device in (CPU, CUDA):
        scenes.append(TexturedMesh.from_scene(TEXTURED, other.to(device)))
        assert scenes[-1].device.type == device.type
    assert_looks_alike(*scenes, 0.02)
    shell = scenes[-1].shell()
    assert shell.colour(shell.triangles.vertices).device.type == CUDA.type


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("before", ["gaussians", "grid"])
def test_meshes_made_twice_have_the_same_bits(before: str) -> None:
    other = others()[before].to(CUDA)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        grid_of_it = Tetrahedral.from_scene(config(10, rasterizer="torch"), other)
        mesh_of_it = TexturedMesh.from_scene(TEXTURED, other)
        made.append([*grid_of_it.state_dict().values(), *mesh_of_it.state_dict().values()])
    assert all(torch.equal(one, two) for one, two in zip(*made, strict=True))


def test_a_texture_is_baked() -> None:
    scene, triangles = voxels(SHAPES["snowman"], (0.8, 0.3, 0.2)), ball(20, 300)
    flat = unwrap(triangles, 64)
    expected = bake(triangles, flat, scene, TEXTURED)
    there = Triangles(*(part.to(CUDA) for part in triangles))
    found = bake(there, Unwrapped(*(part.to(CUDA) for part in flat)), scene.to(CUDA), TEXTURED)
    assert found.device.type == CUDA.type
    assert float((found.cpu() - expected).abs().mean()) < 0.01


def test_views_are_denoised() -> None:
    """By the shipped model; at the same draws, which come from the CPU."""
    views = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(5))
    cameras, found = turntable_cameras(2), []
    for device in (CPU, CUDA):
        denoising = Denoising(PixelDiffusion.from_pretrained(device=device), DenoiseConfig(steps=5))
        leaf = views.to(device, copy=True).requires_grad_()  # `views` itself needs no gradient
        prompt, there = denoising.encode("a red cube"), cameras.to(device)
        torch.manual_seed(0)
        refined = denoising.refine(leaf, prompt, there, (0.4, 0.6))
        torch.manual_seed(0)
        loss = denoising(leaf, prompt, there, (0.4, 0.6))
        loss.backward()
        assert leaf.grad is not None
        assert refined.device.type == device.type
        found.append((refined.cpu(), leaf.grad.cpu(), loss.detach().cpu()))
    (expected, slope, loss), (refined, other, same) = found
    assert float((refined - expected).abs().mean()) < 0.01
    assert float((other - slope).norm()) < 0.02 * float(slope.norm())
    torch.testing.assert_close(same, loss, rtol=0.01, atol=1e-4)
