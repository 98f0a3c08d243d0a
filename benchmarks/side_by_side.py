"""Objects made sequentially and by Picard iteration, beside their pictures and the truth: the paper's Figure 6.

python benchmarks/methods.py && python benchmarks/side_by_side.py
python benchmarks/side_by_side.py --recipe dreamgaussian --out docs/images/gaussians.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from methods import PICTURES, RECIPES, TEXTS, Run, configuration, subject
from picardopt_3d.cameras import orbit_cameras
from picardopt_3d.export.pictures import save_contact_sheet
from picardopt_3d.rendering import render_rgb
from picardopt_3d.run.folder import RunFolder
from picardopt_3d.scenes import load_scene
from picardopt_3d.world import render
from picardopt_3d.world.pictures import EXAMPLES

SIZE = 96
TURNS = (0.0, 60.0, 120.0, 180.0, 240.0, 300.0)
"""Degrees from where the picture was taken, or from the front."""


def rows(recipe: str, caption: str, scenes: Path) -> list[tuple[str, torch.Tensor]]:
    """One object's part of the sheet."""
    config = configuration(Run(recipe, caption, "sequential"), scenes)
    (stage,) = (stage.config for stage in config.recipe.stages())
    view = stage.cameras.middle
    elevation, azimuth = config.task.sheet_view
    cameras = orbit_cameras(elevation, azimuth + torch.tensor(TURNS), *view)
    found = []
    reference = config.task.reference(RunFolder(config.out).input, *view)
    if reference is not None:
        found.append(("picture", reference.at(SIZE)[0][None]))
    for label, mode in (("sequential", "sequential"), ("Picard", "default")):
        scene = load_scene(RunFolder(Run(recipe, caption, mode).folder(scenes)).scene)
        found.append((label, render_rgb(scene, cameras, SIZE)))
    return [*found, ("true views", render(subject(caption), cameras, SIZE, SIZE)[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="zero123")
    parser.add_argument("--scenes", type=Path, default=Path("build/methods"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/image_to_3d.png"))
    options = parser.parse_args()
    command, method, preset = RECIPES[options.recipe]
    shown = [each.caption for each, _, _ in EXAMPLES.values() if each.caption in PICTURES]
    if command == "text-to-3d":
        shown = list(TEXTS[:3])
    sheet = [row for caption in shown for row in rows(options.recipe, caption, options.scenes)]
    title = f"{method} {preset}: sequential, and Picard (window 8)"
    save_contact_sheet(sheet, title, options.out)


if __name__ == "__main__":
    main()
