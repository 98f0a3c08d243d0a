"""CLIP as a judge and the Frechet distance on its features: known answers, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.compat import CLIPImageProcessorPil, CLIPTokenizer, pooled
from picardopt_3d.evaluate.clip import SHIPPED_CLIP, ClipJudge
from picardopt_3d.evaluate.frechet import (
    Statistics,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics_of,
)
from picardopt_3d.evaluate.judging import r_precision
from picardopt_3d.evaluate.reference import find_reference, folder_statistics
from picardopt_3d.training.tables import true_views as views_of
from picardopt_3d.world import COLOURS, Subject, all_subjects, true_views
from picardopt_3d.world.statistics import world_statistics
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import _compute_fid
from transformers import CLIPConfig, CLIPModel

CAPTIONS = [subject.caption for subject in all_subjects()]
CAMERAS = turntable_cameras(4, 12.0)


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge()


@pytest.fixture(scope="module")
def everything() -> Tensor:
    """True views of all subjects. # [64, views, 3, 24, 24]"""
    return views_of(all_subjects(), CAMERAS, 24)


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
    with pytest.raises(ValueError, match=r"holds statistics of 'm', .* by another model, 'other'"):
        load_statistics(tmp_path / "s.npz", "another print", "other")


def test_what_is_no_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 picture\(s\): .* at least two"):
        statistics_of(np.ones((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        statistics_of(np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="2 features against 3: give statistics of the same model"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))
    (tmp_path / "noise.npz").write_bytes(b"noise")
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        load_statistics(tmp_path / "noise.npz", "", "")
    np.savez(tmp_path / "other.npz", mu=np.ones(3))
    with pytest.raises(ValueError, match=r"has no mean, covariance, .* --make-reference"):
        load_statistics(tmp_path / "other.npz", "", "")
    save_statistics(Statistics(np.ones(3), np.eye(2), 5), tmp_path / "odd.npz")
    with pytest.raises(ValueError, match="do not match"):
        load_statistics(tmp_path / "odd.npz", "", "")


# References.


def test_a_reference_of_the_domain_is_near_its_own_views_only(
    judge: ClipJudge, everything: Tensor
) -> None:
    reference = world_statistics(judge, CAMERAS, 24)
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
    with pytest.raises(FileNotFoundError, match="hold no pictures"):
        find_reference(judge, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be opened as a picture"):
        find_reference(judge, tmp_path)


# The judge.


def test_true_views_are_recognized_and_shuffled_prompts_are_not(
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


def test_features_are_the_models_own(judge: ClipJudge) -> None:
    views = true_views(Subject("cone", "brown"), turntable_cameras(2, 12.0), 32)
    features = judge.image_features(views)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (judge.processor.image_mean, judge.processor.image_std)
    )
    direct = judge.model.get_image_features(pixel_values=((views * 255).round() / 255 - mean) / std)
    assert torch.allclose(features, pooled(direct), atol=1e-4)  # 32 pixels: not resized
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


def test_another_clip_model_prepares_pictures_its_own_way(judge: ClipJudge, tmp_path: Path) -> None:
    # Laid out as OpenAI's: the short edge is scaled, then the middle is cut out.
    config = CLIPConfig.from_pretrained(SHIPPED_CLIP)
    config.vision_config.image_size = 48
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(tmp_path / "other")
    CLIPTokenizer.from_pretrained(SHIPPED_CLIP).save_pretrained(tmp_path / "other")
    prepared = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_center_crop=True
    )
    prepared.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="reads 16 tokens"):
        other = ClipJudge(str(tmp_path / "other"), ["a red cube", "a mug " * 40])
    assert other.texts.shape == (2, 64)
    wide = Image.fromarray(np.zeros((48, 96, 3), dtype=np.uint8))
    middle = Image.fromarray(np.zeros((48, 48, 3), dtype=np.uint8))
    wide.paste((255, 0, 0), (0, 0, 20, 48))  # outside of the middle
    assert torch.equal(*other.image_features([wide, middle]))
    assert not torch.allclose(*judge.image_features([wide, middle]))  # which sees all of it
    save_statistics(statistics_of(np.eye(64), "clip", judge.fingerprint()), tmp_path / "s.npz")
    find_reference(judge, tmp_path / "s.npz")
    with pytest.raises(
        ValueError, match=r"holds statistics of 'clip', .* by another model, 'other'"
    ):
        find_reference(other, tmp_path / "s.npz")


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
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        ClipJudge("./none")
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
