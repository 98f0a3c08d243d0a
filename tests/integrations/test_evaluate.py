"""Figures of finished runs: known answers, and what is said where there is none."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import Balls, voxels
from picardopt_3d.cameras import orbit_cameras, turntable_cameras
from picardopt_3d.domain import COLOURS, SHAPES, Subject, all_subjects
from picardopt_3d.evaluate.clip import SHIPPED_CLIP, ClipJudge
from picardopt_3d.evaluate.evaluation import (
    Figures,
    Protocol,
    evaluate,
    gather_prompts,
    group,
    r_precision,
    read_prompts,
)
from picardopt_3d.evaluate.frechet import (
    Statistics,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics_of,
)
from picardopt_3d.evaluate.pictures import psnr, render_views, ssim, true_views
from picardopt_3d.evaluate.reference import domain_statistics, find_reference, folder_statistics
from picardopt_3d.evaluate.runs import open_scene, pick_device, read_run, scene_file
from picardopt_3d.evaluate.table import text_table, write_csv
from picardopt_3d.scenes import save_scene
from picardopt_3d.training.evaluate import true_views as views_of
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import _compute_fid

CAPTIONS = [subject.caption for subject in all_subjects()]
CAMERAS = turntable_cameras(4, 12.0)
REPORT = {
    "prompt": "a red cube",
    "subject": "a red cube",
    "method": "dreamfusion",
    "preset": "small",
    "seed": 3,
    "size": 32,
    "steps": 300,
    "sweeps": 100,
    "mean_stride": 3.0,
    "drift_evaluations": 420,
    "seconds": 12.5,
    "startup_seconds": 2.25,
}


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge()


@pytest.fixture(scope="module")
def everything() -> Tensor:
    """True views of all subjects. # [64, views, 3, 24, 24]"""
    return views_of(all_subjects(), CAMERAS, 24)


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


# Frechet distance.


def gaussian(mean: list[float], covariance: np.ndarray) -> Statistics:
    return Statistics(np.array(mean), np.array(covariance), 100)


def test_two_gaussians_have_the_distance_of_the_closed_form() -> None:
    # With covariances that commute: |m1 - m2|^2 + sum (s1 - s2)^2.
    one = gaussian([1.0, 2.0, 0.0], np.diag([4.0, 1.0, 0.0]))
    other = gaussian([0.0, 0.0, 2.0], np.diag([1.0, 9.0, 0.25]))
    assert frechet_distance(one, other) == pytest.approx(9 + 1 + 4 + 0.25, rel=1e-12)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = [gaussian(list(turn @ s.mean), turn @ s.covariance @ turn.T) for s in (one, other)]
    assert frechet_distance(*turned) == pytest.approx(14.25, rel=1e-9)
    # Of rank one each, at an angle of 60 degrees: tr (C1 C2)^(1/2) = |u . v|.
    u, v = np.array([1.0, 0.0]), np.array([0.5, math.sqrt(0.75)])
    ranks = [gaussian([0.0, 0.0], np.outer(w, w)) for w in (u, v)]
    assert frechet_distance(*ranks) == pytest.approx(2 - 2 * 0.5, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_whatever_its_rank() -> None:
    rng = np.random.default_rng(0)
    for count in (5, 40, 400):
        statistics = statistics_of(rng.normal(size=(count, 40)))
        assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


def test_torchmetrics_finds_the_same_distance() -> None:
    rng = np.random.default_rng(1)
    sets = [statistics_of(rng.normal(size=(200, 16)) @ rng.normal(size=(16, 16))) for _ in "ab"]
    theirs = _compute_fid(
        *(torch.from_numpy(part) for s in sets for part in (s.mean, s.covariance))
    )
    assert frechet_distance(*sets) == pytest.approx(float(theirs), rel=1e-9)
    assert frechet_distance(*sets) == pytest.approx(frechet_distance(*reversed(sets)), rel=1e-9)
    assert frechet_distance(*sets) > 1


def test_statistics_are_the_samples(tmp_path: Path) -> None:
    features = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], dtype=np.float32)
    statistics = statistics_of(features, "m", "print", "three")
    assert statistics.mean.tolist() == [2.0, 2.0]
    assert statistics.covariance.tolist() == [[4.0, 3.0], [3.0, 3.0]]
    save_statistics(statistics, tmp_path / "s.npz")
    again = load_statistics(tmp_path / "s.npz", "print", "m")
    assert (again.count, again.model, again.source) == (3, "m", "three")
    assert again.mean.tobytes() == statistics.mean.tobytes()
    assert again.covariance.tobytes() == statistics.covariance.tobytes()
    with pytest.raises(ValueError, match=r"of features of 'm', .* by another model, 'other'"):
        load_statistics(tmp_path / "s.npz", "another print", "other")


def test_what_is_no_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 picture\(s\): .* at least two"):
        statistics_of(np.ones((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        statistics_of(np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="2 features against 3: they are of different models"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))
    (tmp_path / "noise.npz").write_bytes(b"noise")
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        load_statistics(tmp_path / "noise.npz", "", "")
    np.savez(tmp_path / "other.npz", mu=np.ones(3))
    with pytest.raises(ValueError, match=r"has no mean, covariance, .* --make-reference"):
        load_statistics(tmp_path / "other.npz", "", "")
    save_statistics(Statistics(np.ones(3), np.eye(2), 5), tmp_path / "odd.npz")
    with pytest.raises(ValueError, match="do not fit"):
        load_statistics(tmp_path / "odd.npz", "", "")


# References.


def test_a_reference_of_the_domain_is_near_its_own_views_only(
    judge: ClipJudge, everything: Tensor
) -> None:
    reference = domain_statistics(judge, CAMERAS, 24)
    assert reference.count == 64 * len(CAMERAS)
    assert (reference.model, reference.fingerprint) == ("clip", judge.fingerprint())

    def distance(views: Tensor) -> float:
        features = judge.image_features(views.reshape(-1, 3, 24, 24))
        return frechet_distance(reference, statistics_of(features.numpy()))

    same, some, red = (
        distance(views) for views in (everything, everything[:, ::2], everything[:: len(COLOURS)])
    )
    assert same == pytest.approx(0, abs=1e-6)
    assert 0.01 < 10 * some < red


def test_a_folder_is_a_reference(judge: ClipJudge, tmp_path: Path) -> None:
    views = true_views(Subject("mug", "cyan"), turntable_cameras(3, 12.0), 32)
    place = tmp_path / "pictures" / "deeper"
    place.mkdir(parents=True)
    for index, view in enumerate(views):
        pixels = (view.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(place / f"{index}.{['png', 'PNG', 'bmp'][index]}")
    (place / "notes.txt").write_text("no picture")
    made = folder_statistics(judge, tmp_path / "pictures")
    assert (made.count, made.source) == (3, "pictures")
    direct = statistics_of(judge.image_features(views).numpy())
    assert np.allclose(made.mean, direct.mean, atol=1e-6)
    assert np.allclose(find_reference(judge, tmp_path).covariance, made.covariance)
    save_statistics(made, tmp_path / "made.npz")
    assert find_reference(judge, tmp_path / "made.npz").mean.tobytes() == made.mean.tobytes()


def test_a_reference_that_cannot_be_had_says_why(judge: ClipJudge, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        find_reference(judge, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        folder_statistics(judge, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        find_reference(judge, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be opened as a picture"):
        find_reference(judge, tmp_path)


# The judge.


def test_true_views_are_recognised_and_shuffled_prompts_are_not(
    judge: ClipJudge, everything: Tensor
) -> None:
    texts = judge.text_features(CAPTIONS)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [CAPTIONS[index] for index in order]  # texts keep their places
    right, wrong = [], []
    for own, views in zip(CAPTIONS, everything, strict=True):
        features = judge.image_features(views)
        right.append(r_precision(features, texts, CAPTIONS, own))
        wrong.append(r_precision(features, texts, shuffled, own))
    assert sum(right) == 64.0
    assert sum(wrong) < 5.0  # chance: 1


def test_the_same_subject_in_other_words_is_the_same_prompt(judge: ClipJudge) -> None:
    views = true_views(Subject("cube", "red"), turntable_cameras(4, 12.0), 32)
    prompts = ["a picture of a red cube", "a blue cube"]
    features, texts = judge.image_features(views), judge.text_features(prompts)
    assert r_precision(features, texts, prompts, "a red cube") == 1.0
    assert r_precision(features, texts, prompts, "a blue cube") == 0.0


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
    with pytest.raises(ValueError, match="has no prompt in it"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="is no text file"):
        read_prompts(str(tmp_path / "binary.txt"))


def test_features_are_the_models_own(judge: ClipJudge) -> None:
    views = true_views(Subject("cone", "brown"), turntable_cameras(2, 12.0), 32)
    features = judge.image_features(views)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (judge.processor.image_mean, judge.processor.image_std)
    )
    direct = judge.model.get_image_features(pixel_values=((views * 255).round() / 255 - mean) / std)
    assert torch.allclose(features, direct.pooler_output, atol=1e-4)  # 32 pixels: not resized
    cosine = judge.similarity(views)
    assert cosine.shape == (2, 64)
    assert cosine.abs().max() <= 1 + 1e-5
    assert [CAPTIONS[index] for index in cosine.argmax(1)] == ["a brown cone"] * 2


def test_the_fingerprint_is_of_the_weights_not_of_the_place(
    judge: ClipJudge, tmp_path: Path
) -> None:
    shutil.copytree(SHIPPED_CLIP, tmp_path / "moved")
    moved = ClipJudge(tmp_path / "moved", ())
    assert moved.name == "moved"
    assert moved.fingerprint() == judge.fingerprint()
    with torch.no_grad():
        moved.model.visual_projection.weight[0, 0] += 1e-3
    assert moved.fingerprint() != judge.fingerprint()


def test_a_judge_that_cannot_be_had_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"not in this machine's cache.*hf download"):
        ClipJudge("openai/clip-vit-base-patch32-nowhere")
    with pytest.raises(
        FileNotFoundError,
        match="there is no such folder; give the folder of a CLIPModel, or a hub id",
    ):
        ClipJudge(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        ClipJudge(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="of type 'bert': give a CLIPModel"):
        ClipJudge(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"its config\.json cannot be read"):
        ClipJudge(tmp_path)
    shutil.copy(SHIPPED_CLIP / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="could not be loaded"):
        ClipJudge(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"could not be loaded.*give a complete folder"):
        ClipJudge(tmp_path)


# Pictures.


def test_views_are_those_of_the_closed_form_however_they_are_cut_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, cameras = Balls(), orbit_cameras(12.0, torch.tensor([0.0, 90.0, 200.0]))
    whole = scene.render(*cameras.rays(16, 16), backdrop=torch.ones(3, 3)).rgb
    told: list[int] = []
    assert torch.equal(render_views(scene, cameras, 16, (1.0,) * 3, told.append), whole)
    assert sum(told) == 3
    for rays in (5 * 16, 2 * 256):  # strips of five rows; two views together
        monkeypatch.setattr("picardopt_3d.evaluate.pictures.RAYS_AT_ONCE", rays)
        assert torch.equal(render_views(scene, cameras, 16, (1.0,) * 3), whole)
    own = render_views(scene, cameras, 16)
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
    monkeypatch.setattr("picardopt_3d.evaluate.pictures.RAYS_AT_ONCE", 128)
    assert torch.equal(true_views(Subject("mug", "red"), cameras, 16), whole)


# Runs.


def test_a_run_is_read_with_its_times(runs: list[Path]) -> None:
    run = read_run(runs[0])
    assert (run.prompt, run.subject) == ("a red cube", Subject("cube", "red"))
    assert (run.seconds, run.seconds_with_startup) == (10.0, 12.25)
    assert run.view is None


@pytest.mark.parametrize(
    ("told", "image", "prompt", "subject"),
    [
        ({"prompt": "a corgi", "subject": None}, False, "a corgi", None),
        ({"prompt": "the red cube"}, False, "the red cube", Subject("cube", "red")),
        (
            {"prompt": "a red cube", "subject": "a red cube"},
            True,
            "a red cube",
            Subject("cube", "red"),
        ),
        ({"prompt": None, "subject": "a red cube"}, True, None, Subject("cube", "red")),
        ({"prompt": "a corgi", "subject": None}, True, None, None),
        ({"prompt": None, "subject": None}, True, None, None),
    ],
)
def test_what_a_run_shows_and_is_to_be_recognised_as(
    tmp_path: Path, told: dict, image: bool, prompt: str | None, subject: Subject | None
) -> None:
    (tmp_path / "scene.safetensors").write_bytes(b"")
    (tmp_path / "report.json").write_text(json.dumps(told | {"view": [3.8, 20]}))
    if image:
        (tmp_path / "input.png").write_bytes(b"")
    run = read_run(tmp_path)
    assert (run.prompt, run.subject, run.view) == (prompt, subject, (3.8, 20.0))
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


def test_runs_are_judged(runs: list[Path], judge: ClipJudge) -> None:
    protocol = Protocol(views=6, size=24, device="cpu")
    known = [read_run(folder) for folder in runs]
    reference = domain_statistics(judge, turntable_cameras(2, 12.0), 24)
    judged = evaluate(known, judge, gather_prompts(known, CAPTIONS), protocol, reference)
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
    judged = evaluate(known, judge, gather_prompts(known), Protocol(views=4, size=24))
    # Its subject is what its prompt asks for, so the true views are another object's too.
    assert judged[0].figures.r_precision == 0.0
    assert judged[0].figures.psnr < judged[3].figures.psnr - 3


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
