from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picardopt_3d.command import image_to_3d
from picardopt_3d.command import text_to_3d as main
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods import METHODS
from picardopt_3d.methods.dreamfusion import SMALL, DreamFusion
from picardopt_3d.methods.optim import field_rates
from picardopt_3d.run.agreement import agreed
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.pipeline import run
from picardopt_3d.run.prepare import build_problem
from picardopt_3d.run.record import RunRecord
from picardopt_3d.run.worker import train, train_launched
from picardopt_3d.scenes import FieldConfig, RadianceField, load_scene
from picardopt_3d.world import BACKGROUND, parse_prompt
from picardopt_3d.world.yardstick import held_out_cameras, psnr_against_truth
from PIL import Image
from safetensors.torch import load_file

from picardopt import step_rng
from tests.helpers.pool import Pools
from tests.integrations.helpers.films import read_film

TINY = replace(
    SMALL,
    steps=12,
    batch=1,
    pixels=16,
    scene=FieldConfig(resolutions=(6, 12), samples=10, background=BACKGROUND),
    guidance=GuidanceConfig("exact"),
)
TINY_OPTIONS = ["--recipe.pixels", "16", "--recipe.batch", "1", "--recipe.guidance.model", "exact"]
PROMISED = {
    "config.yaml",
    "contact_sheet.png",
    "report.json",
    "strides.png",
    "turntable.mp4",
    "viewer.html",
    "stages/1-stage/checkpoint.pt",
    "stages/1-stage/record.json",
    "stages/1-stage/scene.safetensors",
}
KEYS = {
    "prompt",
    "subject",
    "method",
    "preset",
    "size",
    "steps_done",
    "seed",
    "workers",
    "window",
    "steps",
    "sweeps",
    "mean_stride",
    "drift_evaluations",
    "wasted_evaluations",
    "joined_calls",
    "calls_saved",
    "seconds",
    "startup_seconds",
    "total_seconds",
    "psnr",
    "tolerance",
    "predictor",
    "device",
    "torch",
    "picardopt",
    "steps_per_sweep",
}


def options(out: Path, **changes: object) -> TextTo3DConfig:
    """A run of the real pipeline on the exact score, small enough for seconds."""
    config = TextTo3DConfig(
        prompt="a red cube",
        out=out,
        method="dreamfusion",
        preset="small",
        recipe=TINY,
        workers=1,
        picture_every=0,
    )
    return replace(config, **changes)


def levels(out: Path) -> list[torch.Tensor]:
    return [level.detach() for level in load_scene(RunFolder(out).scene).levels]


def assert_same_bits(first: Path, second: Path) -> None:
    for one, other in zip(levels(first), levels(second), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


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
    assert all(torch.equal(found[name], scene[name]) for name in scene)
    if "sequential" in mode:
        assert (record.figures["window"], record.figures["tolerance"]) == (1, None)
        assert record.sweeps == record.drift_evaluations == len(losses)


def test_tolerance_zero_is_the_sequential_run_bitwise(
    tmp_path: Path, sequential: tuple[Path, RunRecord]
) -> None:
    trained = train(options(tmp_path / "picard", window=4, tolerance=0.0), time.time())
    assert_same_bits(tmp_path / "picard", sequential[0])
    assert trained.losses == sequential[1].losses
    assert len(trained.strides) < 12  # a window of 1 in disguise would need 12
    assert max(trained.strides) >= 2
    assert sum(trained.strides) == 12


def test_two_processes_at_tolerance_zero_are_the_sequential_run_bitwise(
    tmp_path: Path, sequential: tuple[Path, RunRecord], pools: Pools
) -> None:
    config = options(tmp_path / "two", workers=2, window=4, tolerance=0.0)
    trained = pools(2).run(train, config, time.time())
    assert_same_bits(tmp_path / "two", sequential[0])
    assert trained[0].losses == trained[1].losses == sequential[1].losses
    assert trained[0].figures["workers"] == 2
    assert len(trained[0].strides) < 12


def test_the_seed_makes_the_run(tmp_path: Path, sequential: tuple[Path, RunRecord]) -> None:
    train(options(tmp_path / "again", sequential=True), time.time())
    train(options(tmp_path / "other", sequential=True, seed=1), time.time())
    assert_same_bits(tmp_path / "again", sequential[0])
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


def test_the_exact_guidance_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exact guidance covers only"):
        run(options(tmp_path, prompt="a velvet armadillo"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe.steps", "0"], "steps=0"),
        (["--window", "-1"], "window=-1"),
        (["--workers", "0"], "workers=0"),
        (["--tolerance", "-1"], "tolerance=-1"),
        (["--tolerance", "nan"], "tolerance=nan"),
        (["--sequential", "--workers", "2"], "sequential with workers=2"),
        (["--predictor", "crystal-ball"], "crystal-ball"),
        (["--recipe.batch", "0"], "batch=0"),
        (["--recipe.rates.encoding", "0"], "rates.encoding=0"),
        (["--method", "alchemy"], "give one of dreamfusion"),
        (["--preset", "huge"], "give one of small"),
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


def earlier_run(out: Path) -> dict[str, bytes]:
    """A folder with all that a run may write, and one file that is not its own."""
    for own in (*RunFolder(out).own, out / "precious.txt"):
        path = own if own.suffix else own / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"earlier")
    return files(out)


def names(folder: Path) -> set[str]:
    """All files of a folder, as paths in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exists", [False, True])
def test_what_ends_before_the_first_step_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    out, bad = tmp_path / "run", tmp_path / "bad.png"
    bad.write_text("no picture")
    before = earlier_run(out) if exists else {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = ["--out", str(out), "--overwrite", "--workers", "1", *TINY_OPTIONS]
    for command, arguments in (
        (image_to_3d, [str(bad), *few[:-2]]),
        (main, ["a corgi", *few]),
        (main, ["a red cube", *few, "--device", "cuda"]),
    ):
        with pytest.raises(SystemExit) as stop:
            command(arguments)
        assert stop.value.code == 2
        assert files(out) == before
        assert out.exists() == exists

    def fails(self: DreamFusion, step: int) -> dict[str, torch.Tensor]:
        assert files(out) != before
        raise KeyboardInterrupt

    monkeypatch.setattr(DreamFusion, "loss", fails)
    with pytest.raises(KeyboardInterrupt):
        run(options(out, sequential=True, overwrite=True, tensorboard=True))
    assert files(out) == before
    assert out.exists() == exists


def test_overwrite_replaces_all_that_was_the_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_run(tmp_path)
    monkeypatch.setattr("picardopt_3d.run.pipeline.finish", lambda *_: {})
    run(options(tmp_path, overwrite=True, recipe=replace(TINY, steps=1)))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "precious.txt", "stages"}
    assert {path.name for path in (tmp_path / "stages/1-stage").iterdir()} == {
        "checkpoint.pt",
        "record.json",
        "scene.safetensors",
    }


def one_complains(rank: int) -> str:
    try:
        with agreed():
            if torch.distributed.get_rank() == rank:
                raise FileNotFoundError("no model here")
    except FileNotFoundError as error:
        return str(error)
    return "fine"


class OfItsOwn(OSError):
    """An error that cannot be made again from what it says."""

    def __init__(self, message: str, *, response: int) -> None:
        super().__init__(message)
        self.response = response


def one_fails(kind: str, rank: int) -> str:
    errors = {
        "programming": RuntimeError("a bug"),
        "bare": AssertionError(),
        "unsendable": OfItsOwn("no model here", response=404),
    }
    try:
        with agreed():
            if torch.distributed.get_rank() == rank:
                raise errors[kind]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_an_error_that_is_no_user_error_leaves_no_worker_waiting(pools: Pools) -> None:
    found = pools(2).run(one_fails, "programming", 1)
    assert found == ["RuntimeError: worker 1 failed: RuntimeError('a bug')", "RuntimeError: a bug"]
    assert pools(2).run(one_fails, "bare", 0) == [
        "AssertionError: ",
        "RuntimeError: worker 0 failed: AssertionError()",
    ]
    assert pools(2).run(one_fails, "unsendable", 0) == [
        "OfItsOwn: no model here",
        "OSError: no model here",
    ]


def test_workers_complain_together(tmp_path: Path, pools: Pools) -> None:
    found = pools(2).run(
        train_launched, options(tmp_path, workers=2, prompt="a corgi"), time.time(), False
    )
    assert [type(error) for error in found] == [ValueError, ValueError]
    assert pools(2).run(one_complains, 1) == ["no model here"] * 2
    assert pools(2).run(one_complains, 2) == ["fine"] * 2


@pytest.mark.slow
def test_two_workers_say_in_one_line_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["a corgi", "--out", str(tmp_path / "run"), "--workers", "2", *TINY_OPTIONS])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("picardopt text-to-3d: prompt='a corgi'")
    assert not (tmp_path / "run").exists()
