"""The tetrahedral scene: what it draws, what is trained of it, how it is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picardopt_3d.cameras import Cameras, orbit_cameras, turntable_cameras
from picardopt_3d.scenes import Light, Render, Tetrahedral, build_scene, load_scene, save_scene
from picardopt_3d.scenes.mesh import drawing, tetrahedral
from picardopt_3d.scenes.mesh.config import Trained

from tests.integrations.helpers.tetrahedra import config, rugged
from tests.integrations.meshes.test_marching import assert_closed

VIEWS = orbit_cameras(torch.tensor([10.0, 40.0]), torch.tensor([0.0, 130.0]))


def drawn_sphere(
    cameras: Cameras, size: int, radius: float = 0.45
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rays meet a sphere: whether, and how far from the camera. # each [views, size, size]"""
    origins, directions = cameras.rays(size, size)
    middle = -(origins * directions).sum(-1)
    squared = radius**2 - (origins.square().sum(-1) - middle.square())
    return squared > 0, middle - squared.clamp_min(0).sqrt()


def test_it_starts_as_a_sphere_that_looks_like_one() -> None:
    scene = Tetrahedral(config(24, background_colour=(0.2, 0.4, 0.6)))
    render = scene.render(VIEWS, 37, normals=True)
    hit, distance = drawn_sphere(VIEWS, 37)
    assert render.normal is not None
    assert render.orientation_penalty is None
    assert render.triangles is not None
    opacity = render.opacity[:, 0]
    assert ((opacity > 0.5) == hit).float().mean() > 0.99
    assert ((opacity > 0) & (opacity < 1)).any()  # silhouettes are blended
    sure = (opacity == 1) & hit
    assert sure.sum() > 0.9 * hit.sum()
    near = sure & (distance < distance[hit].median())
    assert (render.depth[:, 0] - distance).abs()[near].max() < 2e-3
    origins, directions = VIEWS.rays(37, 37)
    outward = torch.nn.functional.normalize(origins + distance[..., None] * directions, dim=-1)
    cosine = (render.normal.movedim(1, -1) * outward).sum(-1)
    assert cosine[near].min() > math.cos(math.radians(8))
    behind = opacity == 0
    assert behind.any()
    assert torch.equal(
        render.rgb.movedim(1, -1)[behind],
        torch.tensor([0.2, 0.4, 0.6]).expand(int(behind.sum()), 3),
    )
    assert not render.normal.movedim(1, -1)[behind].any()


def test_backgrounds_depend_on_the_direction_or_are_given() -> None:
    scene = rugged(background="neural")
    plain = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 1.0]])
    render, own = scene.render(VIEWS, 16, background=plain), scene.render(VIEWS, 16)
    empty = render.opacity[:, 0] == 0
    for view in range(2):
        seen = render.rgb[view].movedim(0, -1)[empty[view]]
        assert torch.equal(seen, plain[view].expand_as(seen))
    directions = VIEWS.rays(16, 16)[1][empty]
    assert torch.allclose(own.rgb.movedim(1, -1)[empty], scene.background(directions))
    assert len(own.rgb.movedim(1, -1)[empty].unique(dim=0)) > 10


def test_light_follows_lamberts_law() -> None:
    """On a sphere before black: ambient + diffuse x the cosine between the outward normal and the light."""
    scene = Tetrahedral(config(24))
    light = Light(torch.tensor([[0.0, 0.0, 9.0]] * 2), 0.2, 0.7, textureless=True)
    render = scene.render(VIEWS, 40, light=light)
    hit, distance = drawn_sphere(VIEWS, 40)
    origins, directions = VIEWS.rays(40, 40)
    points = (origins + distance[..., None] * directions)[hit]
    towards = torch.nn.functional.normalize(light.position[0] - points, dim=1)
    outward = torch.nn.functional.normalize(points, dim=1)
    expected = 0.2 + 0.7 * (outward * towards).sum(1).clamp_min(0)
    found = render.rgb.movedim(1, -1)[hit]
    sure = (render.opacity[:, 0] == 1)[hit]
    assert (found - expected[:, None])[sure].abs().mean() < 0.02
    assert render.normal is None
    coloured = scene.render(VIEWS, 40, light=replace(light, textureless=False)).rgb
    albedo = scene.render(VIEWS, 40).rgb
    sure = (render.opacity == 1).expand_as(albedo)
    assert torch.allclose(coloured[sure], (albedo * render.rgb)[sure], atol=1e-4)


def test_nothing_is_drawn_at_random() -> None:
    scene, state = rugged(), torch.get_rng_state()
    first = scene.render(VIEWS, 12, jitter=True, normals=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.rgb, scene.render(VIEWS, 12, normals=True).rgb)
    with pytest.raises(ValueError, match="normal_smoothness_3d"):
        scene.render(VIEWS, 12, normal_smoothness=True)


@pytest.mark.parametrize("trained", ["all", "shape", "colour"])
@pytest.mark.parametrize("deform", [True, False])
def test_what_is_trained_gets_gradients_and_the_rest_none(trained: Trained, deform: bool) -> None:
    scene = rugged(trained=trained, deform=deform, background="neural")
    light = Light(VIEWS.position, 0.3, 0.7)
    render = scene.render(VIEWS, 16, normals=True, light=light)
    assert render.normal is not None
    total = render.rgb.square().mean() + render.opacity.mean() + render.normal[:, 2].mean()
    total.backward()
    groups = scene.groups()
    assert list(groups) == ["shape", "encoding", "networks", "background"]
    found = [p for group in groups.values() for p in group]
    assert len({id(p) for p in found}) == len(found)
    assert {id(p) for p in found} == {id(p) for p in scene.parameters() if p.requires_grad}
    assert len(groups["shape"]) == (0 if trained == "colour" else 1 + deform)
    assert bool(groups["encoding"]) == (trained != "shape")
    for name, parameter in scene.named_parameters():
        expected = any(parameter is p for p in found)
        assert (parameter.grad is not None) == expected, name
        assert not expected or (parameter.grad.isfinite().all() and parameter.grad.any()), name


def test_silhouettes_pull_on_the_shape() -> None:
    """Opacity alone, of plain colours: gradient descent on it grows the sphere."""
    scene = Tetrahedral(config(10))
    optimizer = torch.optim.Adam(scene.groups()["shape"], 0.05)
    areas = []
    for _ in range(8):
        optimizer.zero_grad()
        opacity = scene.render(VIEWS, 24).opacity
        (-opacity.mean()).backward()
        optimizer.step()
        areas.append(float(opacity.detach().mean()))
    assert areas[-1] > 1.05 * areas[0]


@pytest.mark.parametrize("background", ["solid", "neural"])
@pytest.mark.parametrize("trained", ["all", "shape", "colour"])
def test_an_empty_surface_shows_the_background_with_gradients_of_zero(
    background: str, trained: str
) -> None:
    scene = rugged(background=background, trained=trained)
    scene.distance.data.fill_(1.0)
    render = scene.render(VIEWS, 10, normals=True, light=Light(VIEWS.position))
    assert render.triangles is not None
    assert len(render.triangles.faces) == 0
    assert not render.opacity.any()
    assert render.normal is not None
    (render.rgb.mean() + render.opacity.mean() + render.normal.sum()).backward()
    for role, group in scene.groups().items():
        for parameter in group:
            if role != "background":
                assert parameter.grad is not None
                assert not parameter.grad.any()
    with torch.no_grad():
        assert scene.render(VIEWS, 10).rgb.shape == (2, 3, 10, 10)
    shell = scene.shell()
    assert len(shell.triangles.faces) == 0
    assert not scene.requires_grad_(False).render(VIEWS, 10).opacity.any()


def test_a_surface_out_of_sight_has_gradients_of_zero() -> None:
    scene = Tetrahedral(config())
    away = orbit_cameras(torch.tensor([0.0]), 0.0)
    away.camera_to_world[:, :3, 3] *= -1  # it looks away from the origin
    render = scene.render(away, 8)
    assert not render.opacity.any()
    (render.rgb.mean() + render.opacity.mean()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in scene.parameters())


def test_nothing_lies_on_the_border() -> None:
    """Even where every distance is negative the surface is closed, and as good as inside the cube."""
    scene = rugged(6)
    scene.distance.data.fill_(-1.0)
    triangles = scene.shell().triangles
    assert_closed(triangles)
    assert 0.5 < triangles.vertices.abs().max() < 0.6 + float(scene.cell) / 4


def test_vertices_of_the_grid_keep_apart_however_far_they_are_pulled() -> None:
    scene = rugged(4)
    scene.offsets.data.copy_(1e3 * torch.randn_like(scene.offsets))
    places = scene.lattice + tetrahedral._REACH * torch.tanh(scene.offsets)
    assert (places - scene.lattice).abs().max() <= 0.25
    triangles = scene.shell().triangles
    assert_closed(triangles)
    assert triangles.vertices.isfinite().all()


def test_parts_of_a_large_render_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, cameras = rugged(), turntable_cameras(5)
    light, plain = Light(cameras.position), torch.rand(5, 3)

    def draw() -> Render:
        return scene.render(cameras, (8, 12), normals=True, light=light, background=plain)

    whole = draw()
    monkeypatch.setattr(drawing, "_PIXELS_AT_ONCE", 200)
    with torch.no_grad():
        parts = draw()
    for name in ("rgb", "opacity", "depth", "normal"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)
    assert parts.triangles is not None
    assert whole.triangles is not None
    assert torch.equal(parts.triangles.vertices, whole.triangles.vertices)


@pytest.mark.parametrize("background", ["solid", "neural"])
def test_a_file_keeps_every_bit(background: str, tmp_path: Path) -> None:
    scene = rugged(background=background, trained="shape", background_colour=(0.1, 0.2, 0.3))
    scene.centre.copy_(torch.tensor([0.1, 0.0, -0.05]))
    scene.cell.fill_(0.07)
    save_scene(scene, tmp_path / "scene.safetensors")
    again = load_scene(tmp_path / "scene.safetensors")
    assert isinstance(again, Tetrahedral)
    assert again.config == scene.config
    assert again.state_dict().keys() == scene.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), scene.buffers(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), scene.parameters(), strict=True)
    )
    assert torch.equal(again.render(VIEWS, 9).rgb, scene.render(VIEWS, 9).rgb)


def test_its_shell_is_what_is_drawn() -> None:
    scene = rugged()
    shell, drawn = scene.shell(), scene.render(VIEWS, 4).triangles
    assert drawn is not None
    assert torch.equal(shell.triangles.vertices, drawn.vertices)
    assert not shell.triangles.vertices.requires_grad
    assert shell.colour(shell.triangles.vertices).shape == shell.triangles.vertices.shape
    assert scene.counts() == {}


@pytest.mark.parametrize(
    "wrong", [{"resolution": 1}, {"radius": 0.0}, {"trained": "none"}, {"rasterizer": "gl"}]
)
def test_wrong_values_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


def test_a_rasterizer_that_cannot_be_used_is_refused_before_the_first_step() -> None:
    Tetrahedral(config(rasterizer="torch")).prepare()
    with pytest.raises(ValueError, match="nvdiffrast"):
        Tetrahedral(config(rasterizer="nvdiffrast")).prepare()


def test_levels_of_the_colours_can_be_added_one_by_one() -> None:
    scene = rugged(encoding=replace(config().encoding, start_level=1, after=5, every=5))
    early, late, done = (scene.render(VIEWS, 8, step=step).rgb for step in (0, 100, None))
    assert torch.equal(late, done)
    assert not torch.equal(early, late)
    assert isinstance(build_scene(scene.config), Tetrahedral)
