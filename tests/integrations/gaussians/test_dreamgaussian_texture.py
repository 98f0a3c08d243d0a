"""DreamGaussian's second stage: its losses and options."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import Cameras, orbit_cameras, random_cameras
from picardopt_3d.command import parse
from picardopt_3d.guidance import DenoiseConfig, TimestepSchedule
from picardopt_3d.methods import METHODS
from picardopt_3d.methods.dreamgaussian_texture import TextureWeights, facing
from picardopt_3d.scenes import TexturedMesh
from picardopt_3d.world.pictures import true_reference
from picardopt_3d.world.yardstick import psnr_against_truth
from torch import Tensor

from tests.integrations.helpers.recipes import (
    CHAIR,
    COMMANDS,
    save_pipelines,
    sequential,
    textured,
    tiny_texture,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_loss_is_the_weighted_sum_of_its_terms(
    command: str, step: int, folders: dict[str, Path]
) -> None:
    """Views are drawn larger by a random factor; from a picture, what faces it is compared with it."""
    config = tiny_texture(command, folders)
    stage = textured(config)
    torch.manual_seed(step)
    found = stage.loss(step)

    torch.manual_seed(step)
    batch, size, large = (2, 6, 8) if step < 3 else (3, 8, 10)
    cameras = random_cameras(batch, config.cameras)
    white = torch.ones(batch, 3)

    def drawn(cameras: Cameras, size: int, normals: bool = False) -> Any:
        factor = max(1.0, 2.0 * torch.rand(()).item())
        more = -(-size * factor // 8) * 8
        return stage.scene.render(
            cameras, int(more), normals=normals, background=white[: len(cameras)]
        )

    views = smaller(drawn(cameras, size).rgb, size)
    levels = config.timesteps.at(step, config.steps)
    expected = sds = stage.guidance(views, stage.prompt, cameras, levels)
    names = {"sds"}
    if command == "image-to-3d":
        camera = orbit_cameras(20.0, 30.0)
        front = drawn(camera, large, normals=True)
        rgb = true_reference(CHAIR, camera, 32).at(large)[0]
        normal = F.normalize(smaller(front.normal, large), dim=1)
        towards = camera.position[0] / camera.position[0].norm()
        seen = (normal * towards[:, None, None]).sum(1) > 0.8
        seen &= smaller(front.opacity, large)[:, 0] > 0
        assert 5 < seen.sum() < 0.9 * (smaller(front.opacity, large) > 0).sum()
        difference = ((smaller(front.rgb, large)[0] - rgb) * seen).square().mean()
        expected = sds + 3.0 * difference
        names = {"sds", "rgb"}
    torch.testing.assert_close(found.total, expected)
    assert found.terms.keys() == names
    found.total.backward()
    for name, parameter in stage.scene.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def smaller(pictures: Tensor, size: int) -> Tensor:
    return F.interpolate(
        pictures, (size, size), mode="bilinear", align_corners=False, antialias=True
    )


def test_views_are_drawn_at_their_size_unless_they_are_supersampled(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random factor is uniform up to the largest, and no less than the smallest."""
    sizes: list[int] = []
    real = TexturedMesh.render

    def render(self: TexturedMesh, cameras: Cameras, size: Any, **options: Any) -> Any:
        sizes.append(size)
        return real(self, cameras, size, **options)

    monkeypatch.setattr(TexturedMesh, "render", render)
    config = replace(tiny_texture("text-to-3d", folders), batch=1, pixels=20)
    expected = {(1.0, 1.0): {20}, (2.0, 2.0): {40}, (0.25, 2.0): {8, 16, 24, 32, 40}}
    for factors, found in expected.items():
        stage = textured(replace(config, supersampling=factors))
        sizes.clear()
        for step in range(24):
            torch.manual_seed(step)
            stage.loss(step % 6)
        assert set(sizes) == found, factors


def test_only_what_faces_the_camera_is_compared_with_the_picture(folders: dict[str, Path]) -> None:
    """On a sphere, a disc whose radius is the sine of the largest angle."""
    scene = textured(tiny_texture("text-to-3d", folders)).scene
    camera = orbit_cameras(0.0, 0.0, distance=50.0, fov=1.2)
    render = scene.render(camera, 64, normals=True)
    covered = (render.opacity > 0.5).float().sum()
    for least, share in ((-1.0, 1.0), (0.5, 0.75), (0.8, 0.36)):
        mask = facing(render, camera, least)
        assert mask.shape == (1, 1, 64, 64)
        assert ((mask == 0) | (mask == 1)).all()
        assert float(mask.sum() / covered) == pytest.approx(share, abs=0.12)
    with pytest.raises(ValueError, match="normals=True"):
        facing(scene.render(camera, 8), camera, 0.5)


@pytest.mark.parametrize("trained", ["colour", "shape", "all"])
def test_what_is_not_trained_stays(trained: Any, folders: dict[str, Path]) -> None:
    config = tiny_texture("image-to-3d", folders)
    stage = textured(replace(config, scene=replace(config.scene, trained=trained)))  # type: ignore[type-var]
    before = copy.deepcopy(stage.scene.state_dict())
    for _ in sequential(stage, 2, 0):
        pass
    moved = {
        name
        for name, value in stage.scene.state_dict().items()
        if not torch.equal(value, before[name])
    }
    wanted = {"colour": {"texture"}, "shape": {"offsets"}, "all": {"texture", "offsets"}}
    assert moved == wanted[trained]


def test_the_published_noise_level_stays(folders: dict[str, Path]) -> None:
    """DreamPropeller's strength of 0.6 leaves out 30 of 50 steps."""
    for command in COMMANDS:
        (_, config) = METHODS[command]["dreamgaussian"].presets["paper"].stages()[1]
        assert {config.timesteps.at(step, 50) for step in range(50)} == {(0.4, 0.4)}
        assert config.denoise.steps == 50
        assert config.guidance.loss == "denoise"


def test_with_the_closed_form_score_the_texture_becomes_the_true_one(
    folders: dict[str, Path],
) -> None:
    """A grey ball, guided towards a red chair, comes nearer to it in shape and colour."""
    config = replace(
        tiny_texture("text-to-3d", folders),
        steps=30,
        batch=2,
        pixels=24,
        supersampling=(1.0, 1.0),
        timesteps=TimestepSchedule(low=(0.6, 0.3), high=(0.6, 0.3)),
        denoise=DenoiseConfig(guidance_scale=1.0, steps=10),
    )
    stage = textured(config)
    before = psnr_against_truth(stage.scene, CHAIR, 24)
    for _ in sequential(stage, config.steps, 0):
        pass
    assert psnr_against_truth(stage.scene, CHAIR, 24) > before + 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facing": 1.5}, r"facing=1\.5: give a cosine, from -1 to 1"),
        ({"supersampling": (0.0, 1.0)}, r"supersampling=\(0\.0, 1\.0\): give two positive"),
        ({"supersampling": (2.0, 1.0)}, r"supersampling=.*the smaller one first"),
        ({"reference_pixels": 0}, "reference_pixels=0: give a whole number"),
    ],
)
def test_options_are_checked(
    options: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny_texture("text-to-3d", folders), **options)


def test_a_weight_for_the_mask_is_unknown() -> None:
    with pytest.raises(TypeError, match="mask"):
        TextureWeights(mask=1.0)  # type: ignore[call-arg]


def test_the_command_has_options_for_both_stages(tmp_path: Path) -> None:
    said = ["a red cube", "--method", "dreamgaussian", "--out", str(tmp_path)]
    said += ["--recipe.gaussians.steps", "7", "--recipe.texture.denoise.guidance-scale", "4"]
    said += ["--recipe.texture.scene.trained", "colour", "--recipe.texture.weights.rgb", "0.5"]
    recipe = parse("text-to-3d", said, "").recipe
    assert recipe.gaussians.steps == 7
    assert recipe.texture.denoise.guidance_scale == 4
    assert recipe.texture.scene.trained == "colour"
    assert recipe.texture.weights.rgb == 0.5
    assert recipe.texture.guidance == replace(recipe.gaussians.guidance, loss="denoise")
