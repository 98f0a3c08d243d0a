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

import numpy as np
import picardopt_3d.export.pictures
import pytest
import torch
from films import read_film
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.domain import parse_prompt
from picardopt_3d.methods.dreamfusion import DreamFusionConfig
from picardopt_3d.pipeline import run
from picardopt_3d.report import held_out_cameras, psnr, psnr_against_truth
from picardopt_3d.scenes import FieldConfig, RadianceField, load_field
from picardopt_3d.text_to_3d import main
from picardopt_3d.worker import SCENE_FILE, Trained, train
from PIL import Image
from pool import Pools

SMALL = DreamFusionConfig(batch=1, size=16, field=FieldConfig(resolutions=(6, 12), samples=10))
PROMISED = {
    "config.json",
    "contact_sheet.png",
    "report.json",
    "scene.safetensors",
    "strides.png",
    "turntable.mp4",
}
KEYS = {
    "prompt",
    "seed",
    "workers",
    "window",
    "steps",
    "sweeps",
    "mean_stride",
    "drift_evaluations",
    "wasted_evaluations",
    "seconds",
    "startup_seconds",
    "total_seconds",
    "psnr",
    "tolerance",
    "predictor",
    "device",
    "torch",
    "steps_per_sweep",
}


def options(out: Path, **changes: object) -> TextTo3DConfig:
    """A run of the real pipeline on the exact score, small enough for seconds."""
    config = TextTo3DConfig(
        "a red cube", out, steps=12, workers=1, guidance="exact", method=SMALL, picture_every=0
    )
    return replace(config, **changes)


def levels(out: Path) -> list[torch.Tensor]:
    return [level.detach() for level in load_field(out / SCENE_FILE).levels]


def assert_same_bits(first: Path, second: Path) -> None:
    for one, other in zip(levels(first), levels(second), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.fixture
def sequential(tmp_path: Path) -> tuple[Path, Trained]:
    out = tmp_path / "sequential"
    return out, train(options(out, sequential=True), time.time())


def test_tolerance_zero_is_the_sequential_run_bitwise(
    tmp_path: Path, sequential: tuple[Path, Trained]
) -> None:
    trained = train(options(tmp_path / "picard", window=4, tolerance=0.0), time.time())
    assert_same_bits(tmp_path / "picard", sequential[0])
    assert trained.losses == sequential[1].losses
    assert trained.figures["sweeps"] < 12  # a window of 1 in disguise would need 12
    assert max(trained.strides) >= 2
    assert sum(trained.strides) == 12


def test_two_processes_at_tolerance_zero_are_the_sequential_run_bitwise(
    tmp_path: Path, sequential: tuple[Path, Trained], pools: Pools
) -> None:
    config = options(tmp_path / "two", workers=2, window=4, tolerance=0.0)
    trained = pools(2).run(train, config, time.time())
    assert_same_bits(tmp_path / "two", sequential[0])
    assert trained[0].losses == trained[1].losses == sequential[1].losses
    assert trained[0].figures["workers"] == 2
    assert trained[0].figures["sweeps"] < 12


def test_the_seed_makes_the_run(tmp_path: Path, sequential: tuple[Path, Trained]) -> None:
    train(options(tmp_path / "again", sequential=True), time.time())
    train(options(tmp_path / "other", sequential=True, seed=1), time.time())
    assert_same_bits(tmp_path / "again", sequential[0])
    assert not torch.equal(levels(tmp_path / "other")[-1], levels(sequential[0])[-1])


def test_the_run_learns_the_object(tmp_path: Path) -> None:
    # Real learning: several decibels over the blob that it starts from, in the right colour.
    method = replace(SMALL, learning_rate=0.1)
    report = run(options(tmp_path, steps=80, window=4, method=method))
    subject = parse_prompt("a red cube")
    assert subject is not None
    start = psnr_against_truth(RadianceField(SMALL.field), subject, 16)
    assert report["psnr"] > start + 5
    assert report["mean_stride"] > 1
    scene = load_field(tmp_path / SCENE_FILE)
    with torch.no_grad():
        red, green, blue = scene.render(*held_out_cameras(4).rays(16, 16)).rgb[:, :, 8, 8].mean(0)
    assert red > 2 * green
    assert red > 2 * blue


def test_the_command_writes_every_promised_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cube"
    small = ["--method.size", "16", "--method.batch", "1", "--method.field.samples", "8"]
    few = ["--steps", "6", "--workers", "1", "--window", "3", "--picture-every", "3"]
    main(["a red cube", "--out", str(out), "--guidance", "exact", *few, *small])

    assert {path.name for path in out.iterdir() if path.is_file()} == PROMISED
    pictures = sorted((out / "progress").iterdir())
    assert [path.name for path in pictures] == ["step_00003.png", "step_00006.png"]
    for path in [*pictures, out / "contact_sheet.png", out / "strides.png"]:
        assert np.asarray(Image.open(path)).std() > 1
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= KEYS
    assert (report["prompt"], report["steps"], report["window"]) == ("a red cube", 6, 3)
    assert sum(report["steps_per_sweep"]) == 6
    assert report["drift_evaluations"] == 6 + report["wasted_evaluations"]
    assert report["seconds"] + report["startup_seconds"] < report["total_seconds"]
    kept = json.loads((out / "config.json").read_text())
    assert kept["prompt"] == "a red cube"
    assert kept["method"]["field"]["samples"] == 8
    frames = read_film(out / "turntable.mp4")
    assert len(frames) == 120
    assert np.abs(frames[0].astype(int) - frames[30]).mean() > 0.1  # it turns
    said = capfd.readouterr()
    assert "turntable.mp4" in said.out
    assert "steps/sweep=" in said.err


@pytest.mark.slow
def test_the_command_runs_the_shipped_guidance_on_two_workers(tmp_path: Path) -> None:
    out = tmp_path / "cube"
    main(["a red cube", "--out", str(out), "--steps", "8", "--workers", "2"])
    assert {path.name for path in out.iterdir() if path.is_file()} == PROMISED
    report = json.loads((out / "report.json").read_text())
    assert report["workers"] == report["window"] == 2
    assert report["guidance"] == "diffusion"


@pytest.mark.slow
def test_a_prompt_outside_the_world_has_no_psnr(tmp_path: Path) -> None:
    main(["a velvet armadillo", "--out", str(tmp_path), "--steps", "2", "--workers", "1"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["psnr"] is None
    assert "no true views" in report["psnr_note"]


def test_the_exact_guidance_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exact guidance only knows"):
        run(options(tmp_path, prompt="a velvet armadillo"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "steps=0"),
        (["--window", "-1"], "window=-1"),
        (["--workers", "0"], "workers=0"),
        (["--tolerance", "-1"], "tolerance=-1"),
        (["--tolerance", "nan"], "tolerance=nan"),
        (["--sequential", "--workers", "2"], "sequential with workers=2"),
        (["--predictor", "crystal-ball"], "crystal-ball"),
        (["--method.batch", "0"], "batch=0"),
        (["--method.learning-rate", "0"], "learning_rate=0"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["a red cube", "--out", str(tmp_path / "new"), *arguments])
    assert stop.value.code == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in words
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["a red cube", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_interrupted_picture_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ctrl-C in the middle of the second progress picture, after some of its bytes are on disk.
    whole, written = Image.Image.save, []

    def interrupted(image: Image.Image, path: Path, **format_: str) -> None:
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"\x89PNG half")
            raise KeyboardInterrupt
        whole(image, path, **format_)

    monkeypatch.setattr(picardopt_3d.export.pictures.Image.Image, "save", interrupted)
    small = ["--method.size", "16", "--method.batch", "1", "--guidance", "exact"]
    few = ["--workers", "1", "--steps", "4", "--picture-every", "1"]
    with pytest.raises(SystemExit) as stop:
        main(["a red cube", "--out", str(tmp_path), *few, *small])
    assert stop.value.code == 130
    assert "stopped" in capsys.readouterr().err
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["config.json", "step_00001.png"]
    Image.open(tmp_path / "progress" / "step_00001.png").load()


@pytest.mark.slow
def test_ctrl_c_stops_all_workers(tmp_path: Path) -> None:
    """A real SIGINT to the process group, as a terminal sends it."""
    out = tmp_path / "cube"
    small = ["--guidance", "exact", "--method.size", "16", "--method.batch", "1"]
    many = ["--workers", "2", "--steps", "100000", "--picture-every", "5"]
    command = [sys.executable, "-m", "picardopt.cli", "text-to-3d", "a red cube"]
    process = subprocess.Popen([*command, "--out", str(out), *small, *many], start_new_session=True)
    try:
        wait_for(lambda: (out / "progress" / "step_00010.png").exists(), 120)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        wait_for(lambda: not group_alive(process.pid), 30)
    finally:
        if group_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    left = [path for path in out.rglob("*") if path.is_file()]
    assert {path.suffix for path in left} == {".json", ".png"}
    assert not [path for path in left if path.name.startswith(".")]
    for path in left:
        if path.suffix == ".png":
            Image.open(path).load()


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


def test_psnr_is_that_of_its_definition() -> None:
    truth = torch.zeros(2, 3, 4, 4)
    assert psnr(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-4)
    mixed = torch.stack([truth[0] + 0.1, truth[0] + 0.01])
    assert psnr(mixed, truth) == pytest.approx(30.0, abs=1e-3)
