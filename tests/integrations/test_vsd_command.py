"""Variational score distillation by the commands, from a text to a resumed run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.command import parse, resume, text_to_3d
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.worker import train
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


def trained(out: Path, steps: int, *options: str, goes_on: bool = False) -> dict[str, Any]:
    """The checkpoint of a run in which each process trains a LoRA of its own, which learns fast; without a film."""
    arguments = ["a blue chair", "--out", str(out), "--recipe.steps", str(steps), *SMALL]
    config = parse("text-to-3d", [*arguments, *PAPER_LORA, *options, "--overwrite"], "")
    config.out.mkdir(exist_ok=True)
    train(config, time.time(), resume=goes_on)
    return load_checkpoint(RunFolder(out).begun()[0].checkpoint)


@pytest.mark.slow
def test_a_sequential_run_with_the_papers_lora_is_what_it_is_and_resumes_bitwise(
    tmp_path: Path,
) -> None:
    whole = trained(tmp_path / "whole", 4, "--sequential")
    trained(tmp_path / "stopped", 2, "--sequential")
    again = trained(tmp_path / "stopped", 4, "--sequential", goes_on=True)
    assert "caution" not in whole["trained"]["figures"]
    assert whole["guidance"].keys() == {"lora", "optimizer"}
    for name, value in whole["guidance"]["lora"].items():
        assert torch.equal(value, again["guidance"]["lora"][name])
    for name, value in whole["scene"].items():
        assert torch.equal(value, again["scene"][name])


def test_what_runs_ahead_with_the_papers_lora_says_in_its_record_that_it_is_inexact(
    tmp_path: Path,
) -> None:
    for tolerance, most in (("1", 3), ("0", 4)):  # 0 promises what this LoRA breaks
        state = trained(tmp_path / tolerance, 4, "--window", "3", "--tolerance", tolerance)
        record = state["trained"]
        assert record["sweeps"] <= most
        assert record["figures"]["guidance_loss"] == "vsd"
        assert "is the sequential run at no tolerance" in record["figures"]["caution"]


@pytest.mark.slow  # it makes two films
def test_a_run_with_the_papers_lora_says_at_its_start_that_it_is_inexact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 1, *PAPER_LORA, *EXACT)
    report = json.loads(RunFolder(tmp_path).report.read_text())
    note = f"note: {report['caution']}\n"
    assert note in capsys.readouterr().err
    resume([str(tmp_path), "--recipe.steps", "2"])
    assert note in capsys.readouterr().err


def test_a_model_that_cannot_carry_a_lora_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", 2, "--recipe.guidance.model", "exact")
    assert ended.value.code == 2
    assert "loss='vsd' with model='exact'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
