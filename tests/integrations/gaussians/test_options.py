"""Options of scenes of Gaussians: what is refused, and what the command line can say."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from picardopt_3d.command import parse
from picardopt_3d.scenes import GaussiansConfig, StrategyConfig
from picardopt_3d.scenes.gaussians.strategy import due


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 2.5}, "count=2.5: give a whole number of at least 1"),
        ({"radius": math.inf}, "radius=inf: give a positive, finite number"),
        ({"degree": 2.0}, "degree=2.0: give 0, 1, 2 or 3"),
        ({"background": (0.0, math.nan, 0.0)}, "give red, green and blue in [0, 1]"),
        ({"background": (0.0, 1.1, 0.0)}, "background=(0.0, 1.1, 0.0): give red"),
        ({"background": (1.0, 1.0)}, "background=(1.0, 1.0): give red, green and blue"),
        ({"rasterizer": "cuda"}, "rasterizer='cuda': give 'auto', 'torch' or 'gsplat'"),
    ],
)
def test_a_scene_that_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        GaussiansConfig(**options)


@pytest.mark.parametrize("name", ["start", "stop", "every", "reset_every", "most"])
@pytest.mark.parametrize("value", [1.5, 2.0, math.nan, math.inf])
def test_numbers_of_steps_and_of_gaussians_are_whole(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: give a whole number"):
        StrategyConfig(**{name: value})  # type: ignore[arg-type]


def test_the_command_line_can_keep_the_number_of_gaussians(tmp_path: Path) -> None:
    said = ["--method", "dreamgaussian", "--recipe.gaussians.scene.strategy.stop", "0"]
    config = parse("text-to-3d", ["a red cube", *said, "--out", str(tmp_path / "run")], "")
    gaussians = config.recipe.gaussians
    strategy = gaussians.scene.strategy
    assert not any(due(strategy, step) for step in range(2 * gaussians.steps))


def test_a_file_can_keep_the_number_of_gaussians(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: dreamgaussian\nrecipe: {gaussians: {scene: {strategy: null}}}\n")
    said = ["a red cube", "--config", str(file), "--out", str(tmp_path / "run")]
    assert parse("text-to-3d", said, "").recipe.gaussians.scene.strategy is None


def test_the_help_says_how(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")  # one column of boxes
    with pytest.raises(SystemExit):
        parse("text-to-3d", ["--method", "dreamgaussian", "--help"], "")
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "0: they never are" in said
    assert "strategy: null" in said
