"""Tolerances: one text form for recipes, YAML files, command lines and Python."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from picardopt_3d.command import parse
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.config_files import load_config, save_config
from picardopt_3d.methods import METHODS
from picardopt_3d.picard import PicardConfig, PicardOptions
from picardopt_3d.run.prepare import prepared_stages
from picardopt_3d.tolerances import (
    AdaptiveTol,
    DriftTol,
    FixedTol,
    StepRelativeTol,
    TolConfig,
    parse_tolerance,
)

from picardopt import DriftTolerance, ParallelPicardOptimizer
from tests.integrations.helpers.tiny_runs import TINY, options

TEXTS: dict[str, TolConfig] = {
    "0": FixedTol(0.0),
    "1e-06": FixedTol(1e-6),
    "inf": FixedTol(math.inf),
    "adaptive": AdaptiveTol(),
    "adaptive:3e-05": AdaptiveTol(3e-5),
    "adaptive:5e-6, 0.8, mean": AdaptiveTol(5e-6, 0.8, "mean"),
    "adaptive:,,mean": AdaptiveTol(statistic="mean"),
    "drift": DriftTol(),
    "drift:0.25": DriftTol(0.25),
    "drift:0.25,0.1": DriftTol(0.25, 0.1),
    "drift:,0": DriftTol(drift=0.0),
    "step-relative": StepRelativeTol(),
    "step-relative:2,0.2": StepRelativeTol(2.0, 0.2),
    "step-relative:,0": StepRelativeTol(distance=0.0),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_file_command_line_and_python_say_the_same(tmp_path: Path, text: str) -> None:
    expected = TEXTS[text]
    assert parse_tolerance(text) == expected
    assert parse_tolerance(str(expected)) == expected
    options = ["a red cube", "--out", str(tmp_path / "run"), "--tolerance", text]
    config = parse("text-to-3d", [*options, "--recipe.picard.tolerance", text], "")
    assert config.tolerance == config.recipe.picard.tolerance == expected
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    (tmp_path / "own.yaml").write_text(f'tolerance: "{text}"\nrecipe: {{picard: {{window: 3}}}}\n')
    given = ["a red cube", "--config", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "run")]
    assert parse("text-to-3d", given, "").tolerance == expected
    common = {"prompt": "a red cube", "out": tmp_path, "method": "dreamfusion", "preset": "small"}
    small: Any = METHODS["text-to-3d"]["dreamfusion"].presets["small"]
    assert TextTo3DConfig(recipe=small, tolerance=text, **common).tolerance == expected


def test_a_number_is_enough_in_python_and_yaml(tmp_path: Path) -> None:
    assert parse_tolerance(0) == parse_tolerance(0.0) == FixedTol(0.0)
    (tmp_path / "own.yaml").write_text("tolerance: 1.0e-6\n")
    given = ["a red cube", "--config", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "run")]
    assert parse("text-to-3d", given, "").tolerance == FixedTol(1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("-1", "tolerance=-1"),
        ("nan", "tolerance=nan"),
        ("adaptative", "tolerance=adaptative: give 0 (exact)"),
        ("adaptive:-1", "initial=-1.0"),
        ("adaptive:1e-6,2", "decay=2.0"),
        ("adaptive:1e-6,0.5,mode", "statistic='mode'"),
        ("adaptive:1,1,mean,1", "at most 3 numbers: initial, decay, statistic"),
        ("drift:x", "tolerance=drift:x"),
        ("drift:-1", "noise=-1.0"),
        ("drift:0.5,nan", "drift=nan"),
        ("drift:0.5,0.2,0.9", "at most 2 numbers: noise, drift"),
        ("drifts", '"drift:0.2,0.05" (noise, drift)'),
        ("step-relative:x", "tolerance=step-relative:x"),
        ("step-relative:1,1,1", "decay=1.0"),
        (True, "tolerance=True"),
        ([1], "tolerance=[1]"),
    ],
)
def test_what_is_wrong_is_named(given: object, said: str) -> None:
    with pytest.raises(ValueError) as found:
        parse_tolerance(given)
    assert said in str(found.value)


def tolerance_of(recipe: TolConfig | None, asked: TolConfig | None) -> str:
    options = PicardOptions(PicardConfig(tolerance=recipe), tolerance=asked)
    return repr(options.arguments().get("tolerance"))


def test_numbers_left_out_are_the_recipes() -> None:
    paper = AdaptiveTol(30e-6, 0.8, "mean")
    own = "AdaptiveTolerance(3e-05, decay=0.8, 'mean')"
    assert tolerance_of(paper, None) == tolerance_of(paper, AdaptiveTol()) == own
    changed = "AdaptiveTolerance(1e-06, decay=0.8, 'mean')"
    assert tolerance_of(paper, AdaptiveTol(1e-6)) == changed
    usual = "AdaptiveTolerance(5e-06, decay=0.9, 'median')"
    assert tolerance_of(None, AdaptiveTol()) == tolerance_of(FixedTol(1.0), AdaptiveTol()) == usual
    assert tolerance_of(paper, FixedTol(0.0)) == "0.0"
    assert tolerance_of(paper, StepRelativeTol(3.0)).startswith("StepRelativeTolerance(3, ")
    careful = DriftTol(0.25, 0.1)
    assert tolerance_of(careful, DriftTol(drift=0.3)) == "DriftTolerance(noise=0.25, drift=0.3)"
    assert tolerance_of(careful, DriftTol()) == tolerance_of(careful, None)
    assert tolerance_of(paper, DriftTol()) == repr(DriftTolerance())
    assert tolerance_of(None, None) == "None"  # the optimizer's own default


# -- how many secants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "asked", "expected"), [(None, None, None), (3, None, 3), (3, 0, 0), (None, 5, 5)]
)
def test_the_optimizer_gets_as_many_secants_as_are_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: int | None,
    asked: int | None,
    expected: int | None,
) -> None:
    given = []

    class Noted(ParallelPicardOptimizer):
        def __init__(self, *bases: Any, secants: int | None = None, **others: Any) -> None:
            given.append(secants)
            super().__init__(*bases, secants=secants, **others)

    monkeypatch.setattr("picardopt_3d.picard.ParallelPicardOptimizer", Noted)
    own = replace(TINY, picard=PicardConfig(secants=recipe))
    (prepared,) = prepared_stages(options(tmp_path, recipe=own, secants=asked), resume=False)
    assert given == [expected]
    assert prepared.record.figures["secants"] == expected


def test_file_and_command_line_say_the_same_of_secants(tmp_path: Path) -> None:
    arguments = ["a red cube", "--out", str(tmp_path / "run"), "--recipe.picard.secants", "4"]
    config = parse("text-to-3d", [*arguments, "--secants", "0"], "")
    assert (config.secants, config.recipe.picard.secants) == (0, 4)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del kept["secants"], kept["recipe"]["picard"]["secants"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(kept))
    old = load_config(tmp_path / "old.yaml")
    assert (old.secants, old.recipe.picard.secants) == (None, None)


@pytest.mark.parametrize("name", ["--secants", "--recipe.picard.secants"])
def test_a_negative_number_of_secants_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit):
        parse("text-to-3d", ["a red cube", "--out", str(tmp_path / "run"), name, "-1"], "")
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "secants=-1: give a whole number of at least 0" in words
