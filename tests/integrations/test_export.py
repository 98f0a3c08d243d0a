from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from picardopt_3d.cameras import turntable_cameras
from picardopt_3d.export.pictures import (
    normal_colours,
    rows_of,
    save_contact_sheet,
    save_png,
    tile,
    to_pixels,
)
from picardopt_3d.export.plots import save_strides_plot
from picardopt_3d.export.turntable import frames_of, save_film
from picardopt_3d.io import replacing, write_json
from picardopt_3d.run.record import RunRecord
from picardopt_3d.scenes import FieldConfig, RadianceField
from PIL import Image

from tests.integrations.helpers.films import read_film

FIELD = RadianceField(FieldConfig(resolutions=(5,), samples=4))


def some_render(views: int = 2, size: int = 16):
    with torch.no_grad():
        return FIELD.render(turntable_cameras(views), size, normals=True)


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with replacing(target) as temporary:
        temporary.write_text("old")
        assert not target.exists()
    assert target.read_text() == "old"

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1.5, "y": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5, "y": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"x": math.nan})
    assert not (tmp_path / "b.json").exists()


def test_pixels_are_rounded_clamped_and_channels_last() -> None:
    image = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1).expand(3, 2, 4)
    pixels = to_pixels(image)
    assert pixels.shape == (2, 4, 3)
    assert pixels[0, 0].tolist() == [0, 128, 255]
    assert to_pixels(torch.ones(1, 1, 2, 4)).shape == (1, 2, 4, 3)


def test_tiles_are_where_they_belong(tmp_path: Path) -> None:
    red, blue = torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    sheet = tile([red, blue], scale=2, gap=1)
    assert sheet.shape == (2 * 9 + 1, 2 * 9 + 1, 3)
    assert sheet[5, 5].tolist() == sheet[5, 14].tolist() == [255, 0, 0]
    assert sheet[14, 5].tolist() == [0, 0, 255]
    assert sheet[14, 14].tolist() == [255, 255, 255]
    save_png(sheet, tmp_path / "tile.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "tile.png")), sheet)


def test_normals_have_colours_only_where_something_is_seen() -> None:
    render = some_render()
    colours = normal_colours(render)
    empty = render.opacity.expand_as(colours) == 0
    assert empty.any()
    assert (colours[empty] == 1.0).all()
    with torch.no_grad():
        bare = FIELD.render(turntable_cameras(1), 4)
    with pytest.raises(ValueError, match="normals=True"):
        normal_colours(bare)


def test_a_contact_sheet_has_a_row_for_each_label(tmp_path: Path) -> None:
    rows = list(zip(("colour", "normals", "opacity"), rows_of(some_render()), strict=True))
    save_contact_sheet(rows, "a red cube", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (40 + 3 * 18 + 2, 92 + 2 * 18 + 2, 3)
    assert (sheet[:38, :90] < 128).any()  # the title is there
    for row in range(3):
        top = 40 + row * 18
        assert (sheet[top : top + 18, :90] < 200).any()  # and each label


def test_a_film_opens_again_with_every_frame(tmp_path: Path) -> None:
    written = save_film(frames_of(some_render(views=7)), tmp_path / "film.mp4")
    assert written == 7
    frames = read_film(tmp_path / "film.mp4")
    assert len(frames) == 7
    assert frames[0].shape == (16, 32, 3)


@pytest.mark.parametrize(
    ("residuals", "tolerances"),
    [([], []), ([[1e-9, 1e-8], [math.nan, math.inf]], [[1e-8, 1e-8], [0.0, math.inf]])],
)
def test_strides_are_plotted_whatever_the_residuals(
    tmp_path: Path, residuals: list[list[float]], tolerances: list[list[float]]
) -> None:
    record = RunRecord(step=3, sweeps=2, strides=[1, 2], residuals=residuals, tolerances=tolerances)
    save_strides_plot(record, 2, tmp_path / "strides.png")
    picture = np.asarray(Image.open(tmp_path / "strides.png"))
    assert picture.std() > 1
