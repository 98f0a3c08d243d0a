"""Small runs of the 3D package, through its command line; results are read from the run's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from safetensors.torch import load_file

from picardopt import load_checkpoint
from picardopt.cli import main
from tests.golden.results import result

FEW = ["--picture-every", "0", "--checkpoint-every", "0", "--device", "cpu", "--seed", "5"]
TINY = ["--recipe.batch", "1", "--recipe.scene.samples", "12"]


def _text(*options: str, prompt: str = "a red chair") -> Callable[[Path], list[str]]:
    return lambda folder: ["text-to-3d", prompt, *options]


def _picture(*options: str) -> Callable[[Path], list[str]]:
    """From a picture of a red box on a transparent ground."""

    def arguments(folder: Path) -> list[str]:
        picture = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
        ImageDraw.Draw(picture).rectangle((24, 30, 71, 76), fill=(200, 40, 30, 255))
        path = folder / "picture.png"
        picture.save(path)
        return ["image-to-3d", str(path), *options]

    return arguments


RUNS: dict[str, Callable[[Path], list[str]]] = {
    "dreamfusion": _text(
        "--workers", "1", "--window", "4", "--recipe.steps", "10", "--recipe.batch", "2"
    ),
    "dreamfusion, adaptive, two processes": _text(
        *("--workers", "2", "--window", "4", "--recipe.steps", "8", "--tolerance", "adaptive"),
        *("--recipe.guidance.model", "exact", "--recipe.pixels", "16", "--recipe.batch", "1"),
    ),
    "nerf with an occupancy grid": _text(
        *("--preset", "small-nerf", "--workers", "1", "--window", "3", "--recipe.steps", "10"),
        *TINY,
    ),
    "textmesh": _text(
        *("--method", "textmesh", "--workers", "1", "--window", "3", "--recipe.steps", "8"), *TINY
    ),
    "zero123": _picture("--workers", "1", "--window", "3", "--recipe.steps", "8", *TINY),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """Makes one run below a folder, which must exist and be empty."""
    out = folder / "run"
    assert main([*RUNS[name](folder), "--out", str(out), *FEW]) == 0
    report = json.loads(only(out, "report.json").read_text())
    scene = load_file(only(out, "scene.safetensors"))
    optimizer = _optimizer(load_checkpoint(only(out, "checkpoint.pt")))
    return result(
        parameters=[scene[name] for name in sorted(scene)],
        state=optimizer,
        losses=report["losses"],
        strides=report["steps_per_sweep"],
        evaluations=report["drift_evaluations"],
        wasted=report["wasted_evaluations"],
    )


def only(folder: Path, name: str) -> Path:
    """The one file of a name below a folder."""
    (found,) = folder.rglob(name)
    return found


def _optimizer(content: Any) -> Any:
    """The state of the one optimizer in a checkpoint, wherever it lies there."""
    found = list(_states(content))
    assert len(found) == 1, f"{len(found)} optimizers in the checkpoint"
    return found[0]


def _states(content: Any) -> Any:
    if isinstance(content, dict):
        if {"state", "param_groups"} <= content.keys():
            yield content["state"]
        else:
            for value in content.values():
                yield from _states(value)
