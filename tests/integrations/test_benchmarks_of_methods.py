"""What `benchmarks/methods.py` and `benchmarks/gaussians_restructure.py` run, and how the second one counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from picardopt_3d.config import COMMANDS
from picardopt_3d.methods import METHODS

from picardopt.stats import SweepRecord

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("gaussians_restructure", "methods", "result_store", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gaussians_restructure
    import methods

    return {"methods": methods, "restructure": gaussians_restructure}


def test_every_method_is_measured_on_its_command(
    benchmarks: dict[str, ModuleType], tmp_path: Path
) -> None:
    methods = benchmarks["methods"]
    asked = {(command, method) for command, method, _ in methods.RECIPES.values()}
    assert asked == {(command, method) for command in METHODS for method in METHODS[command]}
    for recipe, (command, method, preset) in methods.RECIPES.items():
        caption = methods.captions(recipe)[0]
        found = {
            mode: methods.configuration(methods.Run(recipe, caption, mode), tmp_path)
            for mode in methods.MODES
        }
        own = METHODS[command][method].presets
        for config in found.values():
            config.check()
            assert type(config) is COMMANDS[command]
        assert found["default"].recipe == own[preset]
        ruled = found["the paper's rule"].recipe
        assert ruled.picard == own["paper"].picard
        assert ruled.steps == own[preset].steps


def test_runs_of_earlier_versions_keep_their_names(benchmarks: dict[str, ModuleType]) -> None:
    methods = benchmarks["methods"]
    stored = json.loads((BENCHMARKS / "results" / "methods.json").read_text())
    names = {
        methods.Run(recipe, caption, mode).name
        for recipe in methods.RECIPES
        for caption in methods.captions(recipe)
        for mode in methods.MODES
    }
    assert stored["runs"].keys() <= names
    assert stored["setup"] == {"views": methods.VIEWS}


def sweeps_of(strides: list[int], slots: int) -> list[SweepRecord]:
    steps = [sum(strides[:index]) for index in range(len(strides))]
    pairs = zip(steps, strides, strict=True)
    return [SweepRecord(step, slots, stride, slots) for step, stride in pairs]


@pytest.mark.parametrize(
    ("strides", "changes", "expected"),
    [
        # Steps 4 to 15 in five sweeps; the last two are far from changes and make 4 steps final: two too many.
        ([4, 1, 2, 1, 4, 4], [3, 15], {"steps_per_sweep_between": 4.0, "sweeps_a_change": 2.0}),
        # Nothing is lost: each sweep is as long as those far away.
        ([4] * 6, [3, 19], {"steps_per_sweep_between": 4.0, "sweeps_a_change": 0.0}),
        ([4, 4, 4], [3], {}),
        ([4, 1, 1, 1], [3, 5], {}),
    ],
)
def test_a_change_costs_what_the_sweeps_near_it_are_too_many(
    benchmarks: dict[str, ModuleType], strides: list[int], changes: list[int], expected: Any
) -> None:
    found = benchmarks["restructure"].between(sweeps_of(strides, 4), changes, 4)
    assert found == pytest.approx(expected)
