from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from picardopt_3d.cameras import random_cameras
from picardopt_3d.scenes import (
    FieldConfig,
    HashConfig,
    NerfConfig,
    NerfField,
    OccupancyConfig,
    RadianceField,
    SceneConfig,
    SdfConfig,
    SdfField,
    build_scene,
    load_scene,
    save_scene,
)
from safetensors.torch import save_file

ENCODING = HashConfig(levels=2, base=3, scale=2.0, log2_size=6, start_level=1)
CONFIGS: dict[str, SceneConfig] = {
    "voxels": FieldConfig(resolutions=(3, 5), samples=6, background=(0.1, 0.2, 0.3)),
    "nerf": NerfConfig(
        ENCODING, 8, radius=0.55, samples=6, occupancy=OccupancyConfig(resolution=4)
    ),
    "nerf-plain": NerfConfig(ENCODING, 8, 2, 0.55, 6, background="solid", occupancy=None),
    "sdf": SdfConfig(
        ENCODING, 8, radius=0.55, samples=6, learn_deviation=False, normals="analytic"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_scene_can_be_kept_and_read_again(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    torch.manual_seed(0)
    scene = build_scene(config)
    assert type(scene) is {"v": RadianceField, "n": NerfField, "s": SdfField}[name[0]]
    with torch.no_grad():
        for parameter in scene.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if scene.occupancy is not None:
            scene.occupancy.values.copy_(torch.rand_like(scene.occupancy.values) - 0.3)
    save_scene(scene, tmp_path / "scene.safetensors")
    again = load_scene(tmp_path / "scene.safetensors")
    assert type(again) is type(scene)
    assert again.config == config
    assert again.state_dict().keys() == scene.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(scene.parameters(), again.parameters(), strict=True)
    )
    rays = random_cameras(2).rays(6, 6)
    assert torch.equal(scene.render_rays(*rays).rgb, again.render_rays(*rays).rgb)
    points = torch.rand(7, 3) - 0.5
    assert torch.equal(scene.level_set(points), again.level_set(points))
    assert torch.equal(scene.colour(points), again.colour(points))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_scene_takes_what_a_recipe_may_ask_for(name: str) -> None:
    scene = build_scene(CONFIGS[name])
    rays = random_cameras(2).rays(5, 5)
    backdrop = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0]])
    render = scene.render_rays(*rays, background=backdrop, step=3)
    assert torch.allclose(
        render.rgb[:, :, 0, 0], backdrop, atol=0.15
    )  # corners see next to nothing
    assert (
        render.normal
        is render.orientation_penalty
        is render.normal_smoothness
        is render.eikonal
        is None
    )
    assert sum(map(len, scene.groups().values())) == len(
        [p for p in scene.parameters() if p.requires_grad]
    )
    assert (scene.level_set(torch.tensor([[0.6, 0.0, 0.0]])) < 0).all()
    assert scene.colour(torch.zeros(4, 3)).shape == (4, 3)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: its header names no scene"):
        load_scene(path)
    path.write_text("no tensors at all")
    with pytest.raises(ValueError, match=r"other\.safetensors: not safetensors"):
        load_scene(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "splats"}, "kind 'splats'"),
        ({"config": {"samples": 5, "magic": 1}}, "FieldConfig has no magic"),
    ],
)
def test_scenes_of_another_version_are_refused_by_name(
    change: dict, said: str, tmp_path: Path
) -> None:
    config = FieldConfig(resolutions=(3,))
    header = {"kind": "voxels", "config": asdict(config)} | change
    path = tmp_path / "scene.safetensors"
    save_file(RadianceField(config).state_dict(), path, {"scene": json.dumps(header)})
    with pytest.raises(ValueError, match=said):
        load_scene(path)


def test_a_configuration_of_no_scene_is_refused() -> None:
    @dataclass(frozen=True)
    class OtherConfig:
        size: int = 1

    with pytest.raises(TypeError, match=r"OtherConfig: give one of FieldConfig"):
        build_scene(OtherConfig())
