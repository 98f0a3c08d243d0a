"""Runs of several stages: a folder, a checkpoint and a seed for each; resume goes on in the last one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods.dreamfusion import DreamFusion
from picardopt_3d.problem import Losses
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import run
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train, train_launched
from picardopt_3d.scenes import FieldConfig
from safetensors.torch import load_file

from tests.helpers.pool import Pools
from tests.integrations.test_pipeline import TINY, names, options
from tests.integrations.test_stages import TwoStages

FIELD = FieldConfig(resolutions=(4, 8), samples=8)
RECIPE = TwoStages(
    coarse=replace(TINY, steps=4, pixels=8, scene=FIELD),
    fine=replace(TINY, steps=6, pixels=12, scene=replace(FIELD, resolutions=(4, 12))),
)


class Stop(Exception):
    """Ends a run from inside a step."""


def two_stages(out: Path, **changes: Any) -> TextTo3DConfig:
    return options(out, **({"recipe": RECIPE, "window": 3, "tolerance": 0.0} | changes))


def stopped(config: TextTo3DConfig, stage: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a configuration whose loss raises at a step of a stage."""
    whole, pixels = DreamFusion.loss, config.recipe.stages()[stage].config.pixels

    def loss(self: DreamFusion, step: int) -> Losses:
        if self.config.pixels == pixels and step >= at:
            raise Stop
        return whole(self, step)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failed speculation warns once
        patch.setattr(DreamFusion, "loss", loss)
        with pytest.raises(Stop):
            train(config, time.time())


def scene_of(config: TextTo3DConfig) -> Mapping[str, torch.Tensor]:
    return load_file(RunFolder(config.out).scene)


def assert_same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TextTo3DConfig:
    config = two_stages(tmp_path_factory.mktemp("whole"), sequential=True, window=None)
    train(config, time.time())
    return config


def test_each_stage_has_its_own_files_and_noise(whole: TextTo3DConfig) -> None:
    folders = RunFolder(whole.out).begun()
    assert [each.path.name for each in folders] == ["1-coarse", "2-fine"]
    coarse, fine = (RunRecord.load(each) for each in folders)
    assert (coarse.step, fine.step) == (4, 6)
    assert RunFolder(whole.out).scene == folders[1].scene
    assert load_file(folders[1].scene)["levels.1"].shape[-1] == 12


@pytest.mark.parametrize(("stage", "at"), [(0, 2), (1, 0), (1, 1), (1, 4)])
def test_resume_goes_on_in_the_last_stage_bitwise(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: TextTo3DConfig,
    stage: int,
    at: int,
) -> None:
    config = two_stages(tmp_path)
    stopped(config, stage, at, monkeypatch)
    begun = [RunRecord.load(each).step for each in RunFolder(tmp_path).begun()]
    assert begun == ([4, at] if stage and at else [4] if stage else [at])
    untouched = RunFolder(tmp_path).stage(0, "coarse").checkpoint
    before = untouched.read_bytes()
    steps, loss = [], DreamFusion.loss

    def noted(self: DreamFusion, step: int) -> Losses:
        steps.append((self.config.pixels, step))
        return loss(self, step)

    monkeypatch.setattr(DreamFusion, "loss", noted)
    train(replace(config, window=2), time.time(), resume=True)
    assert steps[0] == (config.recipe.stages()[stage].config.pixels, at)  # nothing is done again
    assert_same(scene_of(config), scene_of(whole))
    assert (untouched.read_bytes() == before) == bool(stage)


def test_options_of_a_later_stage_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: TextTo3DConfig
) -> None:
    config = two_stages(tmp_path)
    stopped(config, 1, 0, monkeypatch)
    fine = replace(RECIPE.fine, steps=3, scene=replace(FIELD, resolutions=(5, 10)))
    record = train(replace(config, recipe=replace(RECIPE, fine=fine)), time.time(), resume=True)
    assert record.step == 3
    assert scene_of(config)["levels.1"].shape[-1] == 10
    stages = RunFolder(tmp_path).begun()
    assert_same(load_file(stages[0].scene), load_file(RunFolder(whole.out).begun()[0].scene))


def test_two_processes_hand_the_scene_over(
    tmp_path: Path, pools: Pools, whole: TextTo3DConfig
) -> None:
    config = two_stages(tmp_path, workers=2)
    pools(2).run(train, config, time.time())
    assert_same(scene_of(config), scene_of(whole))


def test_what_is_wrong_with_a_later_stage_is_told_in_one_line_by_all(
    tmp_path: Path, pools: Pools
) -> None:
    guidance = GuidanceConfig("stable-diffusion", source=str(tmp_path / "nowhere"))
    recipe = replace(RECIPE, fine=replace(RECIPE.fine, guidance=guidance))
    config = two_stages(tmp_path / "run", workers=2, recipe=recipe)
    errors = pools(2).run(train_launched, config, time.time(), False)
    assert [type(error) for error in errors] == [FileNotFoundError, FileNotFoundError]
    assert "nowhere" in str(errors[1])
    (coarse,) = RunFolder(config.out).begun()
    assert RunRecord.load(coarse).step == 4


def test_reports_need_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr("picardopt_3d.run.checkpoint.load_checkpoint", loaded.append)
    assert len(run(two_stages(tmp_path))["losses"]) == 10
    assert not loaded


def test_the_report_of_a_run_is_of_all_stages(tmp_path: Path) -> None:
    report = run(two_stages(tmp_path))
    assert (report["steps"], report["steps_done"], len(report["losses"])) == (10, 10, 10)
    assert (report["size"], report["window"]) == (12, 3)
    assert sum(report["steps_per_sweep"]) == 10
    assert {"report.json", "turntable.mp4", "stages/2-fine/scene.safetensors"} <= names(tmp_path)
