"""`picardopt compare`: runs side by side on one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from picardopt_3d.pages.command import main
from picardopt_3d.pages.compare import figures, short_names

from tests.integrations.helpers.browser import Opened
from tests.integrations.pages.runs import finished_run, scene_of_a_run
from tests.integrations.pages.test_viewer import HOSTILE

Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: of one prompt, of which the second was faster, and one with another method and a hostile title."""
    root = tmp_path_factory.mktemp("runs")
    options = {"seed": 0, "out": "a", "recipe": {"batch": 4, "weights": {"sparsity": 0.1}}}
    finished_run(root / "first", scene_of_a_run(), options)
    changed = {"seed": 1, "out": "b", "recipe": {"batch": 4, "weights": {"sparsity": 0.1}}}
    finished_run(root / "second", scene_of_a_run(), changed, seconds=4.0, psnr=20.5)
    third = {"seed": 1, "out": "c", "recipe": {"batch": 2, "coarse": HOSTILE}}
    odd = finished_run(root / "third", scene_of_a_run(), third, title=HOSTILE, psnr=None)
    odd.film.unlink()
    return [root / "first", root / "second", root / "third"]


def cells(shown: Opened, label: str) -> list[str]:
    """The cells of the line with this label."""
    line = shown.page.get_by_role("row").filter(
        has=shown.page.get_by_role("rowheader", name=label, exact=True)
    )
    return [text.strip() for text in line.locator("td").all_inner_texts()]


def test_two_runs_of_a_prompt(
    runs: list[Path], tmp_path: Path, open_page: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.html"
    main([str(runs[0]), str(runs[1]), "--out", str(out)])
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 2 runs side by side\n")
    assert "second: PSNR 20.50 dB, Steps a sweep 3.00, Optimization 4.0 s" in said
    shown = open_page(out)
    assert shown.page.locator("h1").inner_text() == "a red cube"
    assert cells(shown, "PSNR") == ["20.00 dB", "20.50 dB\n+0.50 dB"]
    assert cells(shown, "Optimization") == ["8.0 s", "4.0 s\n2.00 times as fast"]
    assert cells(shown, "seed") == ["0", "1"]
    assert shown.page.get_by_text("recipe.batch").count() == 0  # equal, and only counted
    assert "2 settings are equal" in shown.page.locator(".help").inner_text()
    assert shown.page.locator("svg rect").count() == 20


def test_one_slider_turns_all_and_shows_colours_or_normals(
    runs: list[Path], tmp_path: Path, open_page: Open
) -> None:
    main([str(runs[0]), str(runs[1]), "--out", str(tmp_path / "compare.html")])
    shown = open_page(tmp_path / "compare.html")
    shown.page.locator("#turn").fill("180")
    for index in (0, 1):
        strip = shown.page.locator(".strip.colour").nth(index)
        assert strip.is_visible()
    assert shown.picture(".strip.colour").mean() == pytest.approx(120 / 255, abs=0.02)
    box = shown.page.locator(".strip.colour").nth(1).bounding_box()
    shown.page.mouse.move(box["x"] + 20, box["y"] + 20)
    shown.page.mouse.down()
    shown.page.mouse.move(box["x"] + 70, box["y"] + 20)
    shown.page.mouse.up()
    assert shown.page.locator("#turn").input_value() == "150"
    assert shown.picture(".strip.colour").mean() == pytest.approx(100 / 255, abs=0.02)
    shown.page.get_by_text("Normals", exact=True).click()
    assert not shown.page.locator(".strip.colour").first.is_visible()
    assert shown.picture(".strip.normals")[..., 2].mean() > 0.9


def test_runs_of_different_methods_and_without_a_film(
    runs: list[Path], tmp_path: Path, open_page: Open
) -> None:
    out = tmp_path / "compare.html"
    main([*(str(run) for run in runs), "--out", str(out)])
    shown = open_page(out, viewport={"width": 360, "height": 740})
    assert shown.page.locator("h1").inner_text() == "3 runs"
    assert shown.page.get_by_text("no film").count() == 1
    assert cells(shown, "PSNR")[2] == "-"
    shown.page.get_by_text("Settings that only some of the runs have (2)").click()
    assert cells(shown, "recipe.coarse") == ["-", "-", HOSTILE]
    assert shown.page.evaluate("window.hacked") is None
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert short_names([Path("/a/x"), Path("/b/x"), Path("/c/y")]) == ["a/x", "b/x", "c/y"]


def test_figures_that_no_run_has_are_left_out() -> None:
    rows = figures([{"psnr": None, "seconds": 2.0}, {"seconds": 0.0}])
    assert [(row.label, [*row.cells]) for row in rows] == [
        ("Optimization", [("2.0 s", ""), ("0.0 s", "")])
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "RUN"], "fewer than two runs"),
        (["RUN", "NONE"], "there is no such folder"),
        (["RUN", "OTHER", "--out", "page.txt"], "give a file that ends in .html"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(
    runs: list[Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    meant = {"RUN": str(runs[0]), "OTHER": str(runs[1]), "NONE": str(runs[0] / "none")}
    with pytest.raises(SystemExit) as stop:
        main([meant.get(each, each) for each in arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
