"""The methods on 3D Gaussians by the commands: from a text or a picture to every file, and through Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picardopt_3d.command import image_to_3d, text_to_3d
from picardopt_3d.command import resume as resume_command
from picardopt_3d.evaluate.command import main as evaluate
from picardopt_3d.export.command import main as export
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.worker import train_launched
from picardopt_3d.scenes import Gaussians, TexturedMesh, load_scene
from picardopt_3d.world.pictures import write_examples
from PIL import Image
from plyfile import PlyData
from safetensors.torch import load_file

from picardopt import load_checkpoint
from tests.helpers.pool import Pools
from tests.helpers.runs import assert_same_bits
from tests.integrations.helpers.films import read_film
from tests.integrations.helpers.tiny_runs import KEYS, PROMISED, names
from tests.integrations.test_counts import gaussians
from tests.integrations.test_resume import group_alive, wait_for

FEW = [
    *("--recipe.batch", "1", "--recipe.pixels", "16"),
    *("--recipe.scene.count", "30", "--recipe.scene.opacity", "0.5"),
    *("--recipe.scene.strategy.gradient", "0.3", "--recipe.scene.strategy.most", "80"),
]
"""Views of 16 pixels of a few Gaussians; about half of them are pulled enough to be doubled."""
TWICE = [
    *("--recipe.steps", "8", "--recipe.scene.strategy.start", "3"),
    *("--recipe.scene.strategy.every", "3", "--recipe.scene.strategy.stop", "8"),
]
"""8 steps; Gaussians are added and removed after the third and the sixth."""
EXACT = ["--recipe.guidance.model", "exact"]
MESH = [
    *(
        "--recipe.texture.steps",
        "5",
        "--recipe.texture.batch",
        "1",
        "--recipe.texture.pixels",
        "16",
    ),
    *("--recipe.texture.guidance.model", "exact", "--recipe.texture.scene.texture", "32"),
    *("--recipe.texture.scene.resolution", "16", "--recipe.texture.scene.faces", "200"),
]
"""A second stage of few steps."""


def promised(stage: str) -> set[str]:
    """The files of a run whose only or first stage has a folder of this name."""
    return {name.replace("stages/1-stage", stage) for name in PROMISED}


def of_gaussians(options: Sequence[str]) -> list[str]:
    """Options of a recipe of one stage as those of DreamGaussian's first one."""
    return [option.replace("--recipe.", "--recipe.gaussians.") for option in options]


def picture(folder: Path) -> Path:
    """A chair of the built-in world, cut out."""
    return write_examples(folder, 32)[0]


def make(command: str, method: str, out: Path, *options: str) -> None:
    """Runs a command on a red chair."""
    common = ["--out", str(out), "--method", method, "--device", "cpu"]
    if command == "text-to-3d":
        text_to_3d(["a red chair", *common, *of_gaussians([*FEW, *EXACT, *options]), *MESH])
    else:
        (out.parent / "pictures").mkdir(parents=True)
        chair = picture(out.parent / "pictures")
        known = ["--framed", "--subject", "a red chair", "--recipe.reference-pixels", "16"]
        image_to_3d([str(chair), *known, *common, *FEW, *options])


@pytest.mark.slow  # a film, and models that are loaded
@pytest.mark.usefixtures("whole_film")
@pytest.mark.parametrize(
    ("command", "method"), [("text-to-3d", "dreamgaussian"), ("image-to-3d", "zero123-gaussians")]
)
def test_the_command_makes_every_file_that_the_others_read(
    command: str, method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "chair"
    make(command, method, out, *TWICE, "--workers", "1", "--window", "3", "--picture-every", "4")
    two = command == "text-to-3d"
    first = "stages/1-gaussians" if two else "stages/1-stage"
    progress = {f"{first}/progress/step_0000{step}.png" for step in (4, 8)}
    extra = set() if two else {"input.png"}
    if two:
        mesh = ("checkpoint.pt", "record.json", "scene.safetensors", "progress/step_00004.png")
        extra |= {f"stages/2-texture/{name}" for name in mesh} | {f"{first}/contact_sheet.png"}
    assert names(out) == promised(first) | progress | extra
    for name in (*progress, "contact_sheet.png", "strides.png"):
        assert np.asarray(Image.open(out / name)).std() > 1
    frames = read_film(out / "turntable.mp4")
    assert len(frames) == 120
    assert np.abs(frames[0].astype(int) - frames[30]).mean() > 0.1  # it turns
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= KEYS - {"prompt", "subject"}
    scene = load_scene(out / first / "scene.safetensors")
    assert isinstance(scene, Gaussians)
    steps, counts = zip(*report["counts"]["Gaussians"], strict=True)
    assert steps == (0, 3, 6, 8)
    assert 30 == counts[0] < counts[1] < counts[2] == counts[3] == scene.count
    assert two or report["gaussians"] == scene.count
    assert report["restructured"] == [3, 6]
    said = capfd.readouterr()
    assert f"Gaussians={scene.count}" in said.err

    evaluate([str(out), "--views", "4", "--size", "24", "--prompts", "domain", "--device", "cpu"])
    assert "4 views of each run" in capfd.readouterr().out
    if two:
        assert isinstance(load_scene(RunFolder(out).scene), TexturedMesh)
        assert report["triangles"] > 20
        return
    assert f"{scene.count} Gaussians; " in said.out
    export([str(out), "--format", "ply"])
    assert f"{scene.count} Gaussians" in capfd.readouterr().out
    written = PlyData.read(out / "splats.ply")["vertex"]
    means = scene.means.detach().numpy()
    assert np.array_equal(np.stack([written[axis] for axis in "xyz"], axis=1), means)


def test_a_rasterizer_that_cannot_be_used_ends_all_processes_in_one_line(
    tmp_path: Path, pools: Pools
) -> None:
    """Before the first step, so that a run that is resumed keeps its own options."""
    config = gaussians(tmp_path, workers=2)
    scene = replace(config.recipe.scene, rasterizer="gsplat")
    config = replace(config, recipe=replace(config.recipe, scene=scene))
    errors = pools(2).run(train_launched, config, time.time(), False)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert all('rasterizer="gsplat"' in str(error) for error in errors)
    assert not names(tmp_path)


ALWAYS = [
    *("--recipe.scene.strategy.start", "1", "--recipe.scene.strategy.every", "1"),
    *("--recipe.scene.strategy.stop", "100000", "--recipe.scene.strategy.least-opacity", "0.1"),
    *("--recipe.scene.strategy.reset-every", "7", "--recipe.scene.strategy.reset-opacity", "0.3"),
    *("--recipe.timesteps.low", "0.02", "0.02", "--recipe.timesteps.high", "0.98", "0.98"),
]
"""Gaussians are added and removed after every step. No noise level depends on the number of steps."""


def kept_of(out: Path) -> list[tuple[dict[str, torch.Tensor], object]]:
    """Of each stage the scene with its statistics, and what the optimizer would go on with."""
    kept = []
    for stage in RunFolder(out).begun():
        saved = load_checkpoint(stage.checkpoint)["optimizer"]
        assert isinstance(saved, dict)
        parts = {name: saved[name] for name in ("state", "param_groups")}
        kept.append((load_file(stage.scene), parts))
    assert len(kept) == 2
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_in_a_run_that_always_densifies_loses_nothing(tmp_path: Path, workers: int) -> None:
    """A real SIGINT to the process group; at tolerance 0 the resumed run has the bits of the unbroken one."""
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "picardopt.cli", "text-to-3d", "a red chair"]
    many = ["--recipe.gaussians.steps", "100000", "--workers", str(workers), "--window", "3"]
    given = ["--method", "dreamgaussian", "--device", "cpu", "--picture-every", "0"]
    given += [*of_gaussians([*FEW, *EXACT, *ALWAYS]), *MESH, "--tolerance", "0"]
    process = subprocess.Popen(
        [*command, "--out", str(out), *given, *many, "--checkpoint-every", "5"],
        start_new_session=True,
    )
    try:
        wait_for(lambda: bool(RunFolder(out).begun()), 120)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
        wait_for(lambda: not group_alive(process.pid), 30)
    finally:
        if group_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert names(out) == promised("stages/1-gaussians")
    report = json.loads((out / "report.json").read_text())
    done = report["steps_done"]
    assert len(report["losses"]) == done >= 5
    assert report["restructured"] == list(range(1, done + 1))

    steps = ["--recipe.gaussians.steps", str(done + 6)]
    resume_command([str(out), *steps, "--workers", "1", "--window", "4"])
    text_to_3d(["a red chair", "--out", str(tmp_path / "whole"), *given, *steps, "--sequential"])
    again, whole = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("stopped", "whole")
    )
    assert again["losses"] == whole["losses"]
    assert again["counts"] == whole["counts"]
    assert_same_bits(kept_of(out), kept_of(tmp_path / "whole"))
