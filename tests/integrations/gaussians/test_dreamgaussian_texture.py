"""DreamGaussian's second stage: its losses, that windows run ahead bitwise, and both stages as one run."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from picardopt_3d.cameras import Cameras, orbit_cameras, random_cameras
from picardopt_3d.command import parse
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.guidance import DenoiseConfig, TimestepSchedule
from picardopt_3d.methods import METHODS, Stage
from picardopt_3d.methods import dreamgaussian_texture as texture_module
from picardopt_3d.methods.dreamgaussian import DreamGaussianConfig
from picardopt_3d.methods.dreamgaussian_recipe import DreamGaussianRecipe
from picardopt_3d.methods.dreamgaussian_texture import (
    DreamGaussianTexture,
    DreamGaussianTextureConfig,
    TextureWeights,
    facing,
)
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import Gaussians, Scene, TexturedMesh, load_scene
from picardopt_3d.tolerances import build_tolerance
from picardopt_3d.world.pictures import true_reference
from picardopt_3d.world.yardstick import psnr_against_truth
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.helpers.recipes import (
    CHAIR,
    ahead,
    ball,
    build,
    save_pipelines,
    sequential,
    shrunk,
    tiny,
    tiny_texture,
    wrapped,
)
from tests.integrations.helpers.stopping import stopped

COMMANDS = ["text-to-3d", "image-to-3d"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("hub"))


def stage_of(config: DreamGaussianTextureConfig, previous: Scene | None = None) -> Stage:
    """The stage on a mesh of the ball, or of another scene."""
    return build(config, previous=previous or ball())


# -- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_loss_is_the_weighted_sum_of_its_terms(
    command: str, step: int, folders: dict[str, Path]
) -> None:
    """Views are drawn larger by a random factor; from a picture, what faces it is compared with it."""
    config = tiny_texture(command, folders)
    stage = stage_of(config)
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
        stage = stage_of(replace(config, supersampling=factors))
        sizes.clear()
        for step in range(24):
            torch.manual_seed(step)
            stage.loss(step % 6)
        assert set(sizes) == found, factors


def test_only_what_faces_the_camera_is_compared_with_the_picture(folders: dict[str, Path]) -> None:
    """On a sphere, a disc whose radius is the sine of the largest angle."""
    scene = stage_of(tiny_texture("text-to-3d", folders)).scene
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
    stage = stage_of(replace(config, scene=replace(config.scene, trained=trained)))  # type: ignore[type-var]
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
    stage = stage_of(config)
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


# -- looking ahead -------------------------------------------------------------------------------------------


def state_of(stage: Stage) -> Any:
    """A copy of everything that is compared."""
    (base,) = stage.optimizers()
    return copy.deepcopy((dict(stage.scene.state_dict()), base.state_dict()))


def traced(stage: Stage, steps: Any) -> list[Any]:
    """Losses, parameters and the optimizer's state after each step."""
    return [(float(losses.total.detach()), state_of(stage)) for losses in steps]


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("command", COMMANDS)
def test_at_tolerance_0_the_stage_is_bitwise_the_sequential_one(
    command: str, window: int, folders: dict[str, Path]
) -> None:
    """Texture and offsets, over a change of batch and sizes, with rates that fall."""
    config = tiny_texture(command, folders)
    alone, early = stage_of(config), stage_of(config)
    expected = traced(alone, sequential(alone, config.steps, 3))
    optimizer = wrapped(early, config.steps, 3, window=window, tolerance=0)
    found = traced(early, ahead(early, optimizer, config.steps))
    assert_same_bits(found, expected)
    assert optimizer.stats.drift_evaluations > config.steps  # it did run ahead


def test_guesses_that_are_right_are_used(folders: dict[str, Path]) -> None:
    """With rates that move no number, windows are accepted whole."""
    config = replace(
        tiny_texture("text-to-3d", folders), rates={"texture": 1e-50, "offsets": 1e-50}
    )
    stage = stage_of(config)
    optimizer = wrapped(stage, config.steps, 3, window=3, tolerance=0)
    traced(stage, ahead(stage, optimizer, config.steps))
    assert optimizer.stats.strides == [3, 3]


def on_ranks(config: DreamGaussianTextureConfig) -> list[Any]:
    """The stage's steps with the window of a group of processes."""
    stage = stage_of(config)
    optimizer = wrapped(stage, config.steps, 3, window=4, tolerance=0)
    return traced(stage, ahead(stage, optimizer, config.steps))


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_have_the_bits_of_one(
    command: str, folders: dict[str, Path], pools: Pools
) -> None:
    config = tiny_texture(command, folders)
    alone = stage_of(config)
    expected = traced(alone, sequential(alone, config.steps, 3))
    for found in pools(2).run(on_ranks, config):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("at", [2, 3])
def test_the_stage_resumes_bitwise(at: int, folders: dict[str, Path]) -> None:
    """Into a stage on another mesh, whose place the saved one takes."""
    config = tiny_texture("image-to-3d", folders)
    alone, first = stage_of(config), stage_of(config)
    expected = traced(alone, sequential(alone, config.steps, 3))
    optimizer = wrapped(first, config.steps, 3, window=4, tolerance=0)
    traced(first, ahead(first, optimizer, at))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    other = stage_of(replace(config, scene=replace(config.scene, resolution=10)))  # type: ignore[type-var]
    assert other.counts() != first.counts()
    other.load_state_dict(saved[0])
    again = wrapped(other, config.steps, 3, window=3, tolerance=0)
    again.load_state_dict(saved[1])
    assert_same_bits(traced(other, ahead(other, again, config.steps - at)), expected[at:])


# -- both stages ---------------------------------------------------------------------------------------------


def both(out: Path, folders: dict[str, Path], **changes: Any) -> TextTo3DConfig:
    """A run of both stages at tolerance 0, few numbers each."""
    first = tiny("text-to-3d", "dreamgaussian", folders)
    assert isinstance(first, DreamGaussianConfig)
    scene = replace(first.scene, count=40, opacity=0.6)  # type: ignore[type-var]
    recipe = DreamGaussianRecipe(
        gaussians=replace(first, steps=5, scene=scene),
        texture=tiny_texture("text-to-3d", folders),
    )
    given: dict[str, Any] = {
        "prompt": CHAIR.caption,
        "out": out,
        "method": "dreamgaussian",
        "preset": "small",
        "recipe": recipe,
        "workers": 1,
        "picture_every": 0,
        "window": 3,
        "tolerance": 0.0,
        "device": "cpu",
    }
    return TextTo3DConfig(**given | changes)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]
) -> Mapping[str, Tensor]:
    """The last scene of the sequential run."""
    config = both(tmp_path_factory.mktemp("whole"), folders, sequential=True, window=None)
    train(config, time.time())
    begun = RunFolder(config.out).begun()
    assert [each.path.name for each in begun] == ["1-gaussians", "2-texture"]
    assert isinstance(load_scene(begun[0].scene), Gaussians)
    mesh = load_scene(begun[1].scene)
    assert isinstance(mesh, TexturedMesh)
    assert len(mesh.faces) > 10
    return load_file(begun[1].scene)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_run_resumes_between_the_stages_and_in_the_second_bitwise(
    at: int,
    tmp_path: Path,
    whole: Mapping[str, Tensor],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With another window; the first stage is not done again."""
    config = both(tmp_path, folders)
    with stopped(DreamGaussianTexture, at):
        train(config, time.time())
    done = [RunRecord.load(each).step for each in RunFolder(tmp_path).begun()]
    assert done == ([5, at] if at else [5])
    monkeypatch.setattr("picardopt_3d.methods.dreamgaussian.DreamGaussian.loss", None)
    train(replace(config, window=2), time.time(), resume=True)
    assert_same_bits(load_file(RunFolder(tmp_path).scene), whole)


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


# -- published settings --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_published_settings_run_two_sweeps_on_the_real_pipelines(
    command: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 7 through random models of the real classes, with 20 denoising steps a view."""
    (_, published) = METHODS[command]["dreamgaussian"].presets["paper"].stages()[1]
    config: Any = shrunk(published, folders)
    counts: list[int] = []
    real = texture_module.facing
    monkeypatch.setattr(texture_module, "facing", lambda *given: counts.append(1) or real(*given))
    stage, picard = stage_of(config), config.picard
    predicted: list[int] = []
    score: Any = stage.guidance.score  # type: ignore[attr-defined]
    noise = score.predict_noise
    score.predict_noise = lambda *given: predicted.append(len(given[0])) or noise(*given)
    before = copy.deepcopy(stage.scene.state_dict())
    rule = build_tolerance(picard.tolerance)
    optimizer = wrapped(
        stage, config.steps, 0, window=picard.window, predictor=picard.predictor, tolerance=rule
    )
    for losses in ahead(stage, optimizer, config.steps):
        assert losses.total.isfinite()
        if optimizer.stats.sweeps == 2:
            break
    assert optimizer.stats.sweeps == 2
    assert optimizer.window == 7
    assert len(predicted) >= 20 * 14
    assert bool(counts) == (command == "image-to-3d")
    after = stage.scene.state_dict()
    assert not torch.equal(before["texture"], after["texture"])
    assert torch.equal(before["offsets"], after["offsets"])
