"""Runs of several stages: a folder, a checkpoint and a seed for each; resume goes on in the last one."""

from __future__ import annotations

import json
import signal
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.command import parse
from picardopt_3d.command import resume as resume_command
from picardopt_3d.command import text_to_3d as main
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config, save_config
from picardopt_3d.guidance import DenoiseConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import METHODS, Method
from picardopt_3d.methods.dreamfusion import DreamFusion
from picardopt_3d.methods.dreamgaussian_texture import SMALL as TEXTURE
from picardopt_3d.methods.optim import texture_rates
from picardopt_3d.models import WEIGHTS
from picardopt_3d.picard import PicardConfig
from picardopt_3d.problem import Losses
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.later_stages import check_later_stages
from picardopt_3d.run.pipeline import resume, run
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train, train_launched
from picardopt_3d.scenes import FieldConfig, RadianceField, TexturedMeshConfig, load_scene
from picardopt_3d.task import TextTask
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.pool import Pools
from tests.integrations.helpers.recipes import FEW, RATES
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


def with_fine(**changes: Any) -> TwoStages:
    return replace(RECIPE, fine=replace(RECIPE.fine, **changes))


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> str:
    """A method of two stages."""
    presets = {"small": RECIPE, "wide": with_fine(pixels=10)}
    monkeypatch.setitem(METHODS["text-to-3d"], "both", Method(TwoStages, presets))
    return "both"


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


def test_a_scene_that_cannot_start_from_a_finished_stage_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_stages(tmp_path)
    stopped(config, 1, 0, monkeypatch)
    coarse = replace(RECIPE.coarse, scene=FEW, rates=RATES, geometric=())
    with pytest.raises(ValueError, match=r"^stage 'fine': a Gaussians cannot be converted"):
        train(replace(config, recipe=replace(RECIPE, coarse=coarse)), time.time(), resume=True)


def test_two_processes_hand_the_scene_over(
    tmp_path: Path, pools: Pools, whole: TextTo3DConfig
) -> None:
    config = two_stages(tmp_path, workers=2)
    pools(2).run(train, config, time.time())
    assert_same(scene_of(config), scene_of(whole))


# -- what is wrong with a later stage --------------------------------------------------------------------


def test_a_missing_model_of_a_later_stage_is_told_by_all_before_the_first_step(
    tmp_path: Path, pools: Pools
) -> None:
    guidance = GuidanceConfig("stable-diffusion", source=str(tmp_path / "nowhere"))
    config = two_stages(tmp_path / "run", workers=2, recipe=with_fine(guidance=guidance))
    errors = pools(2).run(train_launched, config, time.time(), False)
    assert [type(error) for error in errors] == [FileNotFoundError, FileNotFoundError]
    assert all(str(error).startswith("stage 'fine': source=") for error in errors)
    assert "nowhere" in str(errors[1])
    with pytest.raises(FileNotFoundError, match=r"^stage 'fine': source=.*nowhere"):
        run(replace(config, workers=1))
    assert not config.out.exists()


def test_a_model_of_another_kind_in_a_later_stage_is_told_before_the_first_step(
    tmp_path: Path,
) -> None:
    guidance = GuidanceConfig("stable-diffusion", source=str(WEIGHTS / "text-to-view"))
    with pytest.raises(ValueError, match=r"^stage 'fine': source=.*load it with PixelDiffusion"):
        run(two_stages(tmp_path / "run", recipe=with_fine(guidance=guidance)))
    assert not (tmp_path / "run").exists()


def test_scenes_that_do_not_convert_are_told_before_the_first_step(tmp_path: Path) -> None:
    recipe = replace(RECIPE, coarse=replace(RECIPE.coarse, scene=FEW, rates=RATES, geometric=()))
    said = "^stage 'fine': a Gaussians cannot be converted to a RadianceField"
    with pytest.raises(ValueError, match=said):
        run(two_stages(tmp_path / "run", recipe=recipe))
    assert not (tmp_path / "run").exists()


TEXTURED = TexturedMeshConfig(resolution=8, faces=20, texture=16, view_pixels=16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"scene": replace(TEXTURED, trained="all"), "rates": texture_rates(0.1, 0.1)},
            "",
        ),
        (
            {"scene": replace(TEXTURED, trained="all"), "rates": {"texture": 0.1}},
            "rates=.*give a rate for the scene's offsets too",
        ),
        (
            {"scene": TEXTURED, "rates": {"texture": 0.1, "networks": 0.1}},
            "rates.networks: the scene has no such parameters; it has texture, offsets",
        ),
        (
            {"scene": replace(TEXTURED, rasterizer="nvdiffrast"), "rates": {"texture": 0.1}},
            'rasterizer="nvdiffrast": .*; give rasterizer="torch"',
        ),
        (
            {"scene": replace(FEW, rasterizer="gsplat"), "rates": RATES},
            'rasterizer="gsplat": .*; give rasterizer="torch"',
        ),
        (
            {
                "guidance": GuidanceConfig("exact", loss="denoise"),
                "denoise": DenoiseConfig(steps=5000),
            },
            r"denoise\.steps=5000: the model has 1000 noise levels",
        ),
        (
            {"guidance": GuidanceConfig(loss="denoise"), "denoise": DenoiseConfig(steps=5000)},
            r"denoise\.steps=5000: the model has 1000 noise levels",
        ),
    ],
)
def test_options_that_a_later_stage_cannot_use_are_told_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No weights are loaded, and nothing is trained, to find that out.
    monkeypatch.setattr(DreamFusion, "loss", not_called)
    monkeypatch.setattr("picardopt_3d.guidance.choose.load_score", not_called)
    recipe = replace(
        RECIPE, fine=replace(TEXTURE if "scene" in changes else RECIPE.fine, **changes)
    )
    config = two_stages(tmp_path / "run", recipe=recipe)
    if not said:
        check_later_stages(config, 0)
        return
    with pytest.raises(ValueError, match=f"^stage 'fine': {said}"):
        run(config)
    assert not config.out.exists()


def not_called(*_: object, **__: object) -> Any:
    raise AssertionError("called too early")


def test_a_programming_error_in_a_check_or_a_conversion_is_not_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> Any:
        raise TypeError("unsupported operand")

    with monkeypatch.context() as patch:
        patch.setattr("picardopt_3d.run.later_stages.check_source", wrong)
        with pytest.raises(TypeError, match=r"^unsupported operand$"):
            train(two_stages(tmp_path / "check"), time.time())
    monkeypatch.setattr(RadianceField, "from_scene", classmethod(wrong))
    with pytest.raises(TypeError, match=r"^unsupported operand") as caught:
        train(two_stages(tmp_path / "run"), time.time())
    (note,) = caught.value.__notes__
    assert f"picardopt resume {tmp_path / 'run'}" in note


def test_a_full_device_in_a_later_stage_is_a_user_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(cls: Any, config: Any, other: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(RadianceField, "from_scene", classmethod(full))
    out = tmp_path / "a run"
    with pytest.raises(ValueError) as caught:
        train(two_stages(out), time.time())
    said = str(caught.value)
    assert said.startswith("stage 'fine' cannot begin: CUDA out of memory. Tried to allocate 2.00")
    assert "--recipe.fine.pixels" in said
    assert f"picardopt resume '{out}'" in said  # as a shell takes it
    assert "\n" not in said


def test_a_full_device_in_the_first_stage_is_a_user_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RadianceField) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(RadianceField, "prepare", full)
    with pytest.raises(ValueError, match=r"^CUDA out of memory\. .*--recipe\.coarse\.pixels"):
        run(two_stages(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    one = options(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^CUDA out of memory\. .*--recipe\.pixels"):
        run(one)


def refuse(cls: Any, config: Any, other: Any) -> Any:
    raise ValueError("there is nothing in it")


def refused(config: TextTo3DConfig) -> Exception | None:
    """`train_launched` with a conversion that fails on rank 1 alone."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(RadianceField, "from_scene", classmethod(refuse))
        return train_launched(config, time.time(), False)


def test_a_conversion_that_fails_keeps_the_stage_before_and_the_run_goes_on(
    tmp_path: Path, whole: TextTo3DConfig, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_stages(tmp_path / "run", method=method)
    with monkeypatch.context() as patch:
        patch.setattr(RadianceField, "from_scene", classmethod(refuse))
        with pytest.raises(ValueError) as caught:
            run(config)
    said = str(caught.value)
    assert said.startswith("stage 'fine' cannot begin: there is nothing in it. Stage 'coarse' is")
    assert f"picardopt resume {config.out}" in said
    assert f"picardopt export {config.out}" in said
    assert "\n" not in said
    (coarse,) = RunFolder(config.out).begun()
    assert RunRecord.load(coarse).step == 4
    assert RunFolder(config.out).scene == coarse.scene  # what export takes
    # What is there has its report, sheet and film.
    report = json.loads(RunFolder(config.out).report.read_text())
    assert [each["name"] for each in report["stages"]] == ["coarse"]
    assert (report["steps"], report["steps_done"]) == (10, 4)
    assert RunFolder(config.out).sheet.is_file()
    assert RunFolder(config.out).film.is_file()
    # Once.
    first = RunFolder(config.out).report.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(RadianceField, "from_scene", classmethod(refuse))
        with pytest.raises(ValueError, match="there is nothing in it"):
            resume(config)
    assert RunFolder(config.out).report.stat().st_mtime_ns == first
    resume(load_config(RunFolder(config.out).config))
    assert_same(scene_of(config), scene_of(whole))


def test_a_conversion_that_fails_on_one_worker_is_told_by_all(tmp_path: Path, pools: Pools) -> None:
    errors = pools(2).run(refused, two_stages(tmp_path, workers=2))
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert all("there is nothing in it" in str(error) for error in errors)


def different(config: TextTo3DConfig, shape: bool) -> Exception | None:
    """`train_launched` with a scene that is another one on rank 1."""
    convert = RadianceField.from_scene.__func__

    def changed(cls: Any, config: Any, other: Any) -> Any:
        scene = convert(cls, config, other)
        scene.blob = scene.blob[1:] if shape else scene.blob + 1e-7
        return scene

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(RadianceField, "from_scene", classmethod(changed))
        return train_launched(config, time.time(), False)


@pytest.mark.parametrize("shape", [False, True])
def test_workers_that_have_made_different_scenes_say_so(
    tmp_path: Path, pools: Pools, shape: bool
) -> None:
    """What is not trained is not sent: a mesh's faces, a grid's cells."""
    errors = pools(2).run(different, two_stages(tmp_path, workers=2), shape)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert str(errors[0]) == str(errors[1])
    said = (
        "stage 'fine' cannot begin: the workers have made different scenes, which differ in blob:"
    )
    assert str(errors[0]).startswith(said)


def test_one_line_says_that_the_next_scene_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], pools: Pools
) -> None:
    config = two_stages(tmp_path / "one")
    train(config, time.time())
    said = "making the scene of stage fine (2/2) from that of stage coarse"
    assert capfd.readouterr().err.count(said) == 1


# -- command line and files ------------------------------------------------------------------------------


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
    stopped(one, 0, 2, monkeypatch)
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
