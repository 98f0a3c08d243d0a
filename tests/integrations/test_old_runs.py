"""Folders that an earlier version wrote (commit b2399d9): they are resumed, evaluated and exported as they are.

`text` was stopped after 5 of 12 steps, at tolerance 0; `sequential` likewise, by the plain loop of that version;
`image` is finished. Films and pictures were left out.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picardopt_3d.command import parse_resume
from picardopt_3d.command import resume as resume_command
from picardopt_3d.config_files import load_config
from picardopt_3d.evaluate.command import main as evaluate
from picardopt_3d.export.command import main as export
from picardopt_3d.picard import PicardOptions
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import resume
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train
from picardopt_3d.tolerances import AdaptiveTol, FixedTol, StepRelativeTol
from safetensors.torch import load_file

from picardopt import load_checkpoint

OLD = Path(__file__).with_name("old_runs")


def copied(name: str, target: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(OLD / name, target / name))


def losses_in(folder: Path) -> list[float]:
    kept: list[float] = load_checkpoint(folder / "checkpoint.pt")["trained"]["losses"]
    return kept


def test_tolerances_in_old_configurations_mean_what_they_meant(tmp_path: Path) -> None:
    text, image = (load_config(OLD / name / "config.yaml") for name in ("text", "image"))
    own = AdaptiveTol(2e-6, 0.8, "median")
    assert (text.tolerance, text.recipe.picard.tolerance) == (FixedTol(0.0), own)
    assert image.tolerance == StepRelativeTol()
    # "adaptive" took the recipe's numbers, whether or not the recipe's own rule was "adaptive".
    (tmp_path / "other.yaml").write_text(
        (OLD / "sequential" / "config.yaml").read_text().replace("rule: adaptive", "rule: default")
    )
    other = load_config(tmp_path / "other.yaml")
    assert (other.tolerance, other.recipe.picard.tolerance) == (own, None)
    options = PicardOptions(text.recipe.picard, tolerance=AdaptiveTol())
    kept = "AdaptiveTolerance(2e-06, decay=0.8, 'median')"
    assert repr(options.arguments()["tolerance"]) == kept


@pytest.mark.parametrize("name", ["text", "sequential"])
def test_an_old_run_is_gone_on_with_where_it_lies(tmp_path: Path, name: str) -> None:
    first = losses_in(OLD / name)
    scenes = []
    for window in (1, 3):
        out = copied(name, tmp_path / str(window))
        config = replace(
            parse_resume([str(out)]), window=window, tolerance=FixedTol(0.0), sequential=False
        )
        record = train(config, 0.0, resume=True)
        assert (record.step, record.losses[:5]) == (12, first)
        assert len(record.losses) == 12
        assert not (out / "stages").exists()
        scenes.append(load_file(out / "scene.safetensors"))
    before = load_file(OLD / name / "scene.safetensors")
    assert all(torch.equal(scenes[0][key], scenes[1][key]) for key in scenes[0])
    assert not all(torch.equal(scenes[0][key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["text", "image"])
def test_a_run_anew_has_the_numbers_of_the_earlier_version(tmp_path: Path, name: str) -> None:
    config = replace(load_config(OLD / name / "config.yaml"), out=tmp_path)
    if name == "image":
        shutil.copy(OLD / name / "input.png", tmp_path)
    kept = losses_in(OLD / name)
    # Not bits: another machine's libraries round otherwise.
    assert train(config, 0.0).losses[: len(kept)] == pytest.approx(kept, rel=1e-3)


def test_the_resume_command_makes_all_files_of_an_old_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = copied("text", tmp_path)
    resume_command([str(out), "--recipe.steps", "7", "--window", "2"])
    assert "7 steps in" in capfd.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert (report["steps_done"], report["subject"]) == (7, "a red cube")
    for made in ("contact_sheet.png", "turntable.mp4", "strides.png", "record.json"):
        assert (out / made).is_file()
    (stage,) = RunFolder(out).begun()
    assert RunRecord.load(stage).step == 7


def test_an_old_finished_run_resumes_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("picardopt_3d.run.pipeline.finish", lambda *_: {})
    out = copied("image", tmp_path)
    scene = load_file(out / "scene.safetensors")
    resume(parse_resume([str(out)]))
    again = load_file(out / "scene.safetensors")
    assert all(torch.equal(scene[key], again[key]) for key in scene)
    assert losses_in(out) == losses_in(OLD / "image")


def test_old_runs_are_evaluated_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(copied(name, tmp_path)) for name in ("text", "image")]
    evaluate([*runs, "--views", "4", "--size", "24", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in printed.splitlines()[2:4]] == runs
    assert "dB" in printed.splitlines()[3]  # the picture's subject is known
    export([runs[0], "--resolution", "24", "--level=-4", "--device", "cpu"])
    assert (tmp_path / "text" / "mesh.glb").stat().st_size > 1000
