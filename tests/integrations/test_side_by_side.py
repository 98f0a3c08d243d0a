"""What the pictures of `benchmarks/side_by_side.py` show, and which runs it makes for them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from picardopt_3d.export.pictures import Pixels, to_pixels
from picardopt_3d.methods import METHODS, Method
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.record import RunRecord
from picardopt_3d.scenes import load_scene
from picardopt_3d.world import render
from PIL import Image

from tests.integrations.helpers.two_stages import RECIPE, TwoStages

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CUBE = "a red cube"


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with one more method of two small stages that is all that it shows."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("side_by_side", "methods", "method_runs", "result_store", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import method_runs
    import methods
    import side_by_side

    both = Method(TwoStages, {"small": RECIPE, "paper": RECIPE})
    monkeypatch.setitem(METHODS["text-to-3d"], "both", both)
    monkeypatch.setitem(method_runs.RECIPES, "both", ("text-to-3d", "both", "small"))
    monkeypatch.setattr(method_runs, "TEXTS", (CUBE,))
    monkeypatch.setattr(methods, "VIEWS", 1)
    monkeypatch.setattr(side_by_side, "SIZE", 24)
    return side_by_side


def command(sheets: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> Pixels:
    """Calls the script, and reads its picture as colours."""
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", *words])
    sheets.main()
    with Image.open(words[-1]) as image:
        return np.asarray(image)


def scene_of(sheets: ModuleType, scenes: Path, mode: str, stage: int) -> Path:
    folder = RunFolder(sheets.Run("both", CUBE, mode).folder(scenes))
    return folder.begun()[stage].scene


def views(sheets: ModuleType, scene: Path | None, turns: tuple[float, ...]) -> Pixels:
    """What a scene, or the true object, looks like from the sheet's cameras."""
    config = sheets.configuration(sheets.Run("both", CUBE, "sequential"), Path())
    cameras = sheets.cameras_around(config, turns)
    if scene is None:
        return to_pixels(render(sheets.subject(CUBE), cameras, 24, 24)[0])
    return to_pixels(render_rgb(load_scene(scene), cameras, 24))


def assert_at(sheet: Pixels, left: int, top: int, expected: Pixels) -> None:
    """Looks for views in a row."""
    for index, view in enumerate(expected):
        at = left + index * 26
        assert (sheet[top : top + 24, at : at + 24] == view).all()


def test_the_sheet_of_all_shows_every_methods_last_stage_and_makes_missing_runs(
    sheets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, out = tmp_path / "scenes", tmp_path / "all.png"
    monkeypatch.setattr(sheets, "METHODS_SHOWN", {"both": ("Both", "voxels")})
    words = ("--all", "--scenes", str(scenes), "--out", str(out))
    sheet = command(sheets, monkeypatch, *words)
    group = len(sheets.FEW_TURNS) * 26 + 2
    last = [scene_of(sheets, scenes, mode, 1) for mode in ("sequential", "default")]
    for index, scene in enumerate((*last, None)):
        left = sheets.MARGIN + index * (group + sheets.GAP) + 2
        assert_at(sheet, left, sheets.HEAD + 2, views(sheets, scene, sheets.FEW_TURNS))
    times = [scene.stat().st_mtime_ns for scene in last]
    RunRecord(step=3).save(RunFolder(sheets.Run("both", CUBE, "default").folder(scenes)).begun()[1])
    command(sheets, monkeypatch, *words)
    again = [scene.stat().st_mtime_ns for scene in last]
    assert again[0] == times[0], "a finished run was made again"
    assert again[1] > times[1], "a stopped run was shown"


def test_the_picture_of_a_method_shows_each_of_its_stages(
    sheets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, out = tmp_path / "scenes", tmp_path / "both.png"
    words = ("--recipe", "both", "--captions", CUBE, "--scenes", str(scenes), "--out", str(out))
    sheet = command(sheets, monkeypatch, *words)
    order = [(mode, stage) for mode in ("sequential", "default") for stage in (0, 1)]
    shown = [scene_of(sheets, scenes, mode, stage) for mode, stage in order]
    for index, scene in enumerate((*shown, None)):
        assert_at(sheet, 94, 42 + index * 26, views(sheets, scene, sheets.TURNS))
    assert len(sheet) == 42 + 5 * 26


def test_an_object_that_a_recipe_is_not_run_on_is_refused(
    sheets: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "--captions", "a corgi"])
    with pytest.raises(SystemExit):
        sheets.main()
    assert "a red chair" in capsys.readouterr().err


def test_all_methods_are_shown_and_their_names_are_whole(
    sheets: ModuleType, tmp_path: Path
) -> None:
    """The sheet's text lies on white, between the edge and the views; only one row has views that are not white."""
    shown = {sheets.RECIPES[recipe][1] for recipe in sheets.METHODS_SHOWN}
    assert shown == {name for methods in METHODS.values() for name in methods} - {"both"}
    assert not sheets.METHODS_SHOWN.keys() & sys.modules["method_runs"].FIRST_STAGE
    white, grey = torch.ones(3, 3, 96, 96), torch.full((3, 3, 96, 96), 0.5)
    found = {recipe: [white] * 3 for recipe in sheets.METHODS_SHOWN}
    found["zero123"] = [grey] * 3
    sheets.save_sheet_of_all(found, tmp_path / "all.png")
    sheet = np.asarray(Image.open(tmp_path / "all.png"))
    names = (sheet[:, : sheets.MARGIN] < 255).any(-1)
    columns = np.flatnonzero(names.any(0))
    assert columns.min() >= 8
    assert columns.max() < sheets.MARGIN - 4
    inked = names.any(1)[sheets.HEAD + 2 :]
    per_method = [inked[top : top + 98].sum() for top in range(0, 7 * 98, 98)]
    assert min(per_method) > 12
    heads = (sheet[: sheets.HEAD] < 255).any(-1)
    rows = np.flatnonzero(heads.any(1))
    assert rows.min() > 2
    assert 12 < rows.max() < sheets.HEAD - 4
    assert np.flatnonzero(heads.any(0)).min() > sheets.MARGIN
    top = sheets.HEAD + 5 * 98 + 2
    assert set(sheet[top : top + 96, sheets.MARGIN + 2].flat) == {128}
    assert (sheet[top - 2, sheets.MARGIN :] == 255).all()
