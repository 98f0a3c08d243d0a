"""DreamGaussian's second stage runs ahead bitwise and resumes, alone and after the first one."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.methods import METHODS, Stage
from picardopt_3d.methods import dreamgaussian_texture as texture_module
from picardopt_3d.methods.dreamgaussian import DreamGaussianConfig
from picardopt_3d.methods.dreamgaussian_recipe import DreamGaussianRecipe
from picardopt_3d.methods.dreamgaussian_texture import (
    DreamGaussianTexture,
    DreamGaussianTextureConfig,
)
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import Gaussians, TexturedMesh, load_scene
from picardopt_3d.tolerances import build_tolerance
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.helpers.recipes import (
    CHAIR,
    COMMANDS,
    ahead,
    save_pipelines,
    sequential,
    shrunk,
    textured,
    tiny,
    tiny_texture,
    wrapped,
)
from tests.integrations.helpers.stopping import stopped


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("hub"))


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
    alone, early = textured(config), textured(config)
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
    stage = textured(config)
    optimizer = wrapped(stage, config.steps, 3, window=3, tolerance=0)
    traced(stage, ahead(stage, optimizer, config.steps))
    assert optimizer.stats.strides == [3, 3]


def on_ranks(config: DreamGaussianTextureConfig) -> list[Any]:
    """The stage's steps with the window of a group of processes."""
    stage = textured(config)
    optimizer = wrapped(stage, config.steps, 3, window=4, tolerance=0)
    return traced(stage, ahead(stage, optimizer, config.steps))


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_have_the_bits_of_one(
    command: str, folders: dict[str, Path], pools: Pools
) -> None:
    config = tiny_texture(command, folders)
    alone = textured(config)
    expected = traced(alone, sequential(alone, config.steps, 3))
    for found in pools(2).run(on_ranks, config):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("at", [2, 3])
def test_the_stage_resumes_bitwise(at: int, folders: dict[str, Path]) -> None:
    """Into a stage on another mesh, whose place the saved one takes."""
    config = tiny_texture("image-to-3d", folders)
    alone, first = textured(config), textured(config)
    expected = traced(alone, sequential(alone, config.steps, 3))
    optimizer = wrapped(first, config.steps, 3, window=4, tolerance=0)
    traced(first, ahead(first, optimizer, at))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    other = textured(replace(config, scene=replace(config.scene, resolution=10)))  # type: ignore[type-var]
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
    stage, picard = textured(config), config.picard
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
