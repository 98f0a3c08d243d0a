"""Runs of the real pipeline on the exact score, small enough for seconds, and what a run writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from picardopt_3d.config import TextTo3DConfig
from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.methods.dreamfusion import SMALL
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import FieldConfig, RadianceField, load_scene
from picardopt_3d.world import BACKGROUND

TINY = replace(
    SMALL,
    steps=12,
    batch=1,
    pixels=16,
    scene=FieldConfig(resolutions=(6, 12), samples=10, background=BACKGROUND),
    guidance=GuidanceConfig("exact"),
)
TINY_OPTIONS = ["--recipe.pixels", "16", "--recipe.batch", "1", "--recipe.guidance.model", "exact"]
PROMISED = {
    "config.yaml",
    "contact_sheet.png",
    "report.json",
    "strides.png",
    "turntable.mp4",
    "viewer.html",
    "stages/1-stage/checkpoint.pt",
    "stages/1-stage/record.json",
    "stages/1-stage/scene.safetensors",
}
KEYS = {
    "prompt",
    "subject",
    "method",
    "preset",
    "size",
    "steps_done",
    "seed",
    "workers",
    "window",
    "steps",
    "sweeps",
    "mean_stride",
    "drift_evaluations",
    "wasted_evaluations",
    "joined_calls",
    "calls_saved",
    "seconds",
    "startup_seconds",
    "total_seconds",
    "psnr",
    "tolerance",
    "predictor",
    "device",
    "torch",
    "picardopt",
    "steps_per_sweep",
}


def options(out: Path, **changes: Any) -> TextTo3DConfig[Any]:
    """A run of the real pipeline on the exact score, small enough for seconds."""
    config: TextTo3DConfig[Any] = TextTo3DConfig(
        prompt="a red cube",
        out=out,
        method="dreamfusion",
        preset="small",
        recipe=TINY,
        workers=1,
        picture_every=0,
    )
    return replace(config, **changes)


def levels(out: Path) -> list[torch.Tensor]:
    scene = load_scene(RunFolder(out).scene)
    assert isinstance(scene, RadianceField)
    return [level.detach() for level in scene.levels]


def assert_same_scenes(first: Path, second: Path) -> None:
    for one, other in zip(levels(first), levels(second), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def names(folder: Path) -> set[str]:
    """All files of a folder, as paths in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
