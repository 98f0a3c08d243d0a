from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.images import ReferenceImage, load_reference, prepare_reference
from picardopt_3d.world import render
from picardopt_3d.world.pictures import EXAMPLES, true_reference, write_examples
from PIL import Image

VIEW = {"elevation": 20.0, "azimuth": 30.0, "distance": 1.65, "fov": 42.5}


def save(pixels: np.ndarray, path: Path) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def red_block(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    """A red object; what is transparent is green, which nobody may ever see."""
    pixels = np.zeros((height, width, 4))
    pixels[..., 1] = 255
    pixels[rows, columns] = (255, 0, 0, 255)
    return pixels


def test_an_object_is_centred_and_takes_up_three_quarters(tmp_path: Path) -> None:
    path = save(red_block(90, 200, slice(10, 40), slice(120, 180)), tmp_path / "a.png")
    found = load_reference(path, **VIEW, size=80)
    expected = torch.zeros(80, 80)
    expected[25:55, 10:70] = 1  # 60 x 30 in a square of 80
    torch.testing.assert_close(found.alpha[0], expected)
    torch.testing.assert_close(
        found.rgb, torch.stack([torch.ones(80, 80), 1 - expected, 1 - expected])
    )
    smaller = load_reference(path, **VIEW, size=120, share=0.5)
    assert smaller.alpha.sum().item() == pytest.approx(60 * 30)
    assert found.camera.elevation.item() == 20
    assert found.camera.fov.item() == 42.5


def test_an_object_at_the_border_is_centred_too(tmp_path: Path) -> None:
    path = save(red_block(64, 64, slice(0, 30), slice(34, 64)), tmp_path / "a.png")
    found = load_reference(path, **VIEW, size=40)
    expected = torch.zeros(40, 40)
    expected[5:35, 5:35] = 1
    torch.testing.assert_close(found.alpha[0], expected)


def test_no_colour_bleeds_in_from_what_is_transparent(tmp_path: Path) -> None:
    path = save(red_block(128, 128, slice(31, 97), slice(31, 97)), tmp_path / "a.png")
    found = load_reference(path, **VIEW, size=32, framed=True)
    assert 0 < found.alpha[0, 7, 16] < 1  # an edge pixel
    torch.testing.assert_close(found.rgb[1], 1 - found.alpha[0])
    torch.testing.assert_close(found.rgb[2], found.rgb[1])
    torch.testing.assert_close(found.rgb[0], torch.ones(32, 32))


def test_a_true_view_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    paths = write_examples(tmp_path, 64)
    assert [path.stem for path in paths] == list(EXAMPLES)
    assert len(paths) == 3
    for path in paths:
        subject, elevation, azimuth = EXAMPLES[path.stem]
        view = VIEW | {"elevation": elevation, "azimuth": azimuth}
        found = load_reference(path, **view, size=64, framed=True)
        truth, alpha = render(subject, orbit_cameras(elevation, azimuth, 1.65, 42.5), 64, 64)
        assert (found.rgb - truth[0]).abs().max() < 1.01 / 255
        assert (found.alpha - alpha[0]).abs().max() < 0.51 / 255
        assert 0.05 < found.alpha.mean() < 0.6
        at_once = true_reference(subject, found.camera, 64)
        assert torch.equal(at_once.rgb, truth[0])


@pytest.mark.parametrize("framed", [False, True])
def test_a_prepared_picture_is_read_as_the_original(framed: bool, tmp_path: Path) -> None:
    path = save(red_block(100, 100, slice(20, 60), slice(30, 90)), tmp_path / "a.png")
    prepare_reference(path, tmp_path / "input.png", framed=framed)
    with Image.open(tmp_path / "input.png") as written:
        assert written.mode == "RGBA"
    expected = load_reference(path, **VIEW, size=48, framed=framed)
    found = load_reference(tmp_path / "input.png", **VIEW, size=48, prepared=True)
    assert torch.equal(found.rgb, expected.rgb)
    assert torch.equal(found.alpha, expected.alpha)


def test_the_prompt_is_the_picture_over_white_and_a_smaller_one_can_be_had() -> None:
    subject, elevation, azimuth = EXAMPLES["blue_mug"]
    picture = true_reference(subject, orbit_cameras(elevation, azimuth), 64)
    assert torch.equal(picture.prompt().image, picture.rgb)
    assert picture.prompt().camera is picture.camera
    rgb, alpha = picture.at(16)
    assert rgb.shape == (3, 16, 16)
    assert alpha.shape == (1, 16, 16)
    assert rgb.mean().item() == pytest.approx(picture.rgb.mean().item(), abs=5e-3)
    assert torch.equal(picture.at(64)[0], picture.rgb)


# -- background removal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_without_rembg_an_uncut_picture_says_what_to_do(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rembg", None)  # importing it fails, installed or not
    Image.new(mode, (40, 40), "gray").save(tmp_path / "a.png")
    with pytest.raises(
        ValueError,
        match=r"a\.png is not cut out \(no pixel is transparent\).*RGBA.*--cut-background.*pip install",
    ):
        load_reference(tmp_path / "a.png", **VIEW)


def test_rembg_cuts_out_a_picture_without_transparency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(picture: Image.Image) -> Image.Image:
        """In place of rembg, whose model is a download: what is red is the object."""
        assert picture.mode == "RGB"
        pixels = np.asarray(picture)
        alpha = np.where(pixels[..., 0] > 200, 255, 0).astype(np.uint8)
        return Image.fromarray(np.dstack([pixels, alpha]))

    module = types.ModuleType("rembg")
    module.remove = remove  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rembg", module)
    path = save(red_block(90, 200, slice(10, 40), slice(120, 180))[..., :3], tmp_path / "a.bmp")
    found = load_reference(path, **VIEW, size=80)
    assert found.alpha.sum().item() == pytest.approx(60 * 30)
    assert torch.equal(found.rgb[1], 1 - found.alpha[0])


# -- what cannot be used -------------------------------------------------------------------------------------


def test_pictures_that_show_nothing_are_refused(tmp_path: Path) -> None:
    empty = save(red_block(40, 40, slice(0, 0), slice(0, 0)), tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"empty\.png: nothing in it is opaque"):
        load_reference(empty, **VIEW)
    tiny = save(red_block(40, 40, slice(3, 9), slice(3, 18)), tmp_path / "tiny.png")
    with pytest.raises(ValueError, match=r"tiny\.png: the object is 15 pixels long"):
        load_reference(tiny, **VIEW)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_reference(tmp_path / "absent.png", **VIEW)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read"):
        load_reference(tmp_path / "text.png", **VIEW)
    path = save(red_block(64, 64, slice(0, 30), slice(34, 64)), tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        load_reference(path, **VIEW)
    Image.new("F", (40, 40)).save(tmp_path / "depth.tiff")
    with pytest.raises(ValueError, match="8 bits a channel"):
        load_reference(tmp_path / "depth.tiff", **VIEW)


def test_a_framed_picture_has_to_be_square(tmp_path: Path) -> None:
    path = save(red_block(90, 200, slice(10, 40), slice(120, 180)), tmp_path / "a.png")
    with pytest.raises(ValueError, match="200 x 90 pixels: a framed picture has to be square"):
        load_reference(path, **VIEW, framed=True)
    with pytest.raises(ValueError, match="share=0"):
        load_reference(path, **VIEW, share=0)


def test_parts_that_do_not_go_together_are_refused() -> None:
    camera = orbit_cameras(0.0, 0.0)
    with pytest.raises(ValueError, match="rgb of shape"):
        ReferenceImage(torch.ones(3, 8, 8), torch.ones(1, 4, 4), camera)
    with pytest.raises(ValueError, match="2 cameras"):
        two = orbit_cameras(torch.zeros(2), 0.0)
        ReferenceImage(torch.ones(3, 8, 8), torch.ones(1, 8, 8), two)


@pytest.mark.slow
def test_the_command_writes_the_examples(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "picardopt_3d.images", str(tmp_path), "--size", "32"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == sorted(EXAMPLES)
    assert '--elevation 20 --azimuth 30 --subject "a red chair"' in done.stdout
