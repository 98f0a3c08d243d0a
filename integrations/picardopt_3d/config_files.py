"""Configurations as YAML files, and as the plain values in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import dacite
import yaml

from picardopt_3d.config import COMMANDS, RunConfig
from picardopt_3d.io import replacing
from picardopt_3d.methods import METHODS, Method, NamedStage, RecipeConfig, StageConfig
from picardopt_3d.scenes import SceneConfig
from picardopt_3d.tolerances import AdaptiveTol, FixedTol, TolConfig, parse_tolerance


def save_config(config: RunConfig[Any], path: Path) -> None:
    """Writes a configuration as YAML that `load_config` and `--config` read."""
    command = next(name for name, kind in COMMANDS.items() if type(config) is kind)
    with replacing(path) as temporary:
        content = {"command": command} | plain(config)
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def load_config(path: Path) -> RunConfig[Any]:
    """Reads what `save_config` wrote, by this version or an earlier one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no run's configuration; the message names the key.
    """
    content = read_yaml(path)
    command = content.pop("command", None)
    if command not in COMMANDS:
        raise ValueError(f"{path}: command={command!r}: give one of {', '.join(COMMANDS)}")
    method = find_method(content.get("method"), command)
    stage = only_first_stage(method, content.get("recipe"), str(path))
    recipe = method.config if stage is None else type(stage.config)
    config: RunConfig[Any] = build(COMMANDS[command], recipe, content, str(path))
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file's mapping; keys of earlier versions are converted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a YAML configuration")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: give a mapping of options, such as 'seed: 1'")
    return _converted(content)


def _converted(content: dict[str, Any]) -> dict[str, Any]:
    """Writes a recipe's tolerance as one text, where an earlier version had up to four keys for it."""
    recipe = content.get("recipe")
    picard = recipe.get("picard") if isinstance(recipe, dict) else None
    old = {"rule", "initial", "decay", "statistic"}
    if not isinstance(recipe, dict) or not isinstance(picard, dict) or not old & picard.keys():
        return content
    numbers = {name: picard[name] for name in ("initial", "decay", "statistic") if name in picard}
    adaptive = str(AdaptiveTol(**numbers))
    kept = {name: value for name, value in picard.items() if name not in old}
    if picard.get("rule") == "adaptive":
        kept["tolerance"] = adaptive
    content = content | {"recipe": recipe | {"picard": kept}}
    if content.get("tolerance") == "adaptive":  # it took the recipe's numbers, whatever its rule
        content["tolerance"] = adaptive
    return content


def find_method(name: Any, command: str) -> Method:
    """Returns a method of a command.

    Raises:
        ValueError: There is none of that name for it.
    """
    known = METHODS[command]
    if name not in known:
        raise ValueError(f"method={name!r}: give one of {', '.join(known)} ({command})")
    return known[name]


def find_preset(name: Any, method: Method) -> RecipeConfig:
    """Returns a method's preset.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in method.presets:
        raise ValueError(f"preset={name!r}: give one of {', '.join(method.presets)}")
    return method.presets[name]


def only_first_stage(method: Method, numbers: Any, source: str) -> NamedStage | None:
    """Returns the first stage of a method if a kept recipe is of it alone: an earlier version had no others.

    Args:
        method: The method.
        numbers: The recipe, as plain values.
        source: Where they are from, for errors.

    Raises:
        ValueError: Numbers are not under the name of a stage; the message names them and the stages.
    """
    if issubclass(method.config, StageConfig) or not isinstance(numbers, Mapping):
        return None
    stages = next(iter(method.presets.values())).stages()
    if method.had_one_stage and "steps" in numbers:
        return stages[0]
    known = {item.name for item in dataclasses.fields(method.config)}  # type: ignore[arg-type]
    if unknown := [str(key) for key in numbers if key not in known]:
        raise ValueError(
            f"{source}: recipe: {', '.join(unknown)}: no stage of this method; give options of a stage under its name, "
            f"one of {', '.join(stage.name for stage in stages)}"
        )
    return None


def build(kind: type[Any], recipe: type[Any], content: Mapping[str, Any], source: str) -> Any:
    """Builds a configuration from plain values.

    Args:
        kind: Its class, of runs; or a recipe's, and then `recipe` is the same.
        recipe: The class of the recipe in it.
        content: Plain values, as `plain` makes them.
        source: Where they are from, for errors.

    Raises:
        ValueError: A key is unknown or a value cannot be used; the message names it.
    """
    hooks: dict[Any, Any] = {float: float, TolConfig | None: _tolerance}
    options = dacite.Config(strict=True, cast=[tuple, Path], type_hooks=hooks)
    hooks[SceneConfig] = partial(_scene, options)
    try:
        return dacite.from_dict(kind if kind is recipe else kind[recipe], content, options)
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None


def _scene(options: dacite.Config, given: Any) -> Any:
    """Builds a scene's configuration, of the class whose fields are most like the given keys.

    dacite by itself tries one class after the other, and drops what each says is wrong.
    """
    if not isinstance(given, Mapping):
        return given

    def differing(kind: type[Any]) -> int:
        return len(given.keys() ^ {item.name for item in dataclasses.fields(kind)})

    return dacite.from_dict(min(get_args(SceneConfig), key=differing), given, options)


def _tolerance(given: Any) -> TolConfig | None:
    return None if given is None else parse_tolerance(given)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lays nested mappings over each other; the second one's values win."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def plain(value: Any) -> Any:
    """Returns a configuration as YAML can hold it."""
    if isinstance(value, FixedTol):
        return value.value
    if isinstance(value, TolConfig):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
