"""Figures of finished runs: known answers, and what is said where there is none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.devices import pick_device
from picardopt_3d.evaluate.clip import ClipJudge
from picardopt_3d.evaluate.figures import Figures, group
from picardopt_3d.evaluate.frechet import (
    frechet_distance,
    statistics_of,
)
from picardopt_3d.evaluate.judging import judge_runs
from picardopt_3d.evaluate.prompts import gather_prompts, read_prompts
from picardopt_3d.evaluate.protocol import Protocol
from picardopt_3d.evaluate.table import text_table, write_csv
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.finished import open_scene, read_run, scene_file
from picardopt_3d.scenes import save_scene
from picardopt_3d.world import COLOURS, SHAPES, Subject, all_subjects, true_views
from picardopt_3d.world.statistics import world_statistics
from picardopt_3d.world.yardstick import Yardstick, psnr, ssim
from torchmetrics.functional.image import structural_similarity_index_measure

from tests.integrations.helpers.analytic import Balls, voxels

CAPTIONS = [subject.caption for subject in all_subjects()]
REPORT = {
    "prompt": "a red cube",
    "subject": "a red cube",
    "method": "dreamfusion",
    "preset": "small",
    "seed": 3,
    "size": 32,
    "steps": 300,
    "steps_done": 297,
    "sweeps": 100,
    "mean_stride": 3.0,
    "drift_evaluations": 420,
    "seconds": 12.5,
    "startup_seconds": 2.25,
}


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge()


def save_run(folder: Path, shown: Subject, /, **changes: object) -> Path:
    """The folder of a run that found its object."""
    folder.mkdir(parents=True)
    save_scene(voxels(SHAPES[shown.shape], COLOURS[shown.colour]), folder / "scene.safetensors")
    told = {"prompt": shown.caption, "subject": shown.caption} | changes
    (folder / "report.json").write_text(json.dumps(REPORT | told))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    subjects = [Subject("cube", "red"), Subject("sphere", "blue"), Subject("torus", "green")]
    return [
        save_run(place / subject.shape, subject, seconds=10.0 * (index + 1))
        for index, subject in enumerate(subjects)
    ]


# Pictures.


def test_views_are_those_of_the_closed_form_however_they_are_cut_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, cameras = Balls(), orbit_cameras(12.0, torch.tensor([0.0, 90.0, 200.0]))
    whole = scene.render(cameras, 16, background=torch.ones(3, 3)).rgb
    told: list[int] = []
    assert torch.equal(render_rgb(scene, cameras, 16, (1.0,) * 3, told.append), whole)
    assert sum(told) == 3
    monkeypatch.setattr("picardopt_3d.rendering.PIXELS_AT_ONCE", 512)
    assert torch.equal(render_rgb(scene, cameras, 16, (1.0,) * 3), whole)
    own = render_rgb(scene, cameras, 16)
    assert own[:, :, 0, 0].max() == 0  # the scene's own background
    assert torch.equal(own[:, :, 8, 8], whole[:, :, 8, 8])


def test_psnr_and_ssim_have_their_known_values() -> None:
    truth = true_views(Subject("chair", "blue"), turntable_cameras(3, 12.0), 32)
    assert psnr(truth, truth) == 100.0
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-9)
    assert psnr(truth.clamp(0, 0.9) + 0.1, truth.clamp(0, 0.9)) == pytest.approx(20.0, abs=1e-4)
    half, darker = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.3)
    flat = (2 * 0.5 * 0.3 + 1e-4) / (0.25 + 0.09 + 1e-4)  # of means alone: no variance
    assert ssim(half, darker) == pytest.approx(flat, rel=1e-6)
    texture, noise = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = texture + 0.3 * noise  # the same everywhere, because the libraries differ at the border
    theirs = structural_similarity_index_measure(noisy, texture, data_range=1.0)
    assert ssim(noisy, texture) == pytest.approx(float(theirs), abs=0.01)
    assert float(theirs) < 0.95
    assert ssim(truth[..., :10], truth[..., :10]) is None


def test_true_views_are_whole_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cameras = turntable_cameras(5, 12.0)
    whole = true_views(Subject("mug", "red"), cameras, 16)
    monkeypatch.setattr("picardopt_3d.world.views._RAYS_AT_ONCE", 512)
    assert torch.equal(true_views(Subject("mug", "red"), cameras, 16), whole)


# Runs.


def test_a_run_is_read_with_its_times(runs: list[Path]) -> None:
    run = read_run(runs[0])
    assert (run.prompt, run.yardstick) == ("a red cube", Yardstick(Subject("cube", "red")))
    assert (run.seconds, run.seconds_with_startup) == (10.0, 12.25)
    assert run.view is None


@pytest.mark.parametrize(
    ("told", "prompt", "subject"),
    [
        ({"prompt": "a corgi", "subject": None}, "a corgi", None),
        ({"prompt": "the red cube"}, "the red cube", Subject("cube", "red")),
        ({"prompt": None, "subject": "a red cube"}, None, Subject("cube", "red")),
        ({"prompt": None, "subject": None}, None, None),
    ],
)
@pytest.mark.parametrize("picture", [False, True])
def test_what_a_run_shows_and_is_to_be_recognized_as(
    tmp_path: Path, told: dict, prompt: str | None, subject: Subject | None, picture: bool
) -> None:
    (tmp_path / "scene.safetensors").write_bytes(b"")
    (tmp_path / "report.json").write_text(json.dumps(told | {"view": [3.8, 20]}))
    if picture:  # perhaps of an earlier run: the report alone counts
        (tmp_path / "input.png").write_bytes(b"")
    run = read_run(tmp_path)
    yardstick = None if subject is None else Yardstick(subject)
    assert (run.prompt, run.yardstick, run.view) == (prompt, yardstick, (3.8, 20.0))
    assert run.seconds is run.seconds_with_startup is None


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no finished run: it has no scene\.safetensors"):
        read_run(tmp_path)
    scene = tmp_path / "scene.safetensors"
    scene.write_bytes(b"noise" * 9)
    assert scene_file(scene) == scene_file(tmp_path) == scene
    with pytest.raises(FileNotFoundError, match=r"has no report\.json.*picardopt resume"):
        read_run(tmp_path)
    for content, said in (("{", "cannot be read"), ("[1]", "is no report")):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            read_run(tmp_path)
    with pytest.raises(ValueError, match=r"scene\.safetensors"):
        open_scene(scene)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda: torch sees no CUDA device"):
            pick_device("cuda")


# The whole.


def test_prompts_are_gathered_once_each(runs: list[Path], tmp_path: Path) -> None:
    known = [read_run(folder) for folder in runs]
    more = ["the red cube", "A  Corgi", "a corgi", "a tulip"]
    assert gather_prompts(known, more) == [
        "a red cube", "a blue sphere", "a green torus", "A  Corgi", "a tulip"
    ]  # fmt: skip
    assert len(gather_prompts(known, read_prompts("domain"))) == 64
    (tmp_path / "prompts.txt").write_text("# two\na corgi\n\n  a tulip \n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a corgi", "a tulip"]
    with pytest.raises(FileNotFoundError, match="prompts='nowhere': there is no such file"):
        read_prompts("nowhere")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="is not a text file"):
        read_prompts(str(tmp_path / "binary.txt"))


def test_runs_are_judged(runs: list[Path], judge: ClipJudge) -> None:
    protocol = Protocol(views=6, size=24, device="cpu")
    known = [read_run(folder) for folder in runs]
    reference = world_statistics(judge, turntable_cameras(2, 12.0), 24)
    judged = judge_runs(known, judge, gather_prompts(known, CAPTIONS), protocol, reference)
    for one in judged:
        figures = one.figures
        assert figures.views == 6
        assert figures.r_precision is not None
        assert figures.psnr is not None
        assert figures.r_precision >= 0.5  # one colour without shading, but it is that colour
        assert figures.psnr > 12
        assert 0.4 < figures.ssim < 1
        assert figures.frechet > 0
    assert judged[0].features.shape == (6, 64)
    [mean] = group(judged, ("method", "preset"), reference)
    assert mean.name == "mean of 3: method=dreamfusion preset=small"
    assert (mean.runs, mean.views, mean.seconds, mean.seconds_with_startup) == (3, 18, 20.0, 22.25)
    assert mean.psnr == pytest.approx(sum(one.figures.psnr for one in judged) / 3)
    assert (mean.prompt, mean.method, mean.seed) == (None, "dreamfusion", 3)
    together = statistics_of(np.concatenate([one.features for one in judged]))
    assert mean.frechet == frechet_distance(together, reference)
    assert group(judged, ("prompt",), reference) == []  # each alone


def test_a_run_that_is_told_a_wrong_prompt_scores_nothing(
    runs: list[Path], judge: ClipJudge, tmp_path: Path
) -> None:
    wrong = save_run(
        tmp_path / "wrong", Subject("torus", "green"), prompt="a red chair", subject=None
    )
    known = [read_run(folder) for folder in (wrong, *runs)]
    judged = judge_runs(known, judge, gather_prompts(known), Protocol(views=4, size=24))
    # Its subject is what its prompt asks for, so the true views are another object's too.
    assert judged[0].figures.r_precision == 0.0
    assert judged[0].figures.psnr < judged[3].figures.psnr - 3
    assert judged[0].figures.steps == 297  # taken, of the 300 that were asked for


def test_cameras_are_the_papers_unless_told_otherwise() -> None:
    cameras = Protocol().cameras()
    assert len(cameras) == 120
    assert cameras.elevation.unique().tolist() == [12.0]
    assert cameras.azimuth.tolist() == [3.0 * index for index in range(120)]
    assert (cameras.distance[0].item(), cameras.fov[0].item()) == pytest.approx((1.65, 42.5))
    seen = Protocol(views=2, fov=30.0).cameras((3.8, 20.0))
    assert (seen.distance[0].item(), seen.fov[0].item()) == pytest.approx((3.8, 30.0))


def figures(**changes: object) -> Figures:
    entries: dict = dict.fromkeys(Figures.__dataclass_fields__)
    return Figures(**(entries | {"name": "run", "runs": 1, "views": 120} | changes))


def test_csv_keeps_every_figure(tmp_path: Path) -> None:
    third = 1 / 3
    line = figures(name="a, b", prompt='say "cube"\n', r_precision=third, seconds=1e-17, seed=5)
    write_csv([line, figures()], tmp_path / "deep" / "table.csv")
    with (tmp_path / "deep" / "table.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == list(Figures.__dataclass_fields__)
    assert (first["name"], first["prompt"], first["seed"]) == ("a, b", 'say "cube"\n', "5")
    assert (float(first["r_precision"]), float(first["seconds"])) == (third, 1e-17)
    assert second["r_precision"] == second["psnr"] == ""


def test_the_table_is_aligned() -> None:
    lines = [
        figures(name="long/name", prompt="a cube", r_precision=0.5, psnr=20.126, seconds=3.0),
        figures(name="b", method="dreamfusion", preset="small", mean_stride=2.0),
        figures(name="mean of 2", runs=2, ssim=0.5),
    ]
    head, rule, first, second, again, mean = text_table(lines).splitlines()
    assert rule == again
    assert set(rule) == {"-", " "}
    for name, text, line in (
        ("R-precision", "50.0 %", first),
        ("PSNR", "20.13 dB", first),
        ("SSIM", "0.500", mean),
    ):
        end = head.index(name) + len(name)
        assert line[:end].endswith(text)
    assert second.index("dreamfusion small") == head.index("method")
    assert first.split("  ")[-1].strip() == "-"
