"""How many workers and which window a run takes that names neither: what its recipe's measured curve says.

`curves.json` holds what was measured of presets, by kind of device (`benchmarks/recipe_curves.py`). Runs of other
recipes, or with other options for running ahead, take a worker for each device and the recipe's window, or a step for
each worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from picardopt.links import LOOPBACK, NVLINK
from picardopt.planner import Measured, Option, options
from picardopt.recommendation import Plan, milliseconds
from picardopt_3d.config import COMMANDS, RunConfig
from picardopt_3d.config_files import find_method
from picardopt_3d.devices import default_workers, pick_device

CURVES = Path(__file__).parents[1] / "curves.json"
_DECIDING = ("workers", "window", "tolerance", "predictor", "secants")
"""Options without which a preset's curve says what a run does."""

C = TypeVar("C", bound=RunConfig[Any])


def with_choice(config: C) -> tuple[C, str | None]:
    """Returns the options with workers and window, and why; those that were given if there is nothing to choose.

    Args:
        config: The run's options.
    """
    devices = default_workers(config.device)
    given = config.sequential or any(getattr(config, name) is not None for name in _DECIDING)
    if given or devices == 1:
        return config, None
    device = pick_device(config.device).type
    entry = _curve_of(config, device)
    if entry is None:
        return config, None
    chosen = _best(measured_of(entry["measured"]), devices, device)
    plan = f"{milliseconds(chosen.seconds)} a step by the curve of preset {config.preset} on {entry['machine']}"
    why = f"workers={chosen.picard}, window={chosen.window}: {plan}"
    return replace(config, workers=chosen.picard, window=chosen.window), why


def _curve_of(config: RunConfig[Any], device: str) -> dict[str, Any] | None:
    """Returns the curve of a run's recipe, if it is a preset's as it is and has one."""
    command = next(name for name, kind in COMMANDS.items() if type(config) is kind)
    preset = find_method(config.method, command).presets.get(config.preset)
    if preset != config.recipe:
        return None
    key = {"command": command, "method": config.method, "preset": config.preset, "device": device}
    for entry in json.loads(CURVES.read_text())["curves"]:
        found: dict[str, Any] = entry
        if key.items() <= found.items():
            return found
    return None


def _best(measured: Measured, devices: int, device: str) -> Option:
    """Returns what is recommended of the ways in which a run can use its devices: it splits no batch."""
    link = LOOPBACK if device == "cpu" else NVLINK
    whole = replace(measured, drifts={measured.batch: measured.drifts[measured.batch]})
    return Plan(devices, link, whole, options(whole, link, devices)).recommended


def measured_of(content: Mapping[str, Any]) -> Measured:
    """Reads what `Plan.as_dict` wrote of its measurements; JSON has no whole numbers as keys."""
    known = {item.name for item in fields(Measured)}
    values: dict[str, Any] = {
        name: {int(key): each for key, each in value.items()} if isinstance(value, dict) else value
        for name, value in content.items()
        if name in known
    }
    return Measured(**values)
