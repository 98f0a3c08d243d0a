"""Runs of several stages: a folder, a checkpoint and a seed for each; resume goes on in the last one."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from picardopt_3d.command import parse
from picardopt_3d.command import resume as resume_command
from picardopt_3d.command import text_to_3d as main
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config, save_config
from picardopt_3d.methods import METHODS
from picardopt_3d.methods.dreamfusion import DreamFusion
from picardopt_3d.picard import PicardConfig
from picardopt_3d.problem import Losses
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import run
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import load_scene
from picardopt_3d.task import TextTask
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.pool import Pools
from tests.integrations.helpers.tiny_runs import names
from tests.integrations.helpers.two_stages import (
    FIELD,
    RECIPE,
    assert_same,
    method_of_two_stages,
    run_until,
    scene_of,
    two_stages,
    whole_run,
    with_fine,
)


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> str:
    return method_of_two_stages(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TextTo3DConfig:
    return whole_run(tmp_path_factory.mktemp("whole"))


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
    run_until(config, stage, at)
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


def test_options_of_a_later_stage_may_change(tmp_path: Path, whole: TextTo3DConfig) -> None:
    config = two_stages(tmp_path)
    run_until(config, 1, 0)
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


def test_one_line_says_that_the_next_scene_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], pools: Pools
) -> None:
    config = two_stages(tmp_path / "one")
    train(config, time.time())
    said = "making the scene of stage fine (2/2) from that of stage coarse"
    assert capfd.readouterr().err.count(said) == 1


def test_options_reach_every_stage(tmp_path: Path, method: str) -> None:
    def parsed(*options: str) -> Any:
        begin = ["a red cube", "--method", method, "--out", str(tmp_path / "run")]
        return parse("text-to-3d", [*begin, *options], "")

    config = parsed("--recipe.coarse.steps", "7", "--recipe.fine.scene.samples", "9")
    assert (config.recipe.coarse.steps, config.recipe.fine.steps) == (7, 6)
    assert (config.recipe.fine.scene.samples, config.recipe.coarse.scene.samples) == (9, 8)
    assert parsed("--preset", "wide").recipe == with_fine(pixels=10)
    file = tmp_path / "options.yaml"
    file.write_text("recipe: {fine: {sds: {guidance_scale: 3.5}}}\n")
    config = parsed("--config", str(file), "--recipe.coarse.batch", "3")
    assert config.recipe.fine.sds.guidance_scale == 3.5
    assert config.recipe.coarse.batch == 3
    save_config(config, tmp_path / "kept.yaml")
    assert load_config(tmp_path / "kept.yaml") == config


def test_a_run_of_before_there_was_a_second_stage_goes_on_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """An earlier version kept the numbers of the only stage, and its files in a folder without a stage's name."""
    earlier = replace(METHODS["text-to-3d"][method], had_one_stage=True)
    monkeypatch.setitem(METHODS["text-to-3d"], method, earlier)
    one = two_stages(tmp_path / "run", method=method, recipe=RECIPE.coarse)
    run_until(one, 0, 2)
    file = RunFolder(one.out).config
    assert "coarse" not in file.read_text()
    again = load_config(file)
    assert again == one
    record = train(replace(again, window=2), time.time(), resume=True)
    assert (record.step, len(RunFolder(one.out).begun())) == (4, 1)
    new = ["a red cube", "--config", str(file), "--out", str(tmp_path / "new")]
    recipe = parse("text-to-3d", new, "").recipe
    assert (recipe.coarse, recipe.fine) == (RECIPE.coarse, RECIPE.fine)


def test_a_mistake_in_a_later_stages_options_is_named(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    for text, said in (
        ("{fine: {stepz: 3}}", "stepz"),
        ("{fine: {steps: 0}}", "steps=0"),
        ("{stepz: 3}", "stepz: no stage of this method"),
        ("{steps: 3, fine: {steps: 3}}", "steps: no stage of this method"),
        ("{steps: 3}", "give options of a stage under its name, one of coarse, fine"),
    ):
        file.write_text(f"recipe: {text}\n")
        with pytest.raises(SystemExit):
            parse(
                "text-to-3d",
                ["a red cube", "--method", method, "--config", str(file), "--out", "nowhere"],
                "",
            )
        printed = capsys.readouterr().err
        assert said in printed
        assert str(file) in printed


def test_window_and_tolerance_are_those_of_all_stages_unless_one_has_its_own(
    tmp_path: Path,
) -> None:
    own = replace(RECIPE, coarse=replace(RECIPE.coarse, picard=PicardConfig(window=2)))
    report = run(two_stages(tmp_path / "own", window=None, recipe=own))
    assert [stage["window"] for stage in report["stages"]] == [2, 1]
    report = run(two_stages(tmp_path / "all", recipe=own))
    assert [stage["window"] for stage in report["stages"]] == [3, 3]
    assert {stage["tolerance"] for stage in report["stages"]} == {report["tolerance"]}


@pytest.mark.slow
def test_a_run_of_two_stages_by_the_command_is_stopped_and_goes_on(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the second stage: film and report of what there is, and `resume` with other options."""
    main(["a red cube", "--method", method, "--out", str(tmp_path / "whole"), "--workers", "1"])
    whole, printed = RunFolder(tmp_path / "whole"), capsys.readouterr()
    assert "coarse: 4 of 4 steps in" in printed.out
    assert "fine: 6 of 6 steps in" in printed.out
    assert "a red cube, fine (2/2)" in printed.err

    loss, out = DreamFusion.loss, str(tmp_path / "run")

    def stop(self: DreamFusion, step: int) -> Losses:
        if self.config.pixels == 12 and step == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DreamFusion, "loss", stop)
        with pytest.raises(SystemExit) as ended:
            main(["a red cube", "--method", method, "--out", out, "--sequential"])
    assert ended.value.code == 130
    report = json.loads(RunFolder(Path(out)).report.read_text())
    assert [stage["steps_done"] for stage in report["stages"]] == [4, 2]
    assert (report["steps"], report["steps_done"]) == (10, 2 + 4)
    resume_command([out, "--window", "3", "--tolerance", "0"])
    report = json.loads(RunFolder(Path(out)).report.read_text())
    assert [stage["steps_done"] for stage in report["stages"]] == [4, 6]
    assert_same(load_file(RunFolder(Path(out)).scene), load_file(whole.scene))


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


def test_the_report_has_the_figures_of_each_stage(tmp_path: Path) -> None:
    report = run(two_stages(tmp_path, picture_every=2, tensorboard=True))
    coarse, fine = report["stages"]
    assert (coarse["name"], coarse["steps"], coarse["steps_done"], coarse["size"]) == (
        "coarse",
        4,
        4,
        8,
    )
    assert (fine["name"], fine["steps"], fine["steps_done"], fine["size"]) == ("fine", 6, 6, 12)
    for total in ("steps_done", "sweeps", "drift_evaluations", "wasted_evaluations"):
        assert coarse[total] + fine[total] == report[total]
    assert coarse["seconds"] + fine["seconds"] == pytest.approx(report["seconds"])
    assert coarse["mean_stride"] == coarse["steps"] / coarse["sweeps"]
    assert fine["psnr"] == report["psnr"]
    first = load_scene(RunFolder(tmp_path).begun()[0].scene)
    assert coarse["psnr"] == pytest.approx(TextTask("a red cube").yardstick.psnr(first, 12))  # type: ignore[union-attr]
    written = names(tmp_path)
    assert "stages/1-coarse/contact_sheet.png" in written
    assert "stages/2-fine/contact_sheet.png" not in written  # the run's own
    assert {f"stages/2-fine/progress/step_{step:05d}.png" for step in (2, 4, 6)} <= written
    events = EventAccumulator(str(RunFolder(tmp_path).tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == list(range(10))
