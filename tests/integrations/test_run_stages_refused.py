"""What is wrong with a later stage is told in one line, before the first step or when that stage begins."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config
from picardopt_3d.guidance import DenoiseConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods.dreamfusion import DreamFusion
from picardopt_3d.methods.dreamgaussian_texture import SMALL as TEXTURE
from picardopt_3d.methods.optim import texture_rates
from picardopt_3d.models import WEIGHTS
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.later_stages import check_later_stages
from picardopt_3d.run.pipeline import resume, run
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train, train_launched
from picardopt_3d.scenes import RadianceField, TexturedMeshConfig

from tests.helpers.pool import Pools
from tests.integrations.helpers.recipes import FEW, RATES
from tests.integrations.helpers.tiny_runs import options
from tests.integrations.helpers.two_stages import (
    RECIPE,
    assert_same,
    method_of_two_stages,
    run_until,
    scene_of,
    two_stages,
    whole_run,
    with_fine,
)


def test_a_scene_that_cannot_start_from_a_finished_stage_is_told_in_one_line(
    tmp_path: Path,
) -> None:
    config = two_stages(tmp_path)
    run_until(config, 1, 0)
    coarse = replace(RECIPE.coarse, scene=FEW, rates=RATES, geometric=())
    with pytest.raises(ValueError, match=r"^stage 'fine': a Gaussians cannot be converted"):
        train(replace(config, recipe=replace(RECIPE, coarse=coarse)), time.time(), resume=True)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_run(tmp_path / "whole")
    config = two_stages(tmp_path / "run", method=method_of_two_stages(monkeypatch))
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
