"""The page of a run, in a real browser: it shows the object, turns, runs no other script, asks for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.export.command import main as export
from picardopt_3d.pages.viewer import save_viewer
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.finished import open_scene
from picardopt_3d.scenes import Gaussians, GaussiansConfig, Scene, TexturedMesh
from picardopt_3d.world import SHAPES

from tests.integrations.helpers.analytic import voxels
from tests.integrations.helpers.browser import PLAIN, Opened
from tests.integrations.helpers.splats import random_splats
from tests.integrations.meshes.test_textured import SMALL, quadrants, square
from tests.integrations.pages.runs import FRAMES, REPORT, finished_run, scene_of_a_run

Open = Callable[..., Opened]
WHITE = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a red block that lies off the axis."""
    folder = finished_run(tmp_path_factory.mktemp("runs") / "block", scene_of_a_run())
    save_viewer(folder, scene_of_a_run(), REPORT)
    return folder.page


def chair() -> Scene:
    return voxels(SHAPES["chair"], (0.1, 0.2, 0.9), 40)


def picture() -> Scene:
    triangles, unwrapped = square()
    return TexturedMesh(
        replace(SMALL, texture=16),
        triangles._replace(vertices=0.4 * triangles.vertices),
        unwrapped,
        quadrants(),
    )


def cloud() -> Scene:
    splats = random_splats(60, scale=0.06, opacity=1.0, radius=0.35, dtype=torch.float32)
    return Gaussians(GaussiansConfig(count=60), splats)


@pytest.mark.parametrize("make", [chair, picture, cloud])
def test_the_object_looks_as_the_scene_renders_it(
    tmp_path: Path, open_page: Open, make: Callable[[], Scene]
) -> None:
    scene = make().eval().requires_grad_(False)
    folder = finished_run(tmp_path / "run", scene)
    save_viewer(folder, scene, REPORT | {"size": 128})
    shown = open_page(folder.page)
    shown.page.add_style_tag(content=PLAIN)
    if not isinstance(scene, Gaussians):
        shown.page.get_by_text("Colour", exact=True).click()
    shown.drawn()
    for azimuth in (35, 110):
        shown.page.locator("#turn").fill(str(azimuth))
        camera = orbit_cameras(15.0, torch.tensor([float(azimuth)]), *REPORT["view"])
        wanted = render_rgb(scene, camera, 128, background=WHITE)[0].permute(1, 2, 0).numpy()
        assert np.abs(1 - wanted).mean() > 0.02  # there is something to see
        error = float(np.square(shown.picture() - wanted).mean())
        other = float(np.square(shown.picture()[:, ::-1] - wanted).mean())
        assert error < 0.006
        assert error < 0.25 * other  # mirrored it would not do


def red(pixels: np.ndarray) -> np.ndarray:
    """Which pixels show the block."""
    return (pixels[..., 0] > 0.35) & (pixels[..., 1] < 0.3) & (pixels[..., 2] < 0.3)


def middle(pixels: np.ndarray) -> float:
    """How far right the block is, as a share of the width."""
    return float(np.nonzero(red(pixels))[1].mean() / pixels.shape[1])


def test_it_turns_by_drag_wheel_touch_keys_and_slider(run: Path, open_page: Open) -> None:
    shown = open_page(run, has_touch=True)
    page, count = shown.page, shown.drawn()
    first = shown.picture()
    assert red(first).mean() > 0.01
    box = page.locator("canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def angle() -> int:
        return int(page.locator("#turn").input_value())

    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 60, y + 40, steps=3)
    page.mouse.up()
    count = shown.drawn(count)
    dragged = shown.picture()
    assert np.abs(dragged - first).max() > 0.3
    assert middle(dragged) < middle(first) - 0.02  # what is seen goes with the pointer
    assert angle() == 30

    page.mouse.wheel(0, -400)
    count = shown.drawn(count)
    nearer = shown.picture()
    assert red(nearer).sum() > 1.1 * red(dragged).sum()

    page.locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    shown.drawn(count)
    assert angle() == 25
    page.keyboard.press("Home")
    inner = np.s_[8:-8, 8:-8]  # without the ring of what has the focus
    assert np.abs(shown.picture() - first)[inner].max() < 0.02

    touches = page.context.new_cdp_session(page)
    for kind, at in (("touchStart", x), ("touchMove", x - 30), ("touchMove", x - 60)):
        points = [{"x": at, "y": y}]
        touches.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touches.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert angle() not in (0, 25)
    assert middle(shown.picture()) < middle(first) - 0.02

    page.locator("#turn").fill("90")
    assert angle() == 90
    strip = shown.picture(".strip")
    assert strip.mean() == pytest.approx(
        20 * FRAMES // 4 / 255, abs=0.02
    )  # the film's frame from there


def test_it_spins_until_told_to_stop(run: Path, open_page: Open) -> None:
    shown = open_page(run)
    shown.drawn()
    shown.page.get_by_role("button", name="Spin").click()
    shown.page.wait_for_function("() => Number(document.getElementById('turn').value) > 3")
    shown.page.get_by_role("button", name="Stop").click()
    shown.settled()
    before = shown.page.locator("#turn").input_value()
    shown.page.wait_for_timeout(150)
    assert shown.page.locator("#turn").input_value() == before


def test_looks_differ(run: Path, open_page: Open) -> None:
    shown = open_page(run)
    shown.drawn()
    lit = shown.picture()
    shown.page.get_by_text("Normals", exact=True).click()
    assert np.abs(shown.picture() - lit).max() > 0.3
    assert red(shown.picture()).sum() < 0.1 * red(lit).sum()


HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "{{ 7 * 7 }} \"'><svg onload=window.hacked=3>"
)


def test_a_prompt_runs_no_script(tmp_path: Path, open_page: Open) -> None:
    report = {"title": HOSTILE, "method": HOSTILE, "guidance_source": HOSTILE}
    folder = finished_run(tmp_path / "run", scene_of_a_run(), {"prompt": HOSTILE}, **report)
    save_viewer(folder, scene_of_a_run(), REPORT | report)
    shown = open_page(folder.page)
    shown.drawn()
    assert shown.page.locator("h1").inner_text() == HOSTILE
    assert shown.page.title().startswith(HOSTILE)
    assert shown.page.evaluate("window.hacked") is None


def test_what_is_smuggled_in_is_not_run_either(run: Path, tmp_path: Path, open_page: Open) -> None:
    """Escaping is one lock; the policy, which names the page's own script alone, is the other."""
    smuggled = "<script>window.hacked = 1</script><img src='https://example.org/x.png'></main>"
    other = tmp_path / "viewer.html"
    other.write_text(run.read_text().replace("</main>", smuggled))
    shown = open_page(other)
    shown.drawn()
    assert shown.page.evaluate("window.hacked") is None
    assert shown.requests == []
    assert len(shown.troubles) == 2  # the browser says that it ran neither
    assert all("Content Security Policy" in trouble for trouble in shown.troubles)
    shown.troubles.clear()


def test_a_scene_without_a_surface_has_a_page(tmp_path: Path, open_page: Open) -> None:
    empty = voxels(lambda points: points.norm(dim=-1) + 1, (0.5, 0.5, 0.5), 8)
    folder = finished_run(tmp_path / "run", empty)
    said = save_viewer(folder, empty, REPORT)
    assert said.startswith("There is no object to turn")
    shown = open_page(folder.page)
    assert shown.page.locator("canvas").count() == 0
    assert said in shown.page.locator(".stage").inner_text()
    shown.page.locator("#turn").fill("90")
    assert shown.picture(".strip").mean() == pytest.approx(60 / 255, abs=0.02)


def test_a_browser_without_webgl_shows_the_film(run: Path, open_page: Open) -> None:
    shown = open_page(run)
    shown.page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    shown.page.reload()
    shown.page.get_by_text("The object cannot be shown").wait_for()
    assert not shown.page.locator("canvas").is_visible()


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of a colour as a browser computes it."""
    numbers = [float(each) / 255 for each in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in numbers]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_in_light_and_dark(
    run: Path, open_page: Open, scheme: str
) -> None:
    shown = open_page(run, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    shown.drawn()
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360
    style = "selector => getComputedStyle(document.querySelector(selector))"
    card = luminance(shown.page.evaluate(f"({style})('section').backgroundColor"))
    assert (card > 0.5) == (scheme == "light")
    for selector in ("dd", ".soft", ".help", "summary", "figcaption"):
        text = luminance(shown.page.evaluate(f"({style})('{selector}').color"))
        ratio = (max(card, text) + 0.05) / (min(card, text) + 0.05)
        assert ratio >= 4.5, selector
    assert shown.page.locator("img:not([alt])").count() == 0
    assert shown.page.locator("canvas").get_attribute("aria-label")


def test_an_older_run_gets_its_page_by_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_run(tmp_path / "run", scene_of_a_run())
    export([str(folder.path), "--format", "html"])
    assert "triangles" in capsys.readouterr().out
    other = tmp_path / "other.html"
    export([str(folder.path), "--out", str(other)])
    assert other.read_text() == folder.page.read_text()
    assert len(other.read_text()) < 300_000
    with pytest.raises(SystemExit):
        export([str(folder.path), "--format", "html", "--faces", "100"])
    assert "--faces: of no use for format html" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export([str(folder.path / "scene.safetensors"), "--format", "html"])
    assert "is no folder of a run" in capsys.readouterr().err
    assert isinstance(open_scene(folder.scene), Scene)
