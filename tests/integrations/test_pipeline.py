"""Runs are the plain loop bitwise, learn the object, and write every promised file."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picardopt_3d.command import text_to_3d as main
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import METHODS
from picardopt_3d.methods.dreamfusion import DreamFusion
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import run
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import RadianceField, load_scene
from picardopt_3d.world import parse_prompt
from picardopt_3d.world.yardstick import held_out_cameras, psnr_against_truth
from PIL import Image
from safetensors.torch import load_file

from picardopt import step_rng
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.helpers.films import read_film
from tests.integrations.helpers.tiny_runs import (
    KEYS,
    PROMISED,
    TINY,
    TINY_OPTIONS,
    assert_same_scenes,
    levels,
    names,
    options,
)


@pytest.fixture
def sequential(tmp_path: Path) -> tuple[Path, RunRecord]:
    out = tmp_path / "sequential"
    return out, train(options(out, sequential=True), time.time())


def plain_loop(config: TextTo3DConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The oracle: what sequential means, without picardopt's optimizer. Losses, and the scene's tensors."""
    device = torch.device("cpu")
    stage = build_problem(config.recipe, config.task, Path("none"), device, config.seed)
    (base,), carry, losses = stage.optimizers(), stage.carry(), []
    scheduler = stage.lr_scheduler()
    for step in range(config.recipe.steps):
        with step_rng(config.seed, step):
            base.zero_grad()
            found = stage.loss(step)
            found.total.backward()
            base.step()
            if carry is not None and carry.update is not None:
                carry.update(found)
        if scheduler is not None:
            scheduler.step()
        losses.append(float(found.total.detach()))
    return losses, dict(stage.scene.state_dict())


@pytest.mark.parametrize("kind", ["voxels", "moving rates", "textmesh"])  # with an occupancy grid
@pytest.mark.parametrize("mode", [{"sequential": True}, {"window": 4, "tolerance": 0.0}])
def test_a_run_is_the_plain_loop_bitwise(tmp_path: Path, kind: str, mode: dict[str, Any]) -> None:
    recipe = TINY
    if kind == "moving rates":
        recipe = replace(TINY, rates=field_rates(encoding=((0, 0.01), (10, 0.2))))
    if kind == "textmesh":
        small = METHODS["text-to-3d"]["textmesh"].presets["small"]
        grid = replace(small.scene.occupancy, resolution=8, every=3)
        small = replace(small, scene=replace(small.scene, occupancy=grid))
        recipe = replace(small, steps=8, batch=1, pixels=8, guidance=GuidanceConfig("exact"))
    config = options(tmp_path, recipe=recipe, **mode)
    record = train(config, time.time())
    losses, scene = plain_loop(config)
    assert record.losses == losses
    found = load_file(RunFolder(tmp_path).scene)
    assert found.keys() == scene.keys()
    assert_same_bits([found[name] for name in scene], list(scene.values()))
    if "sequential" in mode:
        assert (record.figures["window"], record.figures["tolerance"]) == (1, None)
        assert record.sweeps == record.drift_evaluations == len(losses)
    elif kind == "voxels":
        assert len(record.strides) < 12  # a window of 1 in disguise would need 12
        assert max(record.strides) >= 2
        assert sum(record.strides) == 12


def test_two_processes_at_tolerance_zero_are_the_sequential_run_bitwise(
    tmp_path: Path, sequential: tuple[Path, RunRecord], pools: Pools
) -> None:
    config = options(tmp_path / "two", workers=2, window=4, tolerance=0.0)
    trained = pools(2).run(train, config, time.time())
    assert_same_scenes(tmp_path / "two", sequential[0])
    assert trained[0].losses == trained[1].losses == sequential[1].losses
    assert trained[0].figures["workers"] == 2
    assert len(trained[0].strides) < 12


def test_the_seed_makes_the_run(tmp_path: Path, sequential: tuple[Path, RunRecord]) -> None:
    train(options(tmp_path / "again", sequential=True), time.time())
    train(options(tmp_path / "other", sequential=True, seed=1), time.time())
    assert_same_scenes(tmp_path / "again", sequential[0])
    assert not torch.equal(levels(tmp_path / "other")[-1], levels(sequential[0])[-1])


def test_the_run_learns_the_object(tmp_path: Path) -> None:
    # Real learning: several decibels over the blob that it starts from, in the right colour.
    recipe = replace(TINY, steps=80, rates=field_rates(encoding=0.1))
    report = run(options(tmp_path, window=4, recipe=recipe))
    subject = parse_prompt("a red cube")
    assert subject is not None
    start = psnr_against_truth(RadianceField(TINY.scene), subject, 16)
    assert report["psnr"] > start + 5
    assert report["mean_stride"] > 1
    scene = load_scene(RunFolder(tmp_path).scene)
    with torch.no_grad():
        red, green, blue = scene.render(held_out_cameras(4), 16).rgb[:, :, 8, 8].mean(0)
    assert red > 2 * green
    assert red > 2 * blue


@pytest.mark.usefixtures("whole_film")
def test_the_command_writes_every_promised_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cube"
    few = ["--recipe.steps", "6", "--workers", "1", "--window", "3", "--picture-every", "3"]
    main(["a red cube", "--out", str(out), *few, *TINY_OPTIONS, "--recipe.scene.samples", "8"])

    assert names(out) == PROMISED | {
        "stages/1-stage/progress/step_00003.png",
        "stages/1-stage/progress/step_00006.png",
    }
    pictures = sorted((out / "stages/1-stage/progress").iterdir())
    for path in [*pictures, out / "contact_sheet.png", out / "strides.png"]:
        assert np.asarray(Image.open(path)).std() > 1
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= KEYS
    assert (report["prompt"], report["steps"], report["window"]) == ("a red cube", 6, 3)
    assert sum(report["steps_per_sweep"]) == 6
    assert report["drift_evaluations"] == 6 + report["wasted_evaluations"]
    assert report["seconds"] + report["startup_seconds"] < report["total_seconds"]
    kept = load_config(out / "config.yaml")
    assert kept.prompt == "a red cube"
    assert kept.recipe.scene.samples == 8
    frames = read_film(out / "turntable.mp4")
    assert len(frames) == 120
    assert np.abs(frames[0].astype(int) - frames[30]).mean() > 0.1  # it turns
    said = capfd.readouterr()
    assert "turntable.mp4" in said.out
    assert "steps/sweep=" in said.err


def test_tensorboard_has_every_step_and_the_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = options(tmp_path, window=3, tensorboard=True, picture_every=6)
    trained = train(config, time.time())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/sds")] == list(range(12))
    losses = [event.value for event in events.Scalars("loss/loss")]
    assert losses == pytest.approx(trained.losses)
    assert events.Scalars("picard/stride")[-1].value == trained.strides[-1]
    assert [event.step for event in events.Images("scene")] == [5, 11]


def test_a_full_memory_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DreamFusion, step: int) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DreamFusion, "loss", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"recipe\.batch, recipe\.pixels"):
        train(options(tmp_path, sequential=True), time.time())


@pytest.mark.slow
def test_the_command_runs_the_shipped_guidance_on_two_workers(tmp_path: Path) -> None:
    out = tmp_path / "cube"
    main(["a red cube", "--out", str(out), "--recipe.steps", "8", "--workers", "2"])
    assert names(out) == PROMISED
    report = json.loads((out / "report.json").read_text())
    assert report["workers"] == report["window"] == 2
    assert report["guidance"] == "pixel-diffusion"


@pytest.mark.slow
def test_a_prompt_outside_the_world_has_no_psnr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="reads 16 tokens"):
        main(
            ["a velvet armadillo", "--out", str(tmp_path), "--recipe.steps", "2", "--workers", "1"]
        )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        "'a velvet armadillo' is nothing that the model that ships knows" in capsys.readouterr().err
    )
    assert not {"psnr", "psnr_note", "subject"} & report.keys()
