"""What `benchmarks/methods.py` and `benchmarks/gaussians_restructure.py` run, and how the second one counts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from picardopt_3d.config import COMMANDS
from picardopt_3d.methods import METHODS, Method
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import load_scene

from picardopt.stats import SweepRecord
from tests.integrations.helpers.two_stages import RECIPE, TwoStages

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("gaussians_restructure", "methods", "method_runs", "result_store", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gaussians_restructure
    import method_runs
    import methods

    return {"methods": methods, "runs": method_runs, "restructure": gaussians_restructure}


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
        stages = own[preset].stages()
        if recipe in benchmarks["runs"].FIRST_STAGE:
            stages = stages[:1]
        for config in found.values():
            config.check()
            assert type(config) is COMMANDS[command]
        assert [each.config for each in found["default"].recipe.stages()] == [
            each.config for each in stages
        ]
        ruled, paper = found["the paper's rule"].recipe.stages(), own["paper"].stages()
        assert len(ruled) == len(stages)
        for changed, published, small in zip(ruled, paper, stages, strict=False):
            assert changed.config == replace(small.config, picard=published.config.picard)
            assert changed.config.picard.window == 7


def test_of_several_stages_each_is_measured_at_one_size_and_counted(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages of one kind, that of the second one at more pixels; the second run is not the first one's equal."""
    methods = benchmarks["methods"]
    preset = {"small": RECIPE, "paper": RECIPE}
    monkeypatch.setitem(METHODS["text-to-3d"], "both", Method(TwoStages, preset))
    monkeypatch.setitem(methods.RECIPES, "both", ("text-to-3d", "both", "small"))
    monkeypatch.setattr(methods, "VIEWS", 4)
    monkeypatch.setitem(methods.MODES, "default", {"window": 3, "tolerance": 0.0})
    runs = {}
    for mode in ("sequential", "default", "another seed"):
        name, found = methods.optimize((methods.Run("both", "a red cube", mode), tmp_path))
        runs[name] = json.loads(json.dumps(found))
        assert found["size"] == 12
        assert (found["steps"], found["psnr"]) == (10, found["stages"]["fine"]["psnr"])
        assert [stage["steps"] for stage in found["stages"].values()] == [4, 6]
        evaluations = [stage["drift_evaluations"] for stage in found["stages"].values()]
        assert found["drift_evaluations"] == sum(evaluations)
        folder = RunFolder(methods.Run("both", "a red cube", mode).folder(tmp_path)).begun()[0]
        cube = methods.subject("a red cube")
        coarse = methods.psnr_against_truth(load_scene(folder.scene), cube, 12)
        assert found["stages"]["coarse"]["psnr"] == coarse
    sequential, early, other = runs.values()
    assert "bitwise" not in sequential
    assert (early["bitwise"], other.get("bitwise", False)) == (True, False)
    assert all(stage["bitwise"] for stage in early["stages"].values())
    assert early["drift_evaluations"] > early["steps"]
    monkeypatch.setattr(benchmarks["runs"], "TEXTS", ("a red cube",))
    monkeypatch.setattr(methods, "RECIPES", {"both": methods.RECIPES["both"]})
    table = methods.body({"runs": runs})[1]
    for part in ("both: coarse", "both: fine", "both"):
        assert f"| {part} | sequential | " in table
    assert f"{early['stages']['coarse']['psnr']:.1f}, {early['psnr']:.1f} dB" in table


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
