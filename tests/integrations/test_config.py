"""Presets, YAML files and dotted options, and what a run keeps of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from picardopt_3d.command import parse
from picardopt_3d.config import (
    ImageTo3DConfig,
    RunConfig,
    TextTo3DConfig,
)
from picardopt_3d.config_files import load_config, plain, save_config
from picardopt_3d.methods import METHODS, Method


def parsed(*arguments: str, command: str = "text-to-3d", out: Path) -> RunConfig:
    return parse(command, [*arguments, "--out", str(out)], "")


def run_of(
    method: str, preset: str, out: Path, command: str = "text-to-3d", **options: object
) -> RunConfig:
    entry = METHODS[command][method]
    common = {
        "out": out,
        "method": method,
        "preset": preset,
        "recipe": entry.presets[preset],
        **options,
    }
    if command == "text-to-3d":
        return TextTo3DConfig(prompt="a red cube", **common)
    return ImageTo3DConfig(image=Path("chair.png"), azimuth=30.0, **common)


@pytest.mark.parametrize(
    ("command", "method", "preset"),
    [
        (command, name, preset)
        for command, methods in METHODS.items()
        for name, method in methods.items()
        for preset in method.presets
    ],
)
def test_every_preset_is_kept_and_read_again(
    tmp_path: Path, command: str, method: str, preset: str
) -> None:
    for tolerance in (None, 0.0, 1e-6, math.inf, "adaptive"):
        config = run_of(method, preset, tmp_path / "run", command, tolerance=tolerance)
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


def test_options_go_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    small = METHODS["text-to-3d"]["dreamfusion"].presets["small"]
    file = tmp_path / "mine.yaml"
    file.write_text(
        "seed: 5\nwindow: 3\nrecipe:\n  batch: 2\n  steps: 40\n  rates: {encoding: 0.5}\n"
    )
    config = parsed(
        "a red cube", "--config", str(file), "--recipe.batch", "6", out=tmp_path / "run"
    )
    assert (config.seed, config.window, config.method, config.preset) == (
        5,
        3,
        "dreamfusion",
        "small",
    )
    assert config.recipe == replace(
        small, batch=6, steps=40, rates={**small.rates, "encoding": 0.5}
    )


@pytest.mark.parametrize("command", list(METHODS))
def test_the_help_names_every_method_and_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    with pytest.raises(SystemExit):
        parsed("--help", command=command, out=tmp_path / "run")
    said = capsys.readouterr().out.replace("│", " ").split()
    words = {word.strip("(),;:.") for word in said}
    assert words >= METHODS[command].keys()
    assert words >= {name for entry in METHODS[command].values() for name in entry.presets}


def test_a_method_of_two_commands_is_that_of_the_command_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nerf = METHODS["text-to-3d"]["dreamfusion"].presets["small-nerf"]
    textmesh = METHODS["text-to-3d"]["textmesh"]
    monkeypatch.setitem(METHODS["text-to-3d"], "both", Method(type(nerf), {"small": nerf}))
    monkeypatch.setitem(METHODS["image-to-3d"], "both", textmesh)
    for command, recipe in (("text-to-3d", nerf), ("image-to-3d", textmesh.presets["small"])):
        (tmp_path / command).mkdir()
        run = run_of("both", "small", tmp_path / command / "run", command)
        assert run.recipe == recipe
        save_config(run, tmp_path / f"{command}.yaml")
        assert load_config(tmp_path / f"{command}.yaml") == run
        asked = "a red cube" if command == "text-to-3d" else str(tmp_path / "chair.png")
        (tmp_path / "chair.png").touch()
        found = parsed(asked, "--method", "both", command=command, out=tmp_path / "new")
        assert found.recipe == recipe


def test_an_empty_recipe_in_a_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\nrecipe:\n")
    config = parsed("a red cube", "--config", str(file), out=tmp_path / "run")
    assert (config.seed, config.recipe) == (
        5,
        METHODS["text-to-3d"]["dreamfusion"].presets["small"],
    )


def test_a_kept_file_is_a_configuration_for_another_run(tmp_path: Path) -> None:
    first = run_of("dreamfusion", "small", tmp_path / "first", seed=9)
    save_config(first, tmp_path / "config.yaml")
    again = parsed("--config", str(tmp_path / "config.yaml"), "a blue mug", out=tmp_path / "second")
    assert again == replace(first, prompt="a blue mug", out=tmp_path / "second")


def test_schedules_can_be_given_as_options(tmp_path: Path) -> None:
    config = parsed(
        "a red cube",
        *("--recipe.pixels", "0", "16", "30", "32"),
        *("--recipe.weights.orientation", "0", "1.5", "20", "3"),
        out=tmp_path / "run",
    )
    assert config.recipe.pixels == ((0, 16), (30, 32))
    assert config.recipe.weights.orientation == ((0, 1.5), (20, 3.0))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_geometric_rates_are_a_list_of_names(tmp_path: Path) -> None:
    config = parsed("a red cube", "--recipe.geometric", "encoding", "networks", out=tmp_path / "a")
    assert config.recipe.geometric == ("encoding", "networks")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    (tmp_path / "mine.yaml").write_text("recipe: {geometric: [background]}")
    mine = parsed("a cube", "--config", str(tmp_path / "mine.yaml"), out=tmp_path / "b")
    assert mine.recipe.geometric == ("background",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: {geometric: [table]}", "geometric='table': give names of rates: encoding, net"),
        ("recipe: {bacth: 2}", "bacth"),
        ("recipe: {batch: many}", "batch"),
        ("recipe: {weights: {sds: -1}}", "weights.sds=-1"),
        ("recipe: [batch, 2]", "recipe=['batch', 2]: give a mapping"),
        ("method: alchemy", "give one of dreamfusion"),
        ("preset: huge", "give one of small"),
        ("command: image-to-3d", "another command"),
        ("colour: red", "colour"),
        ("- a\n- b", "give a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_a_file_has_wrong_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parsed("a red cube", "--config", str(file), out=tmp_path / "run")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        ("{count: 0}", "mine.yaml: count=0: give a whole number of at least 1"),
        ("{strategy: {every: 0}}", "mine.yaml: every=0: give a whole number of at least 1"),
        ("{strategy: {evry: 3}}", '"evry"'),
        ("{strategy: 3}", '"recipe.gaussians.scene.strategy"'),
        ("{rasterizer: cuda}", '"recipe.gaussians.scene.rasterizer"'),
        ("{samples: 3}", '"samples"'),
        ("3", '"recipe.gaussians.scene"'),
    ],
)
def test_what_a_file_has_wrong_of_gaussians_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scene: str, said: str
) -> None:
    begin = "method: dreamgaussian\nrecipe: {gaussians: {scene: "
    _refused(tmp_path, capsys, f"{begin}{scene}}}}}", said)


@pytest.mark.parametrize(
    ("preset", "scene", "said"),
    [
        ("small", "{samples: 0}", "mine.yaml: samples=0: give a positive number"),
        ("small", "{resolutions: [1]}", "resolutions=(1,): give at least one level"),
        ("small-nerf", "{blob_radius: -1}", "blob_radius=-1.0: give a positive number"),
        ("small-nerf", "{encoding: {levels: many}}", '"recipe.scene.encoding.levels"'),
        ("small-nerf", "{ocupancy: {every: 2}}", '"ocupancy"'),
        ("paper", "{occupancy: {every: 0}}", "every=0"),
    ],
)
def test_what_a_file_has_wrong_of_a_field_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str, scene: str, said: str
) -> None:
    _refused(tmp_path, capsys, f"preset: {preset}\nrecipe: {{scene: {scene}}}", said)


def _refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str) -> None:
    """Asserts that a file is refused in one line."""
    file = tmp_path / "mine.yaml"
    file.write_text(content + "\n")
    with pytest.raises(SystemExit) as stop:
        parsed("a red cube", "--config", str(file), out=tmp_path / "run")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_scene_of_an_earlier_version_lacks_what_came_since(tmp_path: Path) -> None:
    for method, preset in (("dreamgaussian", "small"), ("dreamfusion", "small-nerf")):
        config = run_of(method, preset, tmp_path / "run")
        content = {"command": "text-to-3d"} | plain(config)
        said, scene = content["recipe"], config.recipe.stages()[0].config.scene
        said = (said["gaussians"] if method == "dreamgaussian" else said)["scene"]
        for name, value in list(said.items())[-2:]:
            assert value == getattr(type(scene)(), name)  # its default
            del said[name]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        assert load_config(tmp_path / "config.yaml") == config


def test_a_picture_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(str(tmp_path / "no.png"), command="image-to-3d", out=tmp_path / "run")
    assert stop.value.code == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_subject_outside_the_built_in_world_is_refused(tmp_path: Path) -> None:
    config = run_of("zero123", "small", tmp_path, "image-to-3d")
    replace(config, subject="a red chair").check()
    with pytest.raises(ValueError, match=r"subject='a corgi'.*leave it out"):
        replace(config, subject="a corgi").check()


def test_the_file_is_plain_yaml(tmp_path: Path) -> None:
    config = run_of("dreamfusion", "paper", tmp_path / "run")
    save_config(config, tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert content.pop("command") == "text-to-3d"
    assert content == plain(config)
    assert content["recipe"]["guidance"]["model"] == "deepfloyd"
