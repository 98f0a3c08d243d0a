"""Which pictures are cut out, and what a flood fill from the border cuts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.cut_out import why_not_cut_out
from picardopt_3d.images import load_reference, prepare_reference
from picardopt_3d.world import Subject
from picardopt_3d.world.pictures import EXAMPLES, true_reference
from PIL import Image
from scipy import ndimage

VIEW = {"elevation": 20.0, "azimuth": 30.0, "distance": 1.65, "fov": 42.5}
SIZE = 128


@pytest.fixture(autouse=True)
def without_rembg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rembg", None)  # importing it fails, installed or not


def photo(alpha: int = 255) -> np.ndarray:
    """Something in every pixel, no two neighbours alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 4), dtype=np.uint8)
    pixels[..., 3] = alpha
    return pixels


def save(pixels: np.ndarray, path: Path, **options: int) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


# -- what counts as cut out --------------------------------------------------------------------------------


def test_a_photo_with_a_few_pixels_that_are_not_opaque_is_not_cut_out(tmp_path: Path) -> None:
    pixels = photo()
    pixels[40, 40, 3] = 254
    with pytest.raises(ValueError, match=r"no pixel is transparent.*--cut-background"):
        load_reference(save(pixels, tmp_path / "one.png"), **VIEW)
    pixels[:3, :3, 3] = 0  # a rounded corner
    with pytest.raises(ValueError, match=r"99\.9% of it is opaque"):
        load_reference(save(pixels, tmp_path / "corner.png"), **VIEW)
    pixels[20:60, 20:60, 3] = 0  # a hole in the middle
    with pytest.raises(ValueError, match=r"99% of its border is opaque"):
        load_reference(save(pixels, tmp_path / "hole.png"), **VIEW)


def test_an_object_may_touch_the_border() -> None:
    alpha = np.zeros((64, 64))
    alpha[20:, 10:50] = 1  # a bust
    assert why_not_cut_out(alpha) is None
    alpha[:, :] = 1
    alpha[:1] = alpha[-1:] = 0
    alpha[:, :1] = alpha[:, -1:] = 0  # nothing but a line around: 94 % of it is opaque
    assert why_not_cut_out(alpha) is None
    larger = np.ones((256, 256))
    larger[:1] = larger[-1:] = 0
    larger[:, :1] = larger[:, -1:] = 0
    assert why_not_cut_out(larger) == "98.4% of it is opaque"


# -- the flood fill ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [(255, 255, 255), (250, 250, 245), (20, 110, 60)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("name", ["red_chair", "blue_mug"])
def test_a_plain_background_is_cut_and_the_edge_stays_soft(
    background: tuple[int, int, int], kind: str, name: str, tmp_path: Path
) -> None:
    """Against the alpha that the picture was made with; its renderer smooths edges."""
    subject, elevation, azimuth = EXAMPLES[name]
    truth = true_reference(subject, orbit_cameras(elevation, azimuth), 4 * SIZE)
    colour, alpha = truth.at(SIZE)
    assert ((alpha > 0.2) & (alpha < 0.8)).sum() > 50  # an edge that is smoothed
    behind = torch.tensor(background)[:, None, None] / 255
    picture = (colour - (1 - alpha) + (1 - alpha) * behind).clamp(0, 1)
    pixels = picture.mul(255).round().movedim(0, -1).numpy()
    path = save(pixels, tmp_path / f"a.{kind}", **({"quality": 92} if kind == "jpg" else {}))
    found = load_reference(path, **VIEW, size=SIZE, framed=True, cut_background=True)

    enclosed = holes(alpha) if name == "blue_mug" else torch.zeros_like(alpha, dtype=torch.bool)
    off = (found.alpha - alpha).abs()[~enclosed]
    assert off.mean() < (0.002 if kind == "png" else 0.015)  # a hard edge: 0.01 to 0.035
    assert (off > 0.5).float().mean() < (0.0005 if kind == "png" else 0.004)
    # Over white the object shows nothing of its old background.
    shown = (found.rgb - colour).abs().amax(0, keepdim=True)[~enclosed]
    assert shown.mean() < (0.003 if kind == "png" else 0.02)
    assert (shown > 0.35).float().mean() < (0.0005 if kind == "png" else 0.01)


def holes(alpha: torch.Tensor) -> torch.Tensor:
    """What the border does not reach, and the object's edge around it."""
    clear = alpha[0].numpy() < 0.9
    border = np.ones_like(clear)
    border[1:-1, 1:-1] = False
    outside = ndimage.binary_propagation(border & clear, mask=clear)
    inner = ndimage.binary_dilation(clear & ~outside, iterations=2)
    return torch.from_numpy(inner)[None]


def test_white_parts_of_an_object_on_white_stay(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), 255)
    pixels[10:50, 10:50] = (200, 30, 30)
    pixels[25:35, 25:35] = 255  # a white eye
    path = save(pixels, tmp_path / "a.png")
    found = load_reference(path, **VIEW, size=64, framed=True, cut_background=True)
    expected = torch.zeros(64, 64)
    expected[10:50, 10:50] = 1
    torch.testing.assert_close(found.alpha[0], expected)
    torch.testing.assert_close(found.rgb[:, 30, 30], torch.ones(3))


def test_an_outline_of_another_colour_stays_and_specks_go(tmp_path: Path) -> None:
    pixels = np.full((96, 96, 3), 255)
    pixels[20:70, 20:70] = 128  # an outline, one pixel wide, around white
    pixels[21:69, 21:69] = 255
    pixels[4, 90] = 0
    path = save(pixels, tmp_path / "a.png")
    found = load_reference(path, **VIEW, size=96, framed=True, cut_background=True)
    expected = torch.zeros(96, 96)
    expected[20:70, 20:70] = 1
    torch.testing.assert_close(found.alpha[0], expected)


def test_what_was_cut_is_said_and_the_written_picture_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), (10, 200, 30))
    pixels[2:62, :] = (200, 30, 30)
    pixels[:, :2] = pixels[:, 62:] = (10, 200, 30)
    path = save(pixels, tmp_path / "a.png")
    note = prepare_reference(path, tmp_path / "b.png", share=1.0, cut_background=True)
    assert note == f"image={path}: cut the background RGB(10, 200, 30), 12% of the picture"
    # All of it is opaque; nobody asks again whether it is cut out.
    found = load_reference(tmp_path / "b.png", **VIEW, size=60, prepared=True)
    torch.testing.assert_close(found.alpha, torch.ones(1, 60, 60))
    cut = true_reference(Subject("cube", "red"), orbit_cameras(20.0, 30.0), 64)
    rgba = torch.cat([cut.rgb, cut.alpha]).mul(255).round().movedim(0, -1).numpy()
    path = save(rgba, tmp_path / "c.png")
    assert (
        prepare_reference(path, tmp_path / "d.png", cut_background=True) is None
    )  # it was cut out


def test_a_background_of_several_colours_is_refused(tmp_path: Path) -> None:
    gradient = np.repeat(np.linspace(60, 220, 96)[None, :, None], 96, 0).repeat(3, 2)
    gradient[30:60, 30:60] = (255, 0, 0)
    path = save(gradient, tmp_path / "gradient.png")
    with pytest.raises(ValueError, match=r"gradient\.png: --cut-background needs .* one colour"):
        load_reference(path, **VIEW, cut_background=True)
    with pytest.raises(ValueError, match=r"photo\.png: --cut-background needs .* one colour"):
        load_reference(save(photo(), tmp_path / "photo.png"), **VIEW, cut_background=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 40), (40, 2)])
def test_a_picture_of_a_line_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.full((*size, 3), 255)
    with pytest.raises(ValueError, match="nothing differs"):
        load_reference(save(pixels, tmp_path / "a.png"), **VIEW, cut_background=True)
    pixels[:, size[1] // 2 :] = 0
    with pytest.raises(ValueError, match=r"a\.png"):
        load_reference(save(pixels, tmp_path / "a.png"), **VIEW, cut_background=True)


def test_a_photo_in_a_frame_and_an_empty_page_are_refused(tmp_path: Path) -> None:
    page = np.full((96, 96, 3), 255)
    with pytest.raises(ValueError, match=r"RGB\(255, 255, 255\) nothing differs"):
        load_reference(save(page, tmp_path / "page.png"), **VIEW, cut_background=True)
    framed = np.full((192, 192, 3), 255)
    framed[1:-1, 1:-1] = 90
    with pytest.raises(ValueError, match=r"without its background .* 97\.\d% of it is opaque"):
        load_reference(save(framed, tmp_path / "framed.png"), **VIEW, cut_background=True)
