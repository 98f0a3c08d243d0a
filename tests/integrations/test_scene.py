from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from picardopt_3d.cameras import random_cameras, turntable_cameras
from picardopt_3d.scenes import (
    Field,
    FieldConfig,
    HashConfig,
    Light,
    NerfConfig,
    NerfField,
    RadianceField,
    Render,
    Scene,
    SdfConfig,
    SdfField,
    load_scene,
    save_scene,
)
from safetensors.torch import save_file

SMALL = FieldConfig(resolutions=(5, 9), samples=8)


def random_field(config: FieldConfig = SMALL, seed: int = 0) -> RadianceField:
    field = RadianceField(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for level in field.levels:
            level.copy_(torch.randn(level.shape, generator=generator))
    return field


def test_a_render_is_finite_in_range_and_shaped() -> None:
    render = random_field().render(turntable_cameras(3), (8, 10), normals=True)
    assert render.rgb.shape == (3, 3, 8, 10)
    assert render.opacity.shape == render.depth.shape == (3, 1, 8, 10)
    assert render.normal is not None
    assert render.normal.shape == (3, 3, 8, 10)
    for image in (render.rgb, render.opacity, render.depth, render.normal):
        assert torch.isfinite(image).all()
    assert 0 <= render.rgb.min() <= render.rgb.max() <= 1
    assert 0 <= render.opacity.min() < 0.01  # corners miss the sphere
    assert 0.5 < render.opacity.max() <= 1
    assert (render.normal.norm(dim=1) <= render.opacity[:, 0] + 1e-5).all()


def test_rays_that_miss_see_exactly_the_background() -> None:
    config = FieldConfig(resolutions=(5,), samples=4, background=(0.25, 0.5, 0.75))
    origins = torch.tensor([2.0, 0.0, 0.0]).expand(1, 2, 2, 3)
    away = torch.tensor([1.0, 0.0, 0.0]).expand(1, 2, 2, 3)  # behind the camera
    render = random_field(config).render_rays(origins, away)
    expected = torch.tensor(config.background)[None, :, None, None].expand(1, 3, 2, 2)
    assert torch.equal(render.rgb, expected)
    assert render.opacity.abs().max() == 0


def test_opacity_is_that_of_the_absorption_law() -> None:
    # One constant density: the optical depth along the axis is density times the sphere's diameter.
    config = FieldConfig(resolutions=(9,), samples=16, radius=0.5)
    field = RadianceField(config)
    density = 1.3
    with torch.no_grad():
        raw = math.log(math.expm1(density))
        field.levels[0][0] = raw - field.blob
    origins = torch.tensor([0.0, 0.0, 2.0]).expand(1, 1, 1, 3)
    down = torch.tensor([0.0, 0.0, -1.0]).expand(1, 1, 1, 3)
    render = field.render_rays(origins, down)
    assert render.opacity.item() == pytest.approx(1 - math.exp(-density * 1.0), rel=1e-4)


def test_normals_of_the_blob_point_outward() -> None:
    field = RadianceField(FieldConfig(resolutions=(17,), samples=32))
    with torch.no_grad():
        field.levels[0][0] = 20.0 * torch.sign(field.blob)  # a hard ball
    cameras = turntable_cameras(2, elevation=0.0)
    render = field.render(cameras, 9, normals=True)
    assert render.normal is not None
    middle = render.normal[:, :, 4, 4]  # [batch, 3], at the pixel that looks at the centre
    towards = torch.nn.functional.normalize(cameras.position, dim=1)
    assert ((middle * towards).sum(1) > 0.9).all()
    assert render.depth[:, 0, 4, 4].tolist() == pytest.approx([1.8 - 0.5] * 2, abs=0.15)
    assert render.orientation_penalty is not None
    share = (render.opacity > 0).float().mean()  # of the rays: those that see something
    assert render.orientation_penalty.item() * share < 1e-3


class Rendering(torch.nn.Module):
    """Calls `render` through `forward`, for `functional_call`."""

    def __init__(self, field: RadianceField, normals: bool) -> None:
        super().__init__()
        self.field, self.normals = field, normals

    def forward(self, origins: torch.Tensor, directions: torch.Tensor) -> Render:
        return self.field.render_rays(origins, directions, normals=self.normals)


@pytest.mark.parametrize("normals", [False, True])
def test_gradients_are_those_of_finite_differences(normals: bool) -> None:
    field = random_field(FieldConfig(resolutions=(3, 4), samples=5)).double()
    rays = tuple(x.double() for x in turntable_cameras(1).rays(4, 4))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator)

    def loss(*levels: torch.Tensor) -> torch.Tensor:
        values = {f"field.levels.{i}": level for i, level in enumerate(levels)}
        render = torch.func.functional_call(Rendering(field, normals), values, rays)
        total = (render.rgb * weights).sum() + render.opacity.sum() + 0.1 * render.depth.sum()
        # The penalty on back-facing normals takes its weights as constants: it has a test of its own.
        return total + (render.normal * weights).sum() if normals else total

    levels = tuple(level.detach().clone().requires_grad_() for level in field.levels)
    assert torch.autograd.gradcheck(loss, levels, eps=1e-6, atol=1e-5, fast_mode=True)


def test_a_render_is_repeated_to_the_bit_and_jitter_follows_the_generator() -> None:
    field = random_field()
    rays = turntable_cameras(2).rays(8, 8)

    def gradients(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        field.zero_grad()
        field.render_rays(*rays, jitter=True, normals=True).rgb.square().sum().backward()
        return [level.grad.clone() for level in field.levels if level.grad is not None]

    first, again, other = gradients(1), gradients(1), gradients(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_field_can_be_kept_and_read_again(tmp_path: Path) -> None:
    field = random_field()
    save_scene(field, tmp_path / "scene.safetensors")
    again = load_scene(tmp_path / "scene.safetensors")
    assert again.config == field.config
    rays = random_cameras(2).rays(8, 8)
    assert torch.equal(field.render_rays(*rays).rgb, again.render_rays(*rays).rgb)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="names no scene"):
        load_scene(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"resolutions": ()}, "resolutions"),
        ({"resolutions": (1,)}, "resolutions"),
        ({"radius": 0.0}, "radius"),
        ({"samples": 0}, "samples"),
    ],
)
def test_sizes_that_cannot_be_rendered_are_refused_by_name(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FieldConfig(**options)


HASH = HashConfig(levels=3, base=3, scale=1.7, log2_size=6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NerfField(NerfConfig(encoding=HASH, width=8, samples=16)),
        lambda: SdfField(SdfConfig(encoding=HASH, width=8, samples=16, normal_step=0.01)),
    ],
)
def test_many_points_are_looked_at_in_parts_that_are_computed_again(
    make: Callable[[], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same picture and gradients, and what is kept for the backward pass is a fraction."""
    rays = turntable_cameras(2).rays(16, 16)

    def run() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        torch.manual_seed(0)
        scene, kept = make().double(), dict[int, int]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            render = scene.render_rays(
                *(x.double() for x in rays), normals=True, normal_smoothness=True
            )
            assert render.orientation_penalty is not None
            assert render.normal_smoothness is not None
            loss = render.rgb.square().sum() + render.orientation_penalty + render.normal_smoothness
        loss.backward()
        gradients = [p.grad for p in scene.parameters() if p.grad is not None]
        return render.rgb, gradients, sum(kept.values())

    whole, gradients, memory = run()
    monkeypatch.setattr("picardopt_3d.scenes.field._POINTS_AT_ONCE", 100)
    parts, again, less = run()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(again, gradients)
    assert less < memory / 3


@pytest.mark.parametrize("kind", ["voxels", "sdf"])
def test_pictures_are_rendered_some_rays_at_a_time_with_the_same_result(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    scene: Field = random_field()
    if kind == "sdf":
        encoding = HashConfig(levels=2, log2_size=8, base=4)
        scene = SdfField(SdfConfig(encoding, 8, radius=0.55, samples=8, surface_radius=0.4))
        scene.prepare()
    cameras = turntable_cameras(3)
    options = {
        "normals": True,
        "background": torch.rand(3, 3),
        "light": Light(torch.randn(3, 3), ambient=0.4),
    }
    whole = scene.render(cameras, (10, 12), **options)
    monkeypatch.setattr("picardopt_3d.scenes.field._RAYS_AT_ONCE", 3 * 12)  # strips of 3 rows
    asked: list[int] = []
    query = scene.query
    monkeypatch.setattr(
        scene, "query", lambda points, *a: asked.append(len(points)) or query(points, *a)
    )
    with torch.no_grad():
        strips = scene.render(cameras, (10, 12), **options)
    assert len(asked) == 3 * 4
    monkeypatch.setattr("picardopt_3d.scenes.field._RAYS_AT_ONCE", 2 * 120)  # two views, then one
    with torch.no_grad():
        pairs = scene.render(cameras, (10, 12), **options)
    assert len(asked) == 3 * 4 + 2
    for found in (strips, pairs):
        for name, value in vars(whole).items():
            torch.testing.assert_close(getattr(found, name), value, msg=name)
    with torch.no_grad():  # what is drawn at random is drawn at once
        torch.manual_seed(1)
        drawn = scene.render(cameras, 12, jitter=True).rgb
    torch.manual_seed(1)
    torch.testing.assert_close(scene.render(cameras, 12, jitter=True).rgb, drawn)
