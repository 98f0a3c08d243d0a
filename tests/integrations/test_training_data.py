"""What the shipped models are trained on: views, captions, words for views, relative poses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.guidance.zero123_pipeline import relative_pose
from picardopt_3d.prompts import ViewWords
from picardopt_3d.training.data import Draw, Views, caption_table, trained_subjects
from picardopt_3d.training.models import build_tokenizer, known_texts
from picardopt_3d.world import CAPTIONS, COLOURS, SHAPES, Subject, held_out_subjects, render


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    return Views.cached(tmp_path_factory.mktemp("views") / "views.pt", 6, 16, 0)


def test_views_are_what_the_world_shows(views: Views) -> None:
    draw = views.draw(12, torch.Generator().manual_seed(0))
    seen, poses = views.clean(draw), views.pose(draw)
    for index in range(12):
        subject = Subject(list(SHAPES)[draw.shape[index]], list(COLOURS)[draw.colour[index]])
        truth, _ = render(subject, orbit_cameras(*poses[index]), 16, 16)
        torch.testing.assert_close(seen[index], 2 * truth[0] - 1, atol=0.02, rtol=0)
    condition = orbit_cameras(*poses.unbind(-1)).condition()
    torch.testing.assert_close(views.conditions[draw.shape, draw.view], condition)


def test_held_out_subjects_are_never_drawn(views: Views) -> None:
    draw = views.draw(2000, torch.Generator().manual_seed(0))
    shapes, colours = list(SHAPES), list(COLOURS)
    drawn = {
        (shapes[s], colours[c])
        for s, c in zip(draw.shape.tolist(), draw.colour.tolist(), strict=True)
    }
    assert drawn == {(s.shape, s.colour) for s in trained_subjects()}
    assert len(drawn) == 56
    assert not drawn & {(s.shape, s.colour) for s in held_out_subjects()}


def test_views_are_kept_in_a_file_and_rendered_anew_for_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "views.pt"
    first = Views.cached(path, 2, 8, 0)
    written = path.stat().st_mtime_ns
    again = Views.cached(path, 2, 8, 0)
    assert torch.equal(first.shaded, again.shaded)
    assert torch.equal(first.poses, again.poses)
    assert path.stat().st_mtime_ns == written
    assert not torch.equal(Views.cached(path, 2, 8, 1).poses, first.poses)


def test_rough_views_are_views_of_the_same_things(views: Views) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = views.draw(400, generator)
    rough, clean = views.rough(draw, generator), views.clean(draw)
    assert rough.shape == clean.shape
    assert rough.min() >= -1
    assert rough.max() <= 1
    far = (rough - clean).square().mean((1, 2, 3))
    other = (rough - clean.roll(1, 0)).square().mean((1, 2, 3))
    white = (rough[:, :, 0, 0] > 0.9).all(1)  # before the usual background they are near their own
    assert 0.3 < white.float().mean() < 0.7
    assert far[white].mean() < 0.6 * other[white].mean()


def test_captions_are_found_by_shape_colour_phrase_and_view() -> None:
    tokenizer = build_tokenizer(known_texts(), 16)
    table = caption_table(tokenizer, lambda text: (text, *ViewWords().texts(text)))
    assert table.shape == (8, 8, len(CAPTIONS), 5, 16)
    tokens = table[list(SHAPES).index("mug"), list(COLOURS).index("cyan"), 0, 3]
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ,", ",").strip() == (
        "a cyan mug, back view"
    )
    assert len(table.flatten(0, 3).unique(dim=0)) == 8 * 8 * len(CAPTIONS) * 5  # none is cut off


def test_words_have_the_same_numbers_in_every_run() -> None:
    """The learner breaks ties by chance, so its own order is none: whole words are numbered alphabetically."""
    vocabulary = build_tokenizer(known_texts(), 16).get_vocab()
    words = [word for word in vocabulary if len(word.removesuffix("</w>")) > 1]
    words = [word for word in words if not word.startswith("<|")]
    assert sorted(words) == sorted(words, key=vocabulary.__getitem__)
    assert "snowman</w>" in words


def test_relative_poses_are_zero_1_to_3s() -> None:
    """T = [polar' - polar, sin and cos of the azimuths' difference, distance' - distance]; polar is from the pole."""
    reference, target = torch.tensor([10.0, 350.0, 1.6]), torch.tensor([[40.0, 80.0, 1.7]])
    polar = torch.deg2rad(torch.tensor((90.0 - 40) - (90 - 10)))
    expected = torch.tensor([[polar.item(), 1.0, 0.0, 0.1]])
    torch.testing.assert_close(relative_pose(reference, target), expected, atol=1e-6, rtol=1e-6)


def test_another_view_is_of_the_same_thing(views: Views) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = views.draw(64, generator)
    other = views.again(draw, generator)
    assert isinstance(other, Draw)
    assert torch.equal(other.shape, draw.shape)
    assert torch.equal(other.colour, draw.colour)
    assert not torch.equal(other.view, draw.view)
