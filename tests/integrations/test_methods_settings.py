"""The published settings against `settings.csv`, whose rows name where each value was read.

*supplement*: Tables 3 and 4, appendices C to E and Algorithm 2 of the paper's (arXiv 2311.17082). *DreamPropeller*: a
file and a key of github.com/alexzhou907/DreamPropeller at d23f202, which carries the parts of threestudio that it
changed, and under dreamgaussian/ DreamGaussian; a key of a Python file is the default of a field there, or the
variable or function that holds the value.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import re
from collections.abc import Mapping, Sequence, Set
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from picardopt_3d.config import COMMANDS
from picardopt_3d.methods import METHODS, StageConfig, dreamfusion
from picardopt_3d.prompts import ViewWords
from picardopt_3d.scenes import NerfConfig, SdfConfig, trained_groups

Row = dict[str, str]
Key = tuple[str, str, str, str]
"""A command, a method of it, a preset of that and a stage of that; "only" in a preset of one stage."""
TABLE = Path(__file__).with_name("settings.csv")

NOT_IN_THE_TABLE = {
    "guidance.options",
    "guidance.source",  # where it is to be had today
    "picard.secants",  # none, beside the tolerance of the paper
    "scene.background_colour",
    "scene.inverse_deviation",
    "scene.learn_deviation",
    "scene.sharpest",  # threestudio's 80
    "scene.encoding.after",  # of an encoding that is whole from the start
    "scene.encoding.every",
    "scene.occupancy.every",  # nerfacc's own, 16
    "scene.occupancy.threshold",  # follows from radius and samples; tested below
    "scene.strategy.most",  # a limit of ours
    "scene.rasterizer",  # of the machine, not of the method
    "scene.surface_density",  # of meshes, not of training
    "vsd.seed",
}
"""Settings that no source names for every method, and that a row may be without."""

USUAL: dict[str, Any] = {
    "geometric": (),
    "guidance.loss": "sds",
    "guidance.lora_source": None,
    "guidance.negative": "",
    "guidance.perp_neg": None,
    "guidance.views": None,
    **{f"guidance.views.{name}": value for name, value in vars(ViewWords()).items()},
    "momentum": None,
    "optimizer": "Adam",
    "scene.normal_step": 0.01,  # of analytic normals, which do without
    "sds.clip_norm": None,
    "sds.clip_value": None,
    "shading.ambient": 0.1,
    "shading.diffuse": 0.9,
    "shading.distance": (0.8, 1.5),
    "timesteps.between": None,  # of levels that stay, or move in all steps
    "timesteps.clip": (0.0, 1.0),
    "vsd.clip_norm": None,
    "vsd.clip_value": None,
    "vsd.lora": "inside",  # the published way is not exact
    "weight_decay": None,  # the optimizer's own
}
"""Settings that need a row only where a stage has another value."""


def rows() -> list[Row]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def key_of(row: Row) -> Key:
    return row["command"], row["method"], row["preset"], row["stage"]


def paper_presets() -> dict[Key, StageConfig]:
    """Every stage of every preset with published settings."""
    return {
        (command, method, preset, "only" if len(config.stages()) == 1 else stage.name): stage.config
        for command, methods in METHODS.items()
        for method, entry in methods.items()
        for preset, config in entry.presets.items()
        if preset.startswith("paper")
        for stage in config.stages()
    }


def idle(config: StageConfig) -> set[str]:
    """Settings that nothing reads: those of other losses, of lights that are never lit, and of empty groups."""
    found = {"sds", "vsd", "denoise"} - {config.guidance.loss}
    found |= {
        f"rates.{name}" for name, filled in trained_groups(config.scene).items() if not filled
    }
    shading = getattr(config, "shading", None)
    if shading is not None and not shading.diffuse_probability:
        unread = ("ambient_steps", "textureless_probability", "soft", "placement")
        found |= {f"shading.{name}" for name in unread}
    return found


def settings(config: Any, left_out: Set[str] = frozenset(), prefix: str = "") -> dict[str, Any]:
    """Every number of a configuration, by its dotted name."""
    found: dict[str, Any] = {}
    entries = config if isinstance(config, Mapping) else vars(config)
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if name in left_out:
            continue
        parts = dataclasses.is_dataclass(value) or isinstance(value, Mapping)
        found |= (
            settings(value, left_out, f"{name}.")
            if parts and name not in NOT_IN_THE_TABLE
            else {name: value}
        )
    return found


def _entry(config: Any, name: str) -> Any:
    return config[name] if isinstance(config, Mapping) else getattr(config, name)


def mismatches(table: Sequence[Row]) -> list[str]:
    """Rows that a preset does not have, settings of presets without a row, and presets without rows."""
    presets, wrong = paper_presets(), []
    seen: dict[Key, set[str]] = {key: set() for key in presets}
    for row in table:
        key, name = key_of(row), row["setting"]
        if key not in presets:
            wrong.append(f"{key}: no such preset")
            continue
        if name in seen[key]:
            wrong.append(f"{key}: {name} twice")
        seen[key].add(name)
        expected = ast.literal_eval(row["value"])
        try:
            value = reduce(_entry, name.split("."), presets[key])
        except (AttributeError, KeyError):
            wrong.append(f"{key}: no setting {name}")
            continue
        if value != expected or not row["source"]:
            wrong.append(f"{key}: {name} is {value!r}, not {expected!r} ({row['source']})")
    for key, config in presets.items():
        needed = {
            name
            for name, value in settings(config, idle(config)).items()
            if name not in USUAL or value != USUAL[name]
        }
        left = needed - seen[key] - NOT_IN_THE_TABLE
        wrong += [f"{key}: {name} has no row" for name in sorted(left)]
    return wrong


def test_no_preset_is_inexact() -> None:
    """Nor are the small ones."""
    presets = [
        preset
        for methods in METHODS.values()
        for entry in methods.values()
        for preset in entry.presets.values()
    ]
    configs = [stage.config for preset in presets for stage in preset.stages()]
    assert len(configs) > len(paper_presets())
    assert {config.caution for config in configs} == {None}


def test_every_published_setting_is_that_of_the_table() -> None:
    assert mismatches(rows()) == []
    presets = {key_of(row) for row in rows()}
    assert presets == paper_presets().keys()
    assert len(presets) >= 4


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch", "15"),
        ("picard.tolerance.initial", "5e-5"),
        ("weights.sds", "0.5"),
        ("eps", "1e-8"),
    ],
)
@pytest.mark.parametrize("key", sorted(paper_presets()), ids="-".join)
def test_a_wrong_value_in_the_table_is_found(key: Key, setting: str, value: str) -> None:
    table = rows()
    for row in table:
        if (*key_of(row), row["setting"]) == (*key, setting):
            if ast.literal_eval(row["value"]) == ast.literal_eval(value):
                value = "7e-7"
            row["value"] = value
    assert [setting in message for message in mismatches(table)] == [True]


def test_every_row_names_a_source_that_a_reader_can_open() -> None:
    """A table, an algorithm or an appendix of the supplement; or a file of the released code, and a key in it."""
    supplement = re.compile(
        r"supplement (Algorithm 2|Table [34]( and appendix D)?|appendix [CDE])(: .+)?"
    )
    released = re.compile(
        r"DreamPropeller ((dreamgaussian/)?configs/[\w-]+\.yaml|(threestudio|dreamgaussian)/[\w/]+\.py) "
        r"[\w.]+( .+)?"
    )
    unnamed = [
        row
        for row in rows()
        if not any(form.fullmatch(row["source"]) for form in (supplement, released))
    ]
    assert unnamed == []


def test_rows_that_are_missing_or_of_nothing_are_found() -> None:
    table = rows()
    key, name = key_of(table[0]), table[0]["setting"]
    assert mismatches(table[1:]) == [f"{key}: {name} has no row"]
    without = [row for row in table if row["setting"] != "steps"]
    assert len(mismatches(without)) == len(paper_presets())
    for setting in ("optimizer", "guidance.loss", "guidance.views.front_threshold"):
        unusual = next(
            row
            for row in table
            if row["setting"] == setting and ast.literal_eval(row["value"]) != USUAL[setting]
        )
        without = [row for row in table if row is not unusual]
        assert mismatches(without) == [f"{key_of(unusual)}: {setting} has no row"]
    misspelt = [*table[:-1], table[-1] | {"setting": "scene.occupancy.decline"}]
    assert any("no setting" in message for message in mismatches(misspelt))
    assert any(
        "no such preset" in message for message in mismatches([*table, table[0] | {"stage": "x"}])
    )


def test_an_occupied_cell_is_one_that_the_released_code_samples() -> None:
    scenes: list[Any] = [config.scene for config in paper_presets().values()]
    fields = [scene for scene in scenes if isinstance(scene, NerfConfig | SdfConfig)]
    assert len(fields) >= 4
    for scene in fields:
        # The diagonal of the cube in 512 steps; opacity from 0.01 on, linearized as there.
        step = 1.732 * 2 * scene.radius / scene.samples
        assert scene.occupancy.threshold == pytest.approx(0.01 / step, rel=2e-3)
        assert scene.occupancy.every == 16


def test_the_register_holds_presets_of_its_own_classes() -> None:
    assert {command: list(methods) for command, methods in METHODS.items()} == {
        "text-to-3d": ["dreamfusion", "textmesh", "magic3d", "dreamgaussian", "prolificdreamer"],
        "image-to-3d": ["zero123", "zero123-gaussians", "dreamgaussian"],
    }
    assert METHODS.keys() == COMMANDS.keys()
    for entry in (entry for methods in METHODS.values() for entry in methods.values()):
        assert {"small", "paper"} <= entry.presets.keys()
        assert all(type(config) is entry.config for config in entry.presets.values())
    assert METHODS["text-to-3d"]["dreamfusion"].presets["paper"] is dreamfusion.PAPER
