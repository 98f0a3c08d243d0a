"""Variational score distillation by the commands, from a text to a resumed run."""

from __future__ import annotations

from pathlib import Path

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


def test_a_model_that_cannot_carry_a_lora_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", 2, "--recipe.guidance.model", "exact")
    assert ended.value.code == 2
    assert "loss='vsd' with model='exact'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
