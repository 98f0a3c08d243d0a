"""Runs of a coarse stage and of a finer one that begins with its scene."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.methods import METHODS, Method, RecipeConfig
from picardopt_3d.methods.dreamfusion import DreamFusion, DreamFusionConfig
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.run.worker import train
from picardopt_3d.scenes import FieldConfig
from safetensors.torch import load_file

from tests.integrations.helpers.stopping import stopped
from tests.integrations.helpers.tiny_runs import TINY, options


@dataclass(frozen=True, kw_only=True)
class TwoStages(RecipeConfig):
    """A coarse stage, and a finer one that begins with its scene."""

    coarse: DreamFusionConfig
    fine: DreamFusionConfig
    note: str = "no stage"


FIELD = FieldConfig(resolutions=(4, 8), samples=8)
RECIPE = TwoStages(
    coarse=replace(TINY, steps=4, pixels=8, scene=FIELD),
    fine=replace(TINY, steps=6, pixels=12, scene=replace(FIELD, resolutions=(4, 12))),
)


def two_stages(out: Path, **changes: Any) -> TextTo3DConfig[Any]:
    return options(out, **({"recipe": RECIPE, "window": 3, "tolerance": 0.0} | changes))


def run_until(config: TextTo3DConfig[Any], stage: int, at: int) -> None:
    """Runs a configuration up to a step of a stage."""
    pixels = config.recipe.stages()[stage].config.pixels
    with stopped(DreamFusion, at, lambda each: each.config.pixels == pixels):
        train(config, time.time())


def scene_of(config: TextTo3DConfig[Any]) -> Mapping[str, torch.Tensor]:
    return load_file(RunFolder(config.out).scene)


def assert_same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def with_fine(**changes: Any) -> TwoStages:
    return replace(RECIPE, fine=replace(RECIPE.fine, **changes))


def method_of_two_stages(monkeypatch: pytest.MonkeyPatch) -> str:
    """Adds a method with `RECIPE` as its preset, and returns its name."""
    presets = {"small": RECIPE, "wide": with_fine(pixels=10)}
    monkeypatch.setitem(METHODS["text-to-3d"], "both", Method(TwoStages, presets))
    return "both"


def whole_run(out: Path) -> TextTo3DConfig[Any]:
    """Carries out the sequential run, and returns its configuration."""
    config = two_stages(out, sequential=True, window=None)
    train(config, time.time())
    return config
