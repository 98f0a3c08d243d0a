"""Variational score distillation by the commands, from a text to a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.command import resume, text_to_3d
from picardopt_3d.run.folder import RunFolder
from safetensors.torch import load_file

from picardopt import load_checkpoint

SMALL = [
    *("--preset", "small-nerf", "--recipe.guidance.loss", "vsd", "--recipe.batch", "1"),
    *("--recipe.pixels", "16", "--recipe.scene.samples", "8", "--picture-every", "0"),
    *("--workers", "1", "--device", "cpu"),
]
PAPER_LORA = ["--recipe.vsd.lora", "paper", "--recipe.vsd.learning-rate", "0.1"]
EXACT = ["--window", "3", "--tolerance", "0"]


def run(out: Path, steps: int, *options: str) -> None:
    text_to_3d(["a blue chair", "--out", str(out), "--recipe.steps", str(steps), *SMALL, *options])


@pytest.mark.slow  # it makes two films
def test_a_run_with_vsd_resumes_bitwise(tmp_path: Path) -> None:
    run(tmp_path / "whole", 5, "--sequential")
    run(tmp_path / "stopped", 2, *EXACT)
    resume([str(tmp_path / "stopped"), "--recipe.steps", "5"])
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    scene, again = (load_file(RunFolder(each).scene) for each in (whole, stopped))
    assert scene.keys() == again.keys()
    assert all(torch.equal(scene[name], again[name]) for name in scene)
    lora, learnt = (
        load_checkpoint(RunFolder(each).begun()[0].checkpoint)["guidance"]["lora"]
        for each in (whole, stopped)
    )
    assert lora.keys() == learnt.keys()
    assert all(torch.equal(lora[name], learnt[name]) for name in lora)
    seconds = [value for name, value in lora.items() if "lora_B" in name]
    assert all(value.abs().max() > 0 for value in seconds)  # they start at zero


def run_paper(out: Path, *options: str) -> dict[str, Any]:
    """A run in which each process trains a LoRA of its own, which learns fast."""
    run(out, 4, *PAPER_LORA, *options)
    report: dict[str, Any] = json.loads(RunFolder(out).report.read_text())
    return report


@pytest.mark.slow  # it makes films
def test_the_papers_lora_runs_ahead_and_is_said_to_be_inexact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_paper(tmp_path / "ahead", "--window", "3", "--tolerance", "1")
    assert report["sweeps"] < 4
    assert report["guidance_loss"] == "vsd"
    assert "is the sequential run at no tolerance" in report["caution"]
    assert f"note: {report['caution']}\n" in capsys.readouterr().err
    exact = run_paper(tmp_path / "exact", *EXACT)  # a tolerance that promises what this LoRA breaks
    assert f"note: {exact['caution']}\n" in capsys.readouterr().err
    resume([str(tmp_path / "exact"), "--recipe.steps", "5"])
    assert f"note: {exact['caution']}\n" in capsys.readouterr().err


@pytest.mark.slow  # it makes films
def test_a_sequential_run_with_the_papers_lora_is_what_it_is_and_resumes_bitwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    report = run_paper(whole, "--sequential")
    run(stopped, 2, *PAPER_LORA, "--sequential")
    resume([str(stopped), "--recipe.steps", "4"])
    assert "caution" not in report
    assert "note:" not in capsys.readouterr().err
    kept, again = (
        load_checkpoint(RunFolder(each).begun()[0].checkpoint) for each in (whole, stopped)
    )
    assert kept["guidance"].keys() == {"lora", "optimizer"}
    for name, value in kept["guidance"]["lora"].items():
        assert torch.equal(value, again["guidance"]["lora"][name])
    scene, resumed = (load_file(RunFolder(each).scene) for each in (whole, stopped))
    assert all(torch.equal(scene[name], resumed[name]) for name in scene)


def test_a_model_that_cannot_carry_a_lora_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", 2, "--recipe.guidance.model", "exact")
    assert ended.value.code == 2
    assert "loss='vsd' with model='exact'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
