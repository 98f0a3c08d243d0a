"""Textured meshes: where texture lies, what is trained, what is kept, gradients, and other scenes made into one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picardopt_3d.cameras import Cameras, orbit_cameras, turntable_cameras
from picardopt_3d.rendering import render_rgb
from picardopt_3d.scenes import (
    Gaussians,
    GaussiansConfig,
    Light,
    Scene,
    Tetrahedral,
    TetrahedralConfig,
    TexturedMesh,
    TexturedMeshConfig,
    Triangles,
    build_scene,
    load_scene,
    save_scene,
)
from picardopt_3d.scenes.mesh import lookup
from picardopt_3d.scenes.mesh.lookup import sampled
from picardopt_3d.scenes.mesh.texels import Texels, texels_of
from picardopt_3d.scenes.mesh.unwrap import Unwrapped
from picardopt_3d.world import SHAPES
from picardopt_3d.world.yardstick import psnr

from tests.integrations.helpers.analytic import Balls, voxels
from tests.integrations.helpers.textures import bumpy

SMALL = TexturedMeshConfig(resolution=24, faces=600, texture=64, view_pixels=32, trained="all")


def square() -> tuple[Triangles, Unwrapped]:
    """A square that faces +x, as large as what a camera 1 away with 90 degrees sees; texture as seen."""
    corners = torch.tensor([[0.0, -1, 1], [0, 1, 1], [0, 1, -1], [0, -1, -1]])
    corners[:, 1] = -corners[:, 1]  # seen from +x, with z up, +y is on the right
    places = torch.tensor([[1.0, 0], [0, 0], [0, 1], [1, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    return Triangles(corners, faces), Unwrapped(places, faces.clone())


def front() -> Cameras:
    return orbit_cameras(0.0, 0.0, 1.0, 90.0)


def quadrants(size: int = 16) -> torch.Tensor:
    """Red top left, green top right, blue bottom left, white bottom right."""
    texture = torch.ones(size, size, 3)
    half = size // 2
    texture[:half, :half] = torch.tensor([1.0, 0, 0])
    texture[:half, half:] = torch.tensor([0, 1.0, 0])
    texture[half:, :half] = torch.tensor([0, 0, 1.0])
    return texture


@pytest.fixture(scope="module")
def ball() -> TexturedMesh:
    return TexturedMesh.from_scene(SMALL, Balls())


def test_a_texture_is_the_right_way_up_and_round() -> None:
    mesh = TexturedMesh(replace(SMALL, texture=16), *square(), quadrants())
    view = mesh.render(front(), 16)
    assert torch.allclose(view.rgb[0].permute(1, 2, 0), quadrants(), atol=2e-3)
    assert torch.equal(view.opacity, torch.ones_like(view.opacity))
    normal = mesh.render(front(), 16, normals=True).normal
    assert normal is not None
    assert torch.allclose(normal[0, :, 8, 8], torch.tensor([1.0, 0, 0]))
    distance = torch.tensor(1 + 2 * (0.5 / 8) ** 2).sqrt()
    assert torch.allclose(view.depth[0, 0, 8, 8], distance, atol=1e-5)


def test_lookups_are_linear_between_texels_and_constant_at_the_edge() -> None:
    texture = torch.rand(5, 5, 3, generator=torch.Generator().manual_seed(0)) * 4 - 2
    places = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
    image = torch.sigmoid(texture).permute(2, 0, 1)[None]
    expected = torch.nn.functional.grid_sample(
        image, 2 * places[None, None] - 1, padding_mode="border", align_corners=False
    )[0, :, 0].T
    assert torch.allclose(sampled(texture, places), expected, atol=1e-6)


def test_gradients_of_lookups_are_those_of_differences() -> None:
    texture = torch.randn(8, 8, 3, dtype=torch.float64, requires_grad=True)
    places = (0.05 + 0.9 * torch.rand(9, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(sampled, (texture, places))


def test_no_thread_changes_the_order_of_sums(ball: TexturedMesh) -> None:
    """Bits are the same whenever the threads are as many; with more, a sigmoid's last bit may be another."""
    mesh, threads, found = (
        build_scene(replace(SMALL, faces=10**6), ball),
        torch.get_num_threads(),
        {},
    )
    try:
        for count in (1, 2, 3, 1, 2, 3):
            torch.set_num_threads(count)
            mesh.zero_grad()
            view = mesh.render(turntable_cameras(3), 64, normals=True)
            assert view.normal is not None
            (view.rgb.square().mean() + view.normal.square().mean()).backward()
            now = [gradients(mesh), view.rgb.detach()]
            before = found.setdefault(count, now)
            assert all(torch.equal(one, two) for one, two in zip(before, now, strict=True))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(found[1], found[3], strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in mesh.parameters())  # type: ignore[union-attr]


def gradients(scene: Scene) -> torch.Tensor:
    """All gradients of a scene, in a row."""
    return torch.cat([p.grad.flatten().clone() for p in scene.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("trained", "groups"),
    [("all", {"texture", "offsets"}), ("colour", {"texture"}), ("shape", {"offsets"})],
)
def test_only_what_is_trained_is_in_the_groups(
    ball: TexturedMesh, trained: str, groups: set[str]
) -> None:
    mesh = build_scene(replace(SMALL, trained=trained, faces=10**6), ball)  # type: ignore[arg-type]
    assert mesh.groups().keys() == {"texture", "offsets"}
    assert {name for name, own in mesh.groups().items() if own} == groups
    mesh.render(front(), 32).rgb.sum().backward()
    for name, parameter in mesh.named_parameters():
        assert (parameter.grad is not None) == (name in groups)


def test_a_moved_mesh_is_drawn_where_it_went(ball: TexturedMesh) -> None:
    moved = build_scene(replace(SMALL, faces=10**6), ball)
    assert isinstance(moved, TexturedMesh)
    moved.offsets.data[:, 2] = 0.1
    low, high = (mesh.render(front(), 32).opacity[0, 0].nonzero()[:, 0] for mesh in (ball, moved))
    assert float(low.float().mean() - high.float().mean()) == pytest.approx(1.6, abs=0.5)
    shell = moved.shell()
    assert float(shell.triangles.vertices[:, 2].mean()) == pytest.approx(0.1, abs=0.01)


def test_whether_there_are_triangles_is_known_at_once(
    ball: TexturedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only colours need the tree of texels, which takes a second to make."""
    calls: list[int] = []

    def counted(unwrapped: Unwrapped, size: int) -> Texels:
        calls.append(size)
        return texels_of(unwrapped, size)

    monkeypatch.setattr(lookup, "texels_of", counted)
    shell = ball.shell()
    assert not calls
    first = shell.colour(shell.triangles.vertices)
    assert torch.equal(shell.colour(shell.triangles.vertices), first)
    assert calls == [SMALL.texture]


def test_light_shades_and_background_shows(ball: TexturedMesh) -> None:
    cameras = turntable_cameras(2)
    shaded = ball.render(
        cameras, 32, light=Light(cameras.position, 0.2, 0.8, textureless=True)
    ).rgb[:, :, 16, 16]
    assert torch.allclose(shaded, torch.ones_like(shaded), atol=0.02)
    dark = ball.render(cameras, 32, light=Light(-cameras.position, 0.2, 0.8)).rgb[:, :, 16, 16]
    plain = ball.render(cameras, 32).rgb[:, :, 16, 16]
    assert torch.allclose(dark, 0.2 * plain, atol=1e-3)
    colours = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert torch.allclose(ball.render(cameras, 32, background=colours).rgb[:, :, 0, 0], colours)
    assert torch.equal(ball.render(cameras, 32).rgb[:, :, 0, 0], torch.ones(2, 3))
    with pytest.raises(ValueError, match="normal_smoothness_3d"):
        ball.render(cameras, 32, normal_smoothness=True)


@pytest.mark.parametrize("trained", ["all", "shape", "colour"])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_mesh_out_of_sight_shows_the_background_with_gradients_of_zero(
    trained: str, samples: int
) -> None:
    config = replace(SMALL, trained=trained, samples=samples, background=(0.2, 0.4, 0.6))
    mesh = TexturedMesh(config, *square())
    away = front()
    away.camera_to_world[:, :3, 3] *= -1  # it looks away from the origin
    render = mesh.render(away, 8, normals=True)
    assert torch.allclose(render.rgb, torch.tensor(config.background).view(1, 3, 1, 1))
    assert not render.opacity.any()
    (render.rgb.mean() + render.opacity.mean()).backward()
    for group in mesh.groups().values():
        assert all(p.grad is not None and not p.grad.any() for p in group)


def test_many_views_in_parts_are_the_same(
    ball: TexturedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    cameras = turntable_cameras(5)
    with torch.no_grad():
        whole = ball.render(cameras, 16, normals=True, light=Light(cameras.position))
        monkeypatch.setattr("picardopt_3d.scenes.mesh.drawing._PIXELS_AT_ONCE", 2 * 16**2)
        parts = ball.render(cameras, 16, normals=True, light=Light(cameras.position))
    for name in ("rgb", "opacity", "depth", "normal"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_files_keep_it_and_another_size_of_mesh_is_loaded(
    ball: TexturedMesh, tmp_path: Path
) -> None:
    save_scene(ball, tmp_path / "scene.safetensors")
    again = load_scene(tmp_path / "scene.safetensors")
    assert isinstance(again, TexturedMesh)
    assert again.config == ball.config
    cameras = turntable_cameras(2)
    assert torch.equal(again.render(cameras, 32).rgb, ball.render(cameras, 32).rgb)
    other = TexturedMesh.from_scene(replace(SMALL, faces=100), Balls())
    parameter = other.offsets
    other.load_state_dict(ball.state_dict())
    assert other.offsets is parameter
    assert other.counts() == ball.counts()
    assert torch.equal(other.render(cameras, 32).rgb, ball.render(cameras, 32).rgb)
    state = ball.state_dict()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for name, value, said in (
        ("offsets", state["offsets"][:5], "vertices and offsets have different shapes"),
        ("texture", state["texture"][:5], "texture has shape"),
        ("more", state["offsets"], "more is unknown"),
        ("faces", None, "faces is missing"),
    ):
        changed = {key: kept for key, kept in state.items() if key != name}
        if value is not None:
            changed[name] = value
        with pytest.raises(RuntimeError, match=said):
            other.load_state_dict(changed)
        assert all(torch.equal(before[key], now) for key, now in other.state_dict().items())


def test_a_shell_has_the_colours_of_the_texture(ball: TexturedMesh) -> None:
    shell = ball.shell()
    corners = shell.triangles.vertices[shell.triangles.faces]
    points = corners.mean(1)
    assert torch.allclose(shell.colour(points), points + 0.5, atol=0.03)


@pytest.fixture(scope="module")
def mug() -> Scene:
    return voxels(SHAPES["mug"], (0.9, 0.5, 0.1), 32)


def test_what_other_scenes_show_is_what_their_meshes_show(mug: Scene, ball: TexturedMesh) -> None:
    cameras = turntable_cameras(4, elevation=20.0)
    config = replace(SMALL, resolution=48, faces=3000, texture=128, view_pixels=64)
    grid = Tetrahedral(TetrahedralConfig(resolution=12, radius=0.6, background="solid"))
    for other, least in ((mug, 27.0), (ball, 35.0), (grid, 35.0)):
        mesh = build_scene(config, other)
        views, wanted = (render_rgb(scene, cameras, 64, (1.0, 1.0, 1.0)) for scene in (mesh, other))
        assert psnr(views, wanted) >= least, type(other).__name__


def test_a_scene_without_a_surface_says_what_to_do() -> None:
    empty = voxels(lambda points: 1 + points.norm(dim=-1), (0.5, 0.5, 0.5), 8)
    with pytest.raises(ValueError, match="scene before is empty: hardly anything"):
        TexturedMesh.from_scene(SMALL, empty)
    vanished = Tetrahedral(TetrahedralConfig(resolution=4, radius=0.6))
    vanished.distance.data.fill_(1.0)
    with pytest.raises(ValueError, match="no triangles: its surface has vanished"):
        TexturedMesh.from_scene(SMALL, vanished)
    with pytest.raises(ValueError, match="put a stage that trains one before it"):
        TexturedMesh(SMALL).prepare()
    broken = Gaussians(GaussiansConfig(count=4))
    broken.means.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        TexturedMesh.from_scene(SMALL, broken)


def test_every_time_the_same_mesh() -> None:
    scene = voxels(SHAPES["chair"], (0.1, 0.2, 0.9), 24)
    one, two = (TexturedMesh.from_scene(SMALL, scene).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"view_pixels": 8}, "view_pixels=8"),
        ({"view_distance": 0.0}, "view_distance=0.0"),
        ({"view_fov": 180.0}, "view_fov=180.0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TexturedMeshConfig(**options)  # type: ignore[arg-type]


def test_a_mesh_of_many_sizes_of_triangles_is_unwrapped_and_worn() -> None:
    triangles = bumpy(8)
    from picardopt_3d.scenes.mesh.unwrap import unwrap

    flat = unwrap(triangles, 64)
    mesh = TexturedMesh(SMALL, triangles, flat, torch.full((64, 64, 3), 0.25))
    view = mesh.render(turntable_cameras(2), 32, background=torch.zeros(2, 3))
    solid = view.opacity.expand_as(view.rgb) == 1
    assert torch.allclose(view.rgb[solid], torch.tensor(0.25), atol=1e-5)


def test_gradients_of_offsets_are_those_of_differences() -> None:
    """Silhouettes and what slides under the pixels together, for a square that is moved as a whole."""
    triangles, flat = square()
    size = 16
    ramp = torch.linspace(0.2, 0.8, size)
    colours = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)] * 2, -1)
    mesh = TexturedMesh(
        replace(SMALL, texture=size),
        triangles._replace(vertices=0.613 * triangles.vertices),
        flat,
        colours[..., :3].contiguous(),
    ).double()
    weights = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(3)).double()
    camera = orbit_cameras(7.0, 11.0, 1.3, 90.0).to(torch.float64)

    def loss(step: torch.Tensor) -> torch.Tensor:
        mesh.offsets.data[:] = step
        return (mesh.render(camera, 20).rgb * weights).sum()

    loss(torch.zeros(3, dtype=torch.float64)).backward()
    assert mesh.offsets.grad is not None
    found = mesh.offsets.grad.sum(0)
    for axis, step in enumerate(1e-5 * torch.eye(3, dtype=torch.float64)):
        with torch.no_grad():
            expected = float(loss(step) - loss(-step)) / 2e-5
        assert float(found[axis]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_pixel_shows_the_mean_of_its_samples(ball: TexturedMesh) -> None:
    """As the average of a larger picture, in all that is drawn; gradients too."""
    fine = TexturedMesh(replace(SMALL, samples=2))
    fine.load_state_dict(ball.state_dict())
    cameras = turntable_cameras(2)
    found, large = (
        fine.render(cameras, (9, 12), normals=True),
        ball.render(cameras, (18, 24), normals=True),
    )
    for name in ("rgb", "opacity", "depth", "normal"):
        mean = torch.nn.functional.avg_pool2d(getattr(large, name), 2)
        torch.testing.assert_close(getattr(found, name), mean, msg=name)
    assert not torch.equal(found.rgb, ball.render(cameras, (9, 12)).rgb)
    assert torch.equal(render_rgb(fine, cameras, 9), fine.render(cameras, 9).rgb)
