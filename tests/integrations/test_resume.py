"""Runs that are stopped, by Ctrl-C or an error, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import picardopt_3d.export.pictures
import pytest
import torch
from picardopt_3d.command import parse_resume
from picardopt_3d.command import resume as resume_command
from picardopt_3d.command import text_to_3d as main
from picardopt_3d.config import ImageTo3DConfig
from picardopt_3d.config_files import load_config, save_config
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import METHODS
from picardopt_3d.methods.dreamfusion import DreamFusion
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import resume, run
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.world.pictures import write_examples
from PIL import Image
from safetensors.torch import load_file

from picardopt import CheckpointError
from tests.helpers.pool import Pools
from tests.integrations.helpers.films import read_film
from tests.integrations.helpers.stopping import stopped
from tests.integrations.helpers.tiny_runs import (
    PROMISED,
    TINY,
    TINY_OPTIONS,
    assert_same_scenes,
    names,
    options,
)


def record_of(out: Path) -> RunRecord:
    """The record of a run of one stage."""
    (stage,) = RunFolder(out).begun()
    return RunRecord.load(stage)


def run_until(config: Any, at: int, resume: bool = False) -> None:
    """Runs a configuration up to a step."""
    with stopped(DreamFusion, at):
        train(config, time.time(), resume)


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_resumed_run_at_tolerance_zero_is_bitwise_the_run_without_a_stop(
    tmp_path: Path, at: int
) -> None:
    whole = train(options(tmp_path / "whole", sequential=True), time.time())
    config = options(tmp_path / "stopped", window=3, tolerance=0.0)
    run_until(config, at)
    kept = record_of(config.out)
    assert kept.step == at == len(kept.losses)
    again = train(replace(config, window=5), time.time(), resume=True)
    assert_same_scenes(config.out, tmp_path / "whole")
    assert again.losses == whole.losses
    assert again.step == sum(again.strides) == 12


@pytest.mark.parametrize("at", [2, 7])
def test_an_occupancy_grid_and_networks_go_on_bitwise(tmp_path: Path, at: int) -> None:
    recipe = METHODS["text-to-3d"]["textmesh"].presets["small"]
    grid = replace(recipe.scene.occupancy, resolution=8, every=3)
    recipe = replace(
        recipe,
        steps=10,
        batch=1,
        pixels=8,
        scene=replace(recipe.scene, occupancy=grid),
        guidance=GuidanceConfig("exact"),
    )
    plain = options(tmp_path / "whole", method="textmesh", recipe=recipe, sequential=True)
    whole = train(plain, time.time())
    config = replace(plain, out=tmp_path / "stopped", sequential=False, window=3, tolerance=0.0)
    run_until(config, at)
    assert record_of(config.out).step == at
    again = train(replace(config, window=4), time.time(), resume=True)
    assert again.losses == whole.losses
    kept, expected = (load_file(RunFolder(each.out).scene) for each in (config, plain))
    for name, values in expected.items():
        assert torch.equal(kept[name], values), name


def test_a_sequential_run_goes_on_ahead_of_time_and_back(tmp_path: Path) -> None:
    train(options(tmp_path / "whole", sequential=True), time.time())
    config = options(tmp_path / "stopped", sequential=True)
    run_until(config, 4)
    picard = replace(config, sequential=False, window=3, tolerance=0.0)
    run_until(picard, 8, resume=True)
    assert record_of(config.out).step == 8
    train(config, time.time(), resume=True)
    assert_same_scenes(config.out, tmp_path / "whole")


def test_ctrl_c_within_a_sequential_step_counts_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(options(tmp_path / "whole", sequential=True), time.time())
    config = options(tmp_path / "stopped", sequential=True)
    adam, taken = torch.optim.Adam.step, []

    def step(self: torch.optim.Adam, *arguments: Any) -> Any:
        taken.append(adam(self, *arguments))
        if len(taken) == 2:
            signal.raise_signal(signal.SIGINT)
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config, time.time())
    kept = record_of(config.out)
    assert len(taken) == kept.step == len(kept.losses) == 2
    assert train(config, time.time(), resume=True).losses == whole.losses
    assert_same_scenes(config.out, tmp_path / "whole")


def test_two_processes_go_on_with_what_one_began(tmp_path: Path, pools: Pools) -> None:
    train(options(tmp_path / "whole", sequential=True), time.time())
    config = options(tmp_path / "stopped", window=3, tolerance=0.0)
    run_until(config, 6)
    pools(2).run(train, replace(config, workers=2, window=4), time.time(), True)
    assert_same_scenes(config.out, tmp_path / "whole")


def test_resume_makes_every_file_and_counts_what_was_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cube"
    config = options(out, window=2, checkpoint_every=4)
    out.mkdir()
    save_config(config, out / "config.yaml")
    run_until(config, 5)
    resume_command([str(out), "--window", "4"])
    assert names(out) == PROMISED
    report = json.loads((out / "report.json").read_text())
    assert (report["steps"], report["steps_done"], report["window"]) == (12, 12, 4)
    assert len(report["losses"]) == 12
    assert sum(report["steps_per_sweep"]) == 12
    assert report["drift_evaluations"] == 12 + report["wasted_evaluations"]
    assert "5/12" in capfd.readouterr().err.replace("\r", "\n")


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    config = options(tmp_path, window=2)
    first = run(config)
    again = resume(load_config(tmp_path / "config.yaml"))
    assert again["losses"] == first["losses"]
    assert again["psnr"] == first["psnr"]


@pytest.mark.parametrize("before", [["--workers", "2", "--tensorboard"], ["--window=3"], []])
def test_options_may_stand_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    config = options(tmp_path / "run")
    save_config(config, config.out / "config.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2").mkdir()  # a folder, but no run's
    found = parse_resume([*before, "run", "--seed", "4"])
    assert parse_resume(["run", *before, "--seed", "4"]) == found
    assert (found.out, found.seed, found.task.title) == (Path("run"), 4, "a red cube")
    assert found.workers == (2 if "2" in before else config.workers)


def test_resume_keeps_changed_options_once_they_have_proved_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(tmp_path / "run", window=2)
    run_until(config, 3)
    monkeypatch.setattr("picardopt_3d.run.pipeline.finish", lambda *_: {})
    before = (config.out / "config.yaml").read_bytes()
    other = replace(TINY, scene=replace(TINY.scene, resolutions=(6, 10)))
    with pytest.raises(CheckpointError):
        resume(replace(config, recipe=other))
    assert (config.out / "config.yaml").read_bytes() == before
    resume(replace(config, recipe=replace(TINY, steps=5)))
    assert parse_resume([str(config.out)]).recipe.steps == 5


def test_a_run_from_a_picture_goes_on_anywhere_without_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    picture = write_examples(first, 32)[0]
    monkeypatch.setattr("picardopt_3d.run.pipeline.finish", lambda *_: {})
    monkeypatch.setattr(
        "picardopt_3d.run.pipeline._train", lambda config, *_, **__: kept.append(config)
    )
    kept: list[Any] = []
    monkeypatch.chdir(first)
    small = METHODS["image-to-3d"]["zero123"].presets["small"]
    few = {"method": "zero123", "preset": "small", "recipe": small}
    run(ImageTo3DConfig(image=Path(picture.name), out=Path("run"), workers=1, **few))
    save_config(kept[0], first / "run" / "config.yaml")
    assert kept[0].image == picture.absolute()
    picture.unlink()
    monkeypatch.chdir(second)
    found = parse_resume([str(first / "run")])
    assert isinstance(found, ImageTo3DConfig)
    reference = found.task.reference(RunFolder(found.out).input, *found.recipe.cameras.middle)
    assert reference is not None
    assert reference.rgb.std() > 0
    assert found.task.title == picture.name


def test_what_cannot_be_resumed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([str(tmp_path / "absent")], "give the folder of a run"),
        (["--workers", "2", "absent"], "--workers 2 absent: give the folder of a run"),
        ([], "no RUN: give the folder of a run"),
        ([str(tmp_path)], "config.yaml"),
    ):
        with pytest.raises(SystemExit) as stop:
            resume_command(arguments)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    config = options(tmp_path / "run", window=2)
    run(config)
    with pytest.raises(SystemExit):
        resume_command([str(config.out), "a blue cube"])
    assert "goes on with what it was asked for, 'a red cube'" in capsys.readouterr().err
    before = (config.out / "config.yaml").read_bytes()
    for name, other, own in (("method", "textmesh", "dreamfusion"), ("preset", "huge", "small")):
        with pytest.raises(SystemExit) as stop:
            resume_command([str(config.out), f"--{name}", other])
        assert stop.value.code == 2
        assert f"goes on with its own {name}, '{own}'" in capsys.readouterr().err
    assert (config.out / "config.yaml").read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        resume_command([str(config.out), "--recipe.optimizer", "SGD"])
    assert stop.value.code == 2
    assert (
        "betas, capturable, decoupled_weight_decay, eps, which SGD has not"
        in capsys.readouterr().err
    )
    assert (config.out / "config.yaml").read_bytes() == before
    RunFolder(config.out).begun()[0].checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match="start it anew"):
        resume(config)
    run_until(config, 3)
    other = replace(TINY, scene=replace(TINY.scene, resolutions=(6, 10)))
    with pytest.raises(CheckpointError, match="another configuration"):
        train(replace(config, recipe=other), time.time(), resume=True)


def test_an_interrupted_picture_leaves_no_half_file_and_the_run_is_finished_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ctrl-C in the middle of the second progress picture, after some of its bytes are on disk.
    whole, written = Image.Image.save, []

    def interrupted(image: Image.Image, path: Any, *format_: Any, **options: Any) -> None:
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"\x89PNG half")
            raise KeyboardInterrupt
        whole(image, path, *format_, **options)

    monkeypatch.setattr(picardopt_3d.export.pictures.Image.Image, "save", interrupted)
    few = ["--workers", "1", "--recipe.steps", "4", "--picture-every", "1"]
    with pytest.raises(SystemExit) as stop:
        main(["a red cube", "--out", str(tmp_path), *few, *TINY_OPTIONS])
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert "stopped" in said
    assert f"picardopt resume {tmp_path}" in said
    first = "stages/1-stage/progress/step_00001.png"
    assert names(tmp_path) == PROMISED | {first}
    assert json.loads((tmp_path / "report.json").read_text())["steps_done"] == 2
    Image.open(tmp_path / first).load()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_stops_all_workers_and_still_makes_the_film(tmp_path: Path, workers: int) -> None:
    """A real SIGINT to the process group, as a terminal sends it; then the run goes on to its end."""
    out = tmp_path / "cube"
    many = ["--workers", str(workers), "--recipe.steps", "100000", "--picture-every", "5"]
    command = [sys.executable, "-m", "picardopt.cli", "text-to-3d", "a red cube"]
    process = subprocess.Popen(
        [*command, "--out", str(out), *TINY_OPTIONS, *many], start_new_session=True
    )
    try:
        wait_for(lambda: (out / "stages/1-stage/progress/step_00010.png").exists(), 120)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
        wait_for(lambda: not group_alive(process.pid), 30)
    finally:
        if group_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert {name for name in names(out) if "/progress/" not in name} == PROMISED
    assert len(read_film(out / "turntable.mp4")) == 120
    report = json.loads((out / "report.json").read_text())
    done = report["steps_done"]
    assert 10 <= done < 100000
    assert len(report["losses"]) == done
    config = load_config(out / "config.yaml")
    goes_on = replace(config, workers=1, recipe=replace(config.recipe, steps=done + 4))
    assert resume(goes_on)["steps_done"] == done + 4


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
